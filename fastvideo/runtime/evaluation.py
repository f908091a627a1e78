"""Evaluation during training: fixed prompts with fixed seeds, sampled without noise and without FP8, and scored.

--eval_steps N writes evaluation/{iteration}/ in the run's folder: one picture per prompt, and scores.json.
fastvideo.eval.report compares the pictures with iteration 0, the model before training. The link `best` in the run's
folder points to the checkpoint with the highest score. Noise depends on --seed and the prompt's place in
--eval_prompts, and each picture is sampled separately. So the number of processes and restarts don't change a picture,
and an evaluation doesn't change the training. Pictures may be larger and have more steps than in training: --eval_h,
--eval_w, --eval_sampling_steps, --eval_guidance_scale. Compiled blocks then get graphs of their own beside training's.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

from fastvideo.cli import FlagError
from fastvideo.config import GRPOConfig
from fastvideo.dataset.latent_flux_rl_datasets import LatentFluxRLDataset, collate
from fastvideo.family_defaults import family_defaults
from fastvideo.io.files import write_bytes
from fastvideo.io.pictures import png
from fastvideo.io.scores import evaluation_scores, write_scores
from fastvideo.models.family import Conditioning, LatentShape
from fastvideo.models.pretrained import family_of
from fastvideo.models.reward_model.groups import is_groupwise
from fastvideo.models.reward_model.spec import NO_GROUP
from fastvideo.models.reward_model.utils import RewardModel, build_reward_models, judge_of
from fastvideo.runtime.engines import Engine
from fastvideo.runtime.resume import Progress
from fastvideo.runtime.scoring import Scoring
from fastvideo.utils.advantages import reward_means
from fastvideo.utils.plan import Plan
from fastvideo.utils.steps import Step, sigma_schedule

import numpy as np
import torch
from diffusers import ModelMixin
from PIL import Image

# draw(plan, batch of one prompt, slot of the prompt) -> pictures; empty on processes that don't decode.
Draw = Callable[[Plan, dict, int], list[Image.Image]]


class Sampling(NamedTuple):
    """How evaluated pictures are sampled, where it may differ from training: names and units as in GRPOConfig."""

    h: int
    w: int
    sampling_steps: int
    guidance_scale: float

    @classmethod
    def of(cls, config: GRPOConfig) -> "Sampling":
        own = (config.eval_h, config.eval_w, config.eval_sampling_steps, config.eval_guidance_scale)
        pairs = zip(cls._fields, own, strict=True)
        return cls(*(getattr(config, name) if value is None else value for name, value in pairs))


def takes_empty_prompt(config: GRPOConfig) -> bool:
    """Whether classifier-free guidance acts in training or evaluation."""
    guided = family_of(config.pretrained_model_name_or_path).guided
    return guided(config.guidance_scale) or guided(Sampling.of(config).guidance_scale)


def noise_free_plan(sampling_steps: int, shift: float) -> Plan:
    """The whole schedule in Euler steps, for one picture per prompt."""
    sigmas = sigma_schedule(sampling_steps, shift)
    steps = (Step(i, sigma, sigmas[i + 1], sigmas[1], "ode") for i, sigma in enumerate(sigmas[:-1]))
    return Plan(tuple(steps))


def build_held_out(
    config: GRPOConfig, device: torch.device, scoring: Scoring
) -> tuple[dict[str, RewardModel], dict[str, float]] | None:
    """The reward models of --eval_reward and their weights; None without --eval_reward.

    Raises FlagError if the rewards that decide the best checkpoint compare the pictures of groups.
    """
    held_out = None
    if config.eval_reward is not None:
        held_out = build_reward_models(config.held_out(), str(device), evaluation=True, field="eval_reward")
    models = held_out[0] if held_out else scoring.models
    if config.eval_steps and any(map(is_groupwise, models.values())):  # a function of the user's own
        raise FlagError("eval_reward", config.eval_reward, NO_GROUP)
    return held_out


class Evaluation:
    """Samples and scores the prompts of --eval_prompts, or those that --eval_split holds out.

    models: name -> reward model: the training rewards with their start weights, except those that compare pictures of a
        group, and the held-out --eval_reward models.
    weights: name -> share in the reward that decides the best checkpoint: --eval_reward, else the training reward.
    shape: of the pictures' latents. sampling: see `Sampling`.
    """

    def __init__(
        self,
        config: GRPOConfig,
        dataset: LatentFluxRLDataset,
        scoring: Scoring,
        held_out: tuple[dict, dict] | None,
        vae: ModelMixin,
    ) -> None:
        """dataset: the embedded prompts. held_out: see `build_held_out`."""
        self.config, self.dataset = config, dataset
        self.prompts = [entry["caption"] for entry in self.dataset.entries]
        self.metadata = [entry.get("metadata", {}) for entry in self.dataset.entries]
        self.sampling, self.family = Sampling.of(config), family_of(config.pretrained_model_name_or_path)
        self.shape = LatentShape.of(vae, self.sampling.h, self.sampling.w, "eval_")
        shift = config.shift
        if shift == family_defaults(vars(config)).get("shift"):  # the model's own, for training's size and steps
            shift = family_defaults(vars(config) | self.sampling._asdict())["shift"]
        self.plan = noise_free_plan(self.sampling.sampling_steps, shift)
        self.scoring, self.weights = scoring, scoring.weights
        self.models = {name: model for name, model in scoring.models.items() if not is_groupwise(model)}
        if held_out:
            self.models, self.weights = self.models | held_out[0], held_out[1]
        settings = "seed h w sampling_steps shift guidance_scale pretrained_model_name_or_path".split()
        found = self.sampling._asdict()
        measure = [self.prompts, self.weights, [found.get(name, getattr(config, name)) for name in settings]]
        if judge := judge_of(self.models):
            measure.append(judge)
        measure += [self.metadata] if any(self.metadata) else []  # which older runs don't have
        self.measure = hashlib.sha256(json.dumps(measure).encode()).hexdigest()[:16]

    def due(self, iteration: int) -> bool:
        """Whether an evaluation follows the iteration."""
        return iteration % self.config.eval_steps == 0 or iteration == self.config.max_train_steps

    def conditioning(self, training: Conditioning) -> Conditioning:
        """The conditioning of a prompt in training, for pictures as they are evaluated."""
        image_ids = self.family.image_ids(self.shape, training.image_ids.device)
        return replace(training, image_ids=image_ids, guidance_scale=self.sampling.guidance_scale, shape=self.shape)

    def run(self, iteration: int, draw: Draw, engine: Engine, progress: Progress) -> dict[str, float]:
        """Samples and scores the prompts. All processes must call it; all get the metrics `evaluation_…`.

        Records the iteration in `progress.best` if its reward is the highest so far.
        """
        start = time.perf_counter()
        path = evaluation_scores(self.config.output_dir, iteration)
        path.parent.mkdir(parents=True, exist_ok=True)
        indices, images = [], []
        for turn in range(0, len(self.prompts), engine.data_ranks):
            # All ranks must run the model equally often: in the last turn, spare ranks draw the last prompt again.
            index = min(turn + engine.data_rank, len(self.prompts) - 1)
            with engine.without_float8():
                pictures = draw(self.plan, collate([self.dataset[index]]), index)
            if turn + engine.data_rank == index and pictures:
                indices.append(index)
                images += pictures
                write_bytes(path.with_name(f"{index:05d}.png"), png(images[-1], {}))

        def score() -> list[tuple[int, dict[str, float]]]:
            prompts, metadata = ([given[index] for index in indices] for given in (self.prompts, self.metadata))
            scores = self.scoring.compute(images, prompts, self.models, metadata=metadata) if images else {}
            return [(index, {k: float(v[i]) for k, v in scores.items()}) for i, index in enumerate(indices)]

        parts = self.scoring.gather([self.scoring.begin(score)])
        found = [values for _, values in sorted(chain.from_iterable(parts), key=lambda entry: entry[0])]
        if engine.accelerator.is_main_process:
            entries = [
                {"index": index, "path": path.with_name(f"{index:05d}.png"), "prompt": prompt, "reward": scores}
                for index, (prompt, scores) in enumerate(zip(self.prompts, found, strict=True))
            ]
            write_scores(path, entries)
        if engine.accelerator.device.type == "cuda" and self.sampling[:2] != (self.config.h, self.config.w):
            torch.cuda.empty_cache()  # training has tensors of other sizes
        metrics = reward_means({name: np.array([v[name] for v in found]) for name in found[0]}, self.weights)
        self._compare(iteration, metrics, progress)
        metrics["best_iteration"] = progress.best["iteration"] if progress.best else None
        metrics = {f"evaluation_{name}": value for name, value in metrics.items()}
        return metrics | {"seconds_evaluation": time.perf_counter() - start}

    def _compare(self, iteration: int, metrics: dict[str, float], progress: Progress) -> None:
        """Updates `progress.best`. A mean without the failed scores is over other pictures, so it can't be the best."""
        best, value = progress.best, metrics["reward"]
        if iteration == 0 or metrics["failed_rewards"]:
            return
        if best is None or best["measure"] != self.measure or value > best["value"]:
            progress.best = {"iteration": iteration, "value": value, "measure": self.measure}
