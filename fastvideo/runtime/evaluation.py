"""Evaluation during training: fixed prompts with fixed seeds, sampled without noise and scored.

--eval_steps N writes evaluation/{iteration}/ in the run's folder: a picture a prompt and scores.json, which
fastvideo.eval.report pairs with those of iteration 0, the model before training; the link `best` in that folder points
to the checkpoint of the highest score. Noise comes from --seed and the prompt's place in --eval_prompts, each picture
is sampled on its own, and nothing of it enters training: neither the number of processes nor a restart changes a
picture, and training goes on as if there had been no evaluation.
"""

import hashlib
import io
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fastvideo.config import GRPOConfig
from fastvideo.dataset.latent_flux_rl_datasets import LatentFluxRLDataset, collate
from fastvideo.io.files import read_prompts, write_bytes
from fastvideo.io.scores import evaluation_scores, write_scores
from fastvideo.models.flux import decode_latents
from fastvideo.models.reward_model.utils import RewardModel, build_reward_models, check_reward_files, compute_reward
from fastvideo.rollout_plan import plan_mix
from fastvideo.utils.advantages import reward_means

import numpy as np
import torch
from accelerate.utils import gather_object

if TYPE_CHECKING:
    from fastvideo.train_grpo_flux import Trainer


def check_evaluation(config: GRPOConfig) -> None:
    """Raises ValueError, one line, for prompts or files of held-out rewards that aren't there. Loads nothing."""
    if config.eval_steps:
        read_prompts(config.eval_prompts, "eval_prompts")
    if config.eval_reward:
        check_reward_files(config.held_out(), evaluation=True)


def build_held_out(config: GRPOConfig, device: torch.device) -> tuple[dict[str, RewardModel], dict[str, float]] | None:
    """The reward models of --eval_reward, if given, and their weights."""
    return build_reward_models(config.held_out(), str(device), evaluation=True) if config.eval_reward else None


class Evaluation:
    """The prompts of --eval_prompts, embedded, and the rewards of their pictures.

    models: those in training, at their start weights, and the held-out ones of --eval_reward; `weights`: name -> share
    in what decides the best checkpoint, which is --eval_reward, or without it the reward in training.
    """

    def __init__(self, trainer: "Trainer", index: Path, held_out: tuple[dict, dict] | None) -> None:
        """index: prompt.json of the embedded prompts. held_out: see `build_held_out`."""
        config = self.config = trainer.config
        self.dataset = LatentFluxRLDataset(index)
        self.prompts = [entry["caption"] for entry in self.dataset.entries]
        self.plan = tuple(plan_mix(config, ()))  # no stochastic step
        self.models, self.weights = trainer.scoring.models, trainer.scoring.weights
        if held_out:
            self.models, self.weights = self.models | held_out[0], held_out[1]
        settings = "seed h w sampling_steps shift guidance_scale pretrained_model_name_or_path".split()
        measure = [self.prompts, self.weights, [getattr(config, name) for name in settings]]
        self.measure = hashlib.sha256(json.dumps(measure).encode()).hexdigest()[:16]

    def due(self, iteration: int) -> bool:
        return iteration % self.config.eval_steps == 0 or iteration == self.config.max_train_steps

    def run(self, trainer: "Trainer", iteration: int) -> dict[str, float]:
        """Samples and scores; all processes call it and get the metrics `evaluation_…`. Updates `trainer.best`."""
        start, config, engine = time.perf_counter(), self.config, trainer.engine
        path = evaluation_scores(config.output_dir, iteration)
        path.parent.mkdir(parents=True, exist_ok=True)
        indices, images = [], []
        for turn in range(0, len(self.prompts), engine.data_ranks):
            # All ranks run the model equally often; at the end some repeat the last prompt for nothing.
            index = min(turn + engine.data_rank, len(self.prompts) - 1)
            conditioning = trainer.conditioning(collate([self.dataset[index]]))
            sampled = trainer.sample(self.plan, 0, range(index, index + 1), conditioning, start=1)  # no iteration is 0
            if turn + engine.data_rank == index and not engine.place_in_group:
                indices.append(index)
                images += decode_latents(trainer.vae, sampled.latents, config.h, config.w, 1)
                data = io.BytesIO()
                images[-1].save(data, "PNG")
                write_bytes(path.with_name(f"{index:05d}.png"), data.getvalue())
        prompts = [self.prompts[index] for index in indices]
        scores = compute_reward(images, prompts, self.models, self.weights)[2] if images else {}
        found = [(index, {k: float(v[i]) for k, v in scores.items()}) for i, index in enumerate(indices)]
        found = [values for _, values in sorted(gather_object(found), key=lambda entry: entry[0])]
        if engine.accelerator.is_main_process:
            entries = [
                {"index": index, "path": path.with_name(f"{index:05d}.png"), "prompt": prompt, "reward": scores}
                for index, (prompt, scores) in enumerate(zip(self.prompts, found, strict=True))
            ]
            write_scores(path, entries)
        metrics = reward_means({name: np.array([v[name] for v in found]) for name in found[0]}, self.weights)
        self._compare(trainer, iteration, metrics)
        metrics["best_iteration"] = trainer.best["iteration"] if trainer.best else None
        metrics = {f"evaluation_{name}": value for name, value in metrics.items()}
        return metrics | {"seconds_evaluation": time.perf_counter() - start}

    def _compare(self, trainer: "Trainer", iteration: int, metrics: dict[str, float]) -> None:
        """A mean without the failed scores is none of the same pictures, so it can't be the best."""
        best, value = trainer.best, metrics["reward"]
        if iteration == 0 or metrics["failed_rewards"]:
            return
        if best is None or best["measure"] != self.measure or value > best["value"]:
            trainer.best = {"iteration": iteration, "value": value, "measure": self.measure}
