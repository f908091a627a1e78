"""MixGRPO training of FLUX.1: sample groups of pictures with a mixed ODE-SDE sampler, score them, learn from it.

    python fastvideo/train_grpo_flux.py --prompts_file prompts.txt --pretrained_model_name_or_path FLUX_PIPELINE ...
    torchrun --nproc_per_node 2 fastvideo/train_grpo_flux.py ...        # prompts spread over processes

One iteration, top to bottom in this file: `rollout` executes the plan that rollout_plan.py made for the current window
→ pictures → rewards → advantages → G/k optimizer steps of `train_on` with `policy_loss` on the trained transitions.
scripts/finetune holds recipes, docs/algorithms.md the formulas beside their flags, docs/deviations.md what differs from
the references on purpose.
"""

import math
import os
import signal
import sys
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from fastvideo.config import IGNORED_FLAGS, GRPOConfig, parse_dataclass, world_size_of_environment
from fastvideo.data_preprocess.preprocess_flux_embedding import embed_prompts
from fastvideo.dataset.latent_flux_rl_datasets import LatentFluxRLDataset, PromptSampler, collate
from fastvideo.models.flux import (
    Conditioning,
    LatentShape,
    add_lora,
    check_lora_targets,
    decode_latents,
    enable_gradient_checkpointing,
    load_transformer,
    load_vae,
    meta_transformer,
    predict_velocity,
)
from fastvideo.models.reward_model.granular import GranularRewardModel
from fastvideo.models.reward_model.utils import build_reward_models, check_reward_files, compute_reward
from fastvideo.rollout_plan import Plan, describe_plan, function_evaluations, make_plan, rows_per_prompt, start_rows
from fastvideo.utils.advantages import mix_advantages, sample_order
from fastvideo.utils.checkpoint import (
    CheckpointNotWritten,
    open_output,
    read_record,
    read_weights,
    run_settings,
    save_checkpoint,
    swap_in,
)
from fastvideo.utils.engines import Engine, build_engine, main_process_first
from fastvideo.utils.fingerprint import model_fingerprint
from fastvideo.utils.grpo_states import windows
from fastvideo.utils.processes import stop_signals
from fastvideo.utils.run_log import Log
from fastvideo.utils.sampling_utils import coefficients, log_prob, transition_mean

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm import tqdm

# What a random stream is for; the last entry of its seed.
NOISE, STEP_SUBSET, ORDER = 0, 1, 2

# v = velocity(x [N, L, C], σ [N], prompt index [N])
Velocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def draw_noise(
    seed: int, iteration: int, slots: Sequence[int], rows: int, step: int, shape: LatentShape
) -> torch.Tensor:
    """Standard normal noise [prompts · rows, L, C], a function of (seed, iteration, prompt slot, row, step) alone.

    One generator a row, on the CPU: the numbers depend neither on rank, world size and micro-batch nor on the device.
    """
    noise = torch.empty(len(slots) * rows, shape.tokens, shape.channels)
    for i, row in enumerate(noise):
        key = np.random.SeedSequence([seed, iteration, slots[i // rows], i % rows, step, NOISE])
        row.normal_(generator=torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0]) >> 1))
    return noise


# --- rollout ----------------------------------------------------------------------------------------------------------


@dataclass
class Rollout:
    """Samples of a plan and what training needs of its trained steps; dict keys are positions in the plan."""

    latents: torch.Tensor  # [P·G, L, C] at σ = 0
    before: dict[int, torch.Tensor] = field(default_factory=dict)  # x, [P·rows, L, C]
    after: dict[int, torch.Tensor] = field(default_factory=dict)  # x', [P·rows·branch, L, C]
    log_probs: dict[int, torch.Tensor] = field(default_factory=dict)  # of x' under the sampling policy, [P·rows·branch]


def transition_table(plan: Plan, device: torch.device) -> torch.Tensor:
    """Coefficients of x and v, std and σ of each step, [steps, 4]: the float32 numbers rollout and training share."""
    rows = [(c.x, c.v, c.std, step.sigma) for c, step in zip(coefficients(plan), plan, strict=True)]
    return torch.tensor(rows, dtype=torch.float32, device=device)


@torch.no_grad()
def rollout(
    plan: Plan, latents: torch.Tensor, prompts: int, velocity: Velocity, noise: Callable[[int, int], torch.Tensor]
) -> Rollout:
    """Executes a plan from noise to pictures.

    Args:
        latents: [P·rows, L, C] at σ = 1, the rows of a prompt together. prompts: P.
        noise: (position in the plan, rows a prompt) -> standard normal [P·rows, L, C].
    """
    table, history = transition_table(plan, latents.device), deque(maxlen=3)
    result = Rollout(latents)
    for position, (step, numbers) in enumerate(zip(plan, coefficients(plan), strict=True)):
        x_weight, v_weight, std, sigma = table[position]
        rows = len(latents) // prompts
        prompt_index = torch.arange(prompts, device=latents.device).repeat_interleave(rows)
        v = velocity(latents, sigma.expand(len(latents)), prompt_index)
        if step.train:
            result.before[position] = latents
        if step.branch > 1:
            latents, v = latents.repeat_interleave(step.branch, 0), v.repeat_interleave(step.branch, 0)
            history = deque((x0.repeat_interleave(step.branch, 0) for x0 in history), maxlen=3)
        history.appendleft(latents - sigma * v)
        mean = transition_mean(latents, v, x_weight, v_weight)
        for weight, x0 in zip(numbers.history, list(history)[1:], strict=False):
            mean = mean + weight * x0
        latents = mean + std * noise(position, rows * step.branch) if numbers.std else mean
        if step.train:
            result.after[position] = latents
            result.log_probs[position] = log_prob(latents, mean, std)
    result.latents = latents
    return result


# --- loss -------------------------------------------------------------------------------------------------------------


def policy_loss(
    new: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, clip_range: float, kl_coeff: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped surrogate of each transition, max(−A·r, −A·clip(r, 1 ± ε)), plus kl_coeff · ½(log p_new − log p_old)².

    Args:
        new, old: log-probabilities [N] under the policy now and the one that sampled. advantages: [N].

    Returns:
        loss [N], and without gradient the parts `policy_loss`, `kl_loss`, `ratio`, `clipped`, each [N].
    """
    difference = new - old
    ratio = torch.exp(difference)
    surrogate = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
    kl = 0.5 * difference**2
    parts = {
        "policy_loss": surrogate,
        "kl_loss": kl,
        "ratio": ratio,
        "clipped": ((ratio - 1).abs() > clip_range).float(),
    }
    return surrogate + kl_coeff * kl, {name: part.detach() for name, part in parts.items()}


def reference_kl(mean: torch.Tensor, reference: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """KL divergence [N] of a transition from the base model's, mean((μ − μ_ref)²) / (2 std²): Gaussians of equal std.

    mean, reference: [N, L, C]. std: [N, 1, 1]. The mean over elements, as in the log-probability.
    """
    return ((mean - reference) ** 2 / (2 * std**2)).mean(dim=(1, 2))


@dataclass(frozen=True)
class Transition:
    """A trained transition of this rank: step position in the plan, row before it, row after it, its advantage."""

    position: int
    parent: int
    child: int
    prompt: int
    advantage: float


def slice_transitions(
    plan: Plan, rows: list[int], order: np.ndarray, trained: np.ndarray, advantages: np.ndarray
) -> list[Transition]:
    """The transitions of one optimizer step, sorted so that those leaving one row stand together.

    Args:
        rows: rows a prompt at each step. order: [P, k] samples of this step. trained: [P, G, n] positions in the plan.
        advantages: [P, G].
    """
    group = advantages.shape[1]
    found = []
    for prompt, samples in enumerate(order):
        for sample in samples:
            for position in trained[prompt, sample]:
                width = rows[position + 1]
                child = prompt * width + int(sample) * width // group
                parent = child // plan[position].branch
                found.append(Transition(int(position), parent, child, prompt, float(advantages[prompt, sample])))
    return sorted(found, key=lambda t: (t.position, t.parent, t.child))


def micro_batches(transitions: list[Transition], size: int) -> list[list[Transition]]:
    """Cut after every `size` distinct rows: one forward and backward pass serves all transitions that leave a row."""
    batches: list[list[Transition]] = []
    seen: set[tuple[int, int]] = set()
    for transition in transitions:
        row = (transition.position, transition.parent)
        if row not in seen and len(seen) % size == 0:
            batches.append([])
        seen.add(row)
        batches[-1].append(transition)
    return batches


def transitions_loss(
    batch: list[Transition],
    sampled: Rollout,
    table: torch.Tensor,
    velocity: Velocity,
    config: GRPOConfig,
    reference: Velocity | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss [N] of a micro-batch's N transitions, with its parts: what the rollout did, once more with gradient.

    reference: the base model's velocity, with --ref_kl_coeff.
    """
    rows = list(dict.fromkeys((t.position, t.parent, t.prompt) for t in batch))
    place = {row[:2]: i for i, row in enumerate(rows)}
    device = table.device

    def indices(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, device=device)

    latents = torch.stack([sampled.before[position][parent] for position, parent, _ in rows])
    sigma = table[indices([position for position, _, _ in rows]), 3]
    prompt_index = indices([prompt for _, _, prompt in rows])
    base_v = reference(latents, sigma, prompt_index) if reference else None  # first: adapters are off meanwhile
    v = velocity(latents, sigma, prompt_index)
    leaving = indices([place[t.position, t.parent] for t in batch])
    x_weight, v_weight, std = table[indices([t.position for t in batch]), :3, None, None].unbind(1)
    mean = transition_mean(latents[leaving], v[leaving], x_weight, v_weight)
    after = torch.stack([sampled.after[t.position][t.child] for t in batch])
    old = torch.stack([sampled.log_probs[t.position][t.child] for t in batch])
    advantages = torch.tensor([t.advantage for t in batch], device=device)
    loss, parts = policy_loss(log_prob(after, mean, std), old, advantages, config.clip_range, config.kl_coeff)
    if base_v is not None:
        base_mean = transition_mean(latents[leaving], base_v[leaving], x_weight, v_weight)
        divergence = reference_kl(mean, base_mean, std)
        loss, parts = loss + config.ref_kl_coeff * divergence, parts | {"ref_kl_loss": divergence.detach()}
    return loss, parts


# --- one run ----------------------------------------------------------------------------------------------------------


class TrainingStopped(RuntimeError):
    """Too many optimizer steps in a row had non-finite numbers."""


class Interrupted(TrainingStopped):
    """SIGTERM or SIGINT, after the iteration was finished and saved."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Trainer:
    """State of a run: models, optimizer, where it is. `iteration` does the work."""

    def __init__(self, config: GRPOConfig, engine: Engine, checkpoint: Path | None) -> None:
        self.config, self.engine, self.accelerator = config, engine, engine.accelerator
        self.local_prompts = config.local_prompts(self.accelerator.num_processes)
        device, path = self.accelerator.device, config.pretrained_model_name_or_path
        transformer = self._load_transformer(checkpoint)
        self.vae = load_vae(path, self.frozen_dtype).to(device)
        self.shape = LatentShape.of(self.vae, config.h, config.w)
        self.image_ids = self.shape.image_ids(device)
        self.guidance_embeds = bool(transformer.config.guidance_embeds)
        self.reward_models, self.reward_weights = build_reward_models(config, str(device))

        engine.prepare(transformer, {"lr": config.learning_rate, "weight_decay": config.weight_decay})
        self.frozen = None
        if config.ref_kl_coeff and not config.use_lora:
            base = load_transformer(path, self.frozen_dtype).requires_grad_(False).eval()
            self.frozen = engine.prepare_frozen(base)
        self.steps_per_iteration = config.num_generations // config.gradient_accumulation_steps
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler,
            engine.raw_optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps * self.steps_per_iteration,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        self.ema = EMAModel(engine.trained_parameters(), decay=config.ema_decay) if config.ema_decay else None
        self.done = 0  # iterations
        self.optimizer_steps = 0
        self.skipped_in_a_row = 0
        self.wandb_id = uuid.uuid4().hex[:8]
        if checkpoint is not None:
            self._resume(checkpoint)

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Of weights that aren't trained."""
        on_gpu = self.accelerator.device.type == "cuda"
        return torch.bfloat16 if on_gpu and self.config.mixed_precision == "bf16" else torch.float32

    def _load_transformer(self, checkpoint: Path | None) -> FluxTransformer2DModel:
        """The model with its trained parameters, the whole or adapters, as the base model or a checkpoint has them."""
        config, base = self.config, self.config.pretrained_model_name_or_path
        source = base if config.use_lora or checkpoint is None else str(checkpoint)
        master = torch.bfloat16 if config.master_weight_type == "bf16" else torch.float32
        dtype = self.frozen_dtype if config.use_lora else master
        if self.engine.loads_weights:
            transformer = load_transformer(source, dtype)
        else:
            transformer = meta_transformer(source, dtype).to_empty(device="cpu")
        if config.use_lora:
            add_lora(transformer, config.lora_rank, config.lora_alpha, config.lora_target_modules, config.seed)
            if checkpoint is not None:
                transformer.load_state_dict(read_weights(checkpoint), strict=False)
        if config.gradient_checkpointing:
            enable_gradient_checkpointing(transformer, config.selective_checkpointing)
        return transformer.train()

    def _resume(self, checkpoint: Path) -> None:
        record = read_record(checkpoint)
        self.engine.load_optimizer(checkpoint / "optimizer")
        self.done, self.optimizer_steps = record["iteration"], record["optimizer_steps"]
        self.wandb_id = record["wandb_id"]
        if self.optimizer_steps:  # the learning rate of the flags' schedule at this place
            self.lr_scheduler._step_count = self.lr_scheduler.last_epoch = self.optimizer_steps - 1
            self.lr_scheduler.step()
        if self.ema is not None and (checkpoint / "ema").is_dir():
            weights = read_weights(checkpoint / "ema") if self.accelerator.is_main_process else {}
            swap_in(self.ema, self.engine.trained_parameters())
            self.engine.set_trained_weights(weights)
            swap_in(self.ema, self.engine.trained_parameters())
            self.ema.optimization_step = record["ema_optimization_step"]

    def save(self, epoch: int) -> None:
        """Writes checkpoint-{iterations done}-{epoch}."""
        config = self.config
        record = {
            "iteration": self.done,
            "epoch": epoch,
            "optimizer_steps": self.optimizer_steps,
            "ema_optimization_step": self.ema.optimization_step if self.ema is not None else 0,
            "wandb_id": self.wandb_id,
            "base_model_hash": model_fingerprint(config.pretrained_model_name_or_path, ("transformer",)),
            "settings": run_settings(config, self.accelerator.num_processes),
        }
        save_checkpoint(Path(config.output_dir), self.engine, self.ema, record)

    def velocity(self, model: torch.nn.Module, conditioning: Conditioning) -> Velocity:
        """The same prediction, precision and autocast for rollout and training."""

        def predict(latents: torch.Tensor, sigma: torch.Tensor, prompt_index: torch.Tensor) -> torch.Tensor:
            with self.accelerator.autocast():
                return predict_velocity(model, latents, sigma, prompt_index, conditioning, self.guidance_embeds)

        return predict

    def reference(self, conditioning: Conditioning) -> Velocity:
        """The base model's prediction: that of a frozen copy, or of the model without its adapters."""
        frozen = self.velocity(self.frozen or self.engine.model, conditioning)

        @torch.no_grad()
        def predict(latents: torch.Tensor, sigma: torch.Tensor, prompt_index: torch.Tensor) -> torch.Tensor:
            if self.frozen is None:
                self.engine.transformer.disable_adapters()
            v = frozen(latents, sigma, prompt_index)
            if self.frozen is None:
                self.engine.transformer.enable_adapters()
            return v

        return predict

    @contextmanager
    def phase(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        """Adds the time of a phase; the only waits for the GPU are at its ends."""
        start = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[f"seconds_{name}"] = time.perf_counter() - start

    def sample(self, plan: Plan, number: int, conditioning: Conditioning) -> Rollout:
        """The rollout of iteration `number` for this rank's prompts."""
        config, device = self.config, self.accelerator.device
        first_slot = self.accelerator.process_index * self.local_prompts
        slots = range(first_slot, first_slot + self.local_prompts)
        start, group = start_rows(config), config.num_generations

        def noise(step: int, rows: int) -> torch.Tensor:
            drawn = draw_noise(config.seed, number, slots, rows, step, self.shape)
            return (drawn.pin_memory() if device.type == "cuda" else drawn).to(device, non_blocking=True)

        # Stream 0 is the initial noise, stream i + 1 that of plan position i.
        latents = noise(0, 1 if config.init_same_noise else group)
        if config.init_same_noise:
            latents = latents.repeat_interleave(start, 0)
        size = config.rollout_batch_size or len(slots) * group

        def velocity(latents: torch.Tensor, sigma: torch.Tensor, prompt_index: torch.Tensor) -> torch.Tensor:
            parts = zip(latents.split(size), sigma.split(size), prompt_index.split(size), strict=True)
            return torch.cat([whole(*part) for part in parts])

        with self.engine.rollout() as model:
            whole = self.velocity(model, conditioning)
            return rollout(plan, latents, len(slots), velocity, lambda position, rows: noise(position + 1, rows))

    def score(self, latents: torch.Tensor, captions: list[str], seconds: dict[str, float]) -> tuple[list, dict]:
        """Pictures and gathered scores: name -> [P, G] over all ranks, NaN where failed."""
        config, group = self.config, self.config.num_generations
        with self.phase("decode", seconds):
            batch = config.rollout_batch_size or group
            images = decode_latents(self.vae, latents, config.h, config.w, batch)
        with self.phase("reward", seconds):
            prompts = [caption for caption in captions for _ in range(group)]
            step, total = self.progress(len(prompts))
            _, _, scores, _ = compute_reward(
                images, prompts, self.reward_models, self.reward_weights, curr_step=step, total_steps=total
            )
            stacked = torch.tensor(np.stack(list(scores.values()), axis=-1), device=self.accelerator.device)
            everywhere = self.accelerator.gather(stacked).reshape(-1, group, len(scores)).cpu().numpy()
        return images, {name: everywhere[..., i] for i, name in enumerate(scores)}

    def progress(self, images: int) -> tuple[int | np.ndarray, int]:
        """curr_step and total_steps of the granular weights: over training, or each picture's place in its group."""
        if self.config.granular_progress == "batch_index":
            return np.arange(images) % self.config.num_generations, self.config.num_generations
        return self.done + 1, self.config.max_train_steps

    def advantage_weights(self, shape: tuple[int, int]) -> dict[str, np.ndarray | float]:
        """Weight of each score in the advantage. With `--granular_mix advantage` components stand for their model."""
        weights: dict[str, np.ndarray | float] = {}
        for name, weight in self.reward_weights.items():
            model = self.reward_models[name]
            if self.config.granular_mix == "advantage" and isinstance(model, GranularRewardModel):
                images = shape[0] * shape[1]
                parts = model.component_weights(*self.progress(images), images)
                weights |= {key: weight * part.reshape(shape) for key, part in parts.items()}
            else:
                weights[name] = weight
        return weights

    def rng(self, number: int, slot: int, purpose: int) -> np.random.Generator:
        """Random choices of one prompt, a function of (seed, iteration, prompt slot)."""
        return np.random.default_rng([self.config.seed, number, slot, purpose])

    def trained_positions(self, plan: Plan, number: int, slots: range) -> np.ndarray:
        """Plan positions that each sample trains, [P, G, n]: all trained steps, or a random share of them a sample."""
        positions = np.flatnonzero([step.train for step in plan])
        group, config = self.config.num_generations, self.config
        if config.training_strategy == "part" or config.frozen_init_timesteps:
            return np.broadcast_to(positions, (len(slots), group, len(positions)))
        count = int(len(positions) * config.timestep_fraction)
        return np.stack(
            [
                np.stack([np.sort(rng.choice(positions, count, replace=False)) for _ in range(group)])
                for rng in (self.rng(number, slot, STEP_SUBSET) for slot in slots)
            ]
        )

    def train_on(
        self, plan: Plan, number: int, sampled: Rollout, advantages: np.ndarray, conditioning: Conditioning
    ) -> dict[str, float]:
        """G/k optimizer steps; step s uses samples [ks, ks+k) of every prompt's group. advantages: [P, G], all ranks.

        Returns the metrics of all ranks.
        """
        config, accelerator = self.config, self.accelerator
        k, local = config.gradient_accumulation_steps, self.local_prompts
        slots = range(accelerator.process_index * local, (accelerator.process_index + 1) * local)
        own = np.clip(advantages[slots.start : slots.stop], -config.adv_clip_max, config.adv_clip_max)
        order = np.stack(
            [
                sample_order(own[i], config.advantage_rerange_strategy, self.rng(number, slot, ORDER))
                for i, slot in enumerate(slots)
            ]
        )
        trained = self.trained_positions(plan, number, slots)
        rows, table = rows_per_prompt(plan, start_rows(config)), transition_table(plan, accelerator.device)
        velocity = self.velocity(self.engine.model, conditioning)
        reference = self.reference(conditioning) if config.ref_kl_coeff else None
        # Mean over prompts of all ranks, their k samples and trained steps; the engine averages gradients over ranks.
        weight = 1 / (local * k * trained.shape[-1])
        sums: dict[str, torch.Tensor] = {}
        deviations, norms, skipped, first = [], [], 0, 0
        slices = [
            micro_batches(
                slice_transitions(plan, rows, order[:, s * k : (s + 1) * k], trained, own),
                config.train_micro_batch_size,
            )
            for s in range(self.steps_per_iteration)
        ]
        for batches, passes in zip(slices, self.passes(slices), strict=True):
            step_loss = torch.zeros((), device=accelerator.device)
            for i in range(passes):
                # Some processes may have fewer micro-batches than others: they repeat one, which then counts nothing.
                batch, share = (batches[i], weight) if i < len(batches) else (batches[-1], 0.0)
                with self.engine.micro_batch(last=i == passes - 1):
                    loss, parts = transitions_loss(batch, sampled, table, velocity, config, reference)
                    loss = loss.sum() * share
                    self.engine.backward(loss)
                step_loss += loss.detach()
                for name, part in (parts | {"loss": loss.detach()}).items():
                    part = part if name == "loss" else part.sum() * share
                    sums[name] = sums.get(name, 0) + part / self.steps_per_iteration
                deviations.append((parts["ratio"] - 1).abs().max())
            first = first or len(deviations)  # micro-batches before the first update
            norm = self.engine.step(step_loss)
            if norm is not None:
                self.lr_scheduler.step()
                self.optimizer_steps += 1
                self.skipped_in_a_row = 0
                norms.append(norm)
                if self.ema is not None and number > config.ema_start_step:
                    self.ema.step(self.engine.trained_parameters())
            else:
                skipped += 1
                self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= config.max_skipped_steps:
                break
        local_values = torch.stack(
            [*sums.values(), torch.stack(norms).mean() if norms else step_loss * math.nan]
            + [torch.stack(deviations).max(), torch.stack(deviations[:first]).max()]
        )
        everywhere = accelerator.gather(local_values[None]).cpu()
        names = ["clip_frac" if n == "clipped" else "ratio_mean" if n == "ratio" else n for n in sums]
        metrics = dict(zip([*names, "grad_norm"], everywhere.mean(0).tolist(), strict=False))
        metrics["ratio_max_deviation"], metrics["ratio_first_deviation"] = everywhere.max(0).values[-2:].tolist()
        return metrics | {
            "optimizer_steps": len(norms),
            "skipped_steps": skipped,
            "lr": self.lr_scheduler.get_last_lr()[0],
        }

    def passes(self, slices: list[list[list[Transition]]]) -> list[int]:
        """Micro-batches to run in each optimizer step: as many as the process with the most has, where need be."""
        counts = [len(batches) for batches in slices]
        if not self.engine.equal_batches:
            return counts
        here = torch.tensor([counts], device=self.accelerator.device)
        return self.accelerator.gather(here).max(0).values.tolist()

    def iteration(self, batch: dict, window: list[int]) -> tuple[dict, list]:
        """Rollout, rewards, advantages, optimizer steps. Returns the metrics of all ranks and this rank's pictures."""
        config, device = self.config, self.accelerator.device
        number, seconds, start = self.done + 1, {}, time.perf_counter()
        conditioning = Conditioning(
            batch["prompt_embeds"].to(device, torch.float32, non_blocking=True),
            batch["pooled_prompt_embeds"].to(device, torch.float32, non_blocking=True),
            batch["text_ids"][0].to(device, torch.float32, non_blocking=True),
            self.image_ids,
            config.guidance_scale,
        )
        plan = make_plan(config, window)
        with self.phase("rollout", seconds):
            sampled = self.sample(plan, number, conditioning)
        images, scores = self.score(sampled.latents, batch["caption"], seconds)
        shape = next(iter(scores.values())).shape
        weights = self.advantage_weights(shape)
        advantages, flat = mix_advantages(
            scores, weights, config.multi_reward_mix, config.use_group, config.trimmed_ratio
        )
        reward_metrics = self.reward_metrics(scores)
        with self.phase("train", seconds):
            if math.isfinite(reward_metrics["reward"]):
                metrics = self.train_on(plan, number, sampled, advantages, conditioning)
            else:  # nothing could be scored, on any rank
                self.skipped_in_a_row += self.steps_per_iteration
                metrics = {"optimizer_steps": 0, "skipped_steps": self.steps_per_iteration}
        self.done = number
        metrics |= {
            "step": number,
            "images": shape[0] * shape[1],
            "nfe": shape[0] * function_evaluations(plan, start_rows(config)),
            "window": [step.index for step in plan if step.train],
            "zero_spread_groups": flat,
        }
        return metrics | reward_metrics | seconds | {"seconds_total": time.perf_counter() - start}, images

    def reward_metrics(self, scores: dict[str, np.ndarray]) -> dict[str, float]:
        """Means of the weighted reward, of every model and component, and the granular weights of this iteration."""
        used = np.stack([scores[name] for name in self.reward_weights])
        complete = np.isfinite(used).all(0)
        reward = np.tensordot(list(self.reward_weights.values()), used[:, complete], 1)
        metrics = {
            "reward": reward.mean() if complete.any() else math.nan,
            "reward_std": reward.std() if complete.any() else math.nan,
            "failed_rewards": int((~np.isfinite(used)).sum()),
        }
        for name, values in scores.items():
            finite = values[np.isfinite(values)]
            metrics[f"reward_{name}"] = finite.mean() if len(finite) else math.nan
        for model in self.reward_models.values():
            if isinstance(model, GranularRewardModel):
                current = model.get_dynamic_weights(*self.progress(self.config.num_generations))
                mean = np.atleast_2d(current).mean(0)
                metrics |= {f"granular_weight_{c}": w for c, w in zip(model.component_names, mean, strict=True)}
        return metrics


# --- command line -----------------------------------------------------------------------------------------------------


def describe(config: GRPOConfig, world_size: int) -> str:
    """The derived arithmetic and the first window's plan. Every window of the run is checked on the way.

    Raises:
        ValueError: a window can't be planned, or the prompts don't divide among the processes.
    """
    prompts = config.local_prompts(world_size) * world_size
    start = start_rows(config)
    schedule = list(islice(windows(config), config.max_train_steps))
    evaluations = {tuple(w): function_evaluations(make_plan(config, w), start) for w in schedule}
    nfe = [evaluations[tuple(w)] for w in schedule]
    steps = config.num_generations // config.gradient_accumulation_steps
    first = make_plan(config, schedule[0])
    return "\n".join(
        [
            f"{config.algorithm}: {prompts} prompts x {config.num_generations} samples = "
            f"{prompts * config.num_generations} images an iteration on {world_size} process(es)",
            f"{steps} optimizer steps an iteration, each on {config.gradient_accumulation_steps} samples a prompt, "
            f"in {config.max_train_steps} iterations: {config.max_train_steps * steps} optimizer steps",
            f"velocity evaluations (NFE) a prompt and iteration: {min(nfe)} to {max(nfe)}, mean {np.mean(nfe):.1f} "
            f"(without sharing {config.num_generations * len(first)})",
            f"plan of the first window {schedule[0]}:",
            describe_plan(first, start),
        ]
    )


def set_up(config: GRPOConfig) -> tuple[Trainer, PromptSampler, DataLoader]:
    """Everything that can fail on bad input, the cheap checks first."""
    check_reward_files(config)
    dataset = (
        LatentFluxRLDataset(config.data_json_path, config.cfg, config.sampler_seed) if config.data_json_path else None
    )
    if config.use_lora:
        check_lora_targets(meta_transformer(config.pretrained_model_name_or_path), config.lora_target_modules)
    engine = build_engine(config, world_size_of_environment())
    accelerator = engine.accelerator
    if accelerator.num_processes != world_size_of_environment():
        raise ValueError(
            f"{world_size_of_environment()} processes were started, but Accelerate connects {accelerator.num_processes}"
        )
    if accelerator.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention backward crashes on Hopper (torch 2.11)
    checkpoint = main_process_first(accelerator, lambda: open_output(config, accelerator.num_processes))
    if dataset is None:
        index = embed_prompts(
            config.pretrained_model_name_or_path,
            config.prompts_file,
            Path(config.output_dir) / "rl_embeddings",
            device=str(accelerator.device),
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        dataset = LatentFluxRLDataset(index, config.cfg, config.sampler_seed)
    dataset.check_files()  # before the models are loaded
    trainer = Trainer(config, engine, checkpoint)
    sampler = PromptSampler(
        len(dataset),
        trainer.local_prompts * accelerator.num_processes,
        accelerator.process_index,
        accelerator.num_processes,
        config.sampler_seed,
        start_iteration=trainer.done + 1,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=config.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    return trainer, sampler, loader


def train(trainer: Trainer, sampler: PromptSampler, loader: DataLoader) -> None:
    """The loop: iterations, metrics, pictures, checkpoints, until exactly max_train_steps.

    Raises:
        TrainingStopped: max_skipped_steps optimizer steps in a row had non-finite numbers. A checkpoint is saved first.
        Interrupted: SIGTERM or SIGINT came to any process. A checkpoint is saved first.
        CheckpointNotWritten: the disk is full, for instance.
    """
    config, main_process = trainer.config, trainer.accelerator.is_main_process
    log = Log(config, trainer.wandb_id) if main_process else None
    schedule = islice(windows(config), trainer.done, config.max_train_steps)
    bar = tqdm(total=config.max_train_steps, initial=trainer.done, desc="training", disable=not main_process)
    with bar, stop_signals() as asked:
        for window, batch in zip(schedule, loader, strict=False):
            metrics, images = trainer.iteration(batch, window)
            epoch = sampler.epoch_of(trainer.done)
            if log is not None:
                log.write(metrics | {"epoch": epoch})
                if config.image_log_steps and trainer.done % config.image_log_steps == 0:
                    log.write_images(trainer.done, images[: config.num_generations])
            bar.set_postfix(reward=f"{metrics['reward']:.4f}", window=f"{window[0]}-{window[-1]}")
            bar.update()
            stopped = trainer.skipped_in_a_row >= config.max_skipped_steps
            interrupted = trainer.engine.any_process(bool(asked))
            due = trainer.done % config.checkpointing_steps == 0 or trainer.done == config.max_train_steps
            if stopped or interrupted or due:
                trainer.save(epoch)
            if stopped:
                raise TrainingStopped(
                    f"{trainer.skipped_in_a_row} optimizer steps in a row had a non-finite loss, reward or gradient, "
                    f"the last in iteration {trainer.done}; none of them changed the weights, which are saved in "
                    f"{config.output_dir}"
                )
            if interrupted and trainer.done < config.max_train_steps:
                if log is not None:
                    log.close()
                raise Interrupted(
                    asked[0] if asked else signal.SIGTERM,
                    f"asked to by a signal, after iteration {trainer.done}, which is saved; go on with "
                    "--resume_from_checkpoint latest",
                )
    if log is not None:
        log.close()


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Bad input ends it with one line and status 2, a stopped run with one line and status 1."""
    config = parse_dataclass(GRPOConfig, argv, __doc__, IGNORED_FLAGS)
    try:
        text = describe(config, world_size_of_environment())
        if os.environ.get("RANK", "0") == "0":
            print(text)
        if config.dry_run:
            return
        run = set_up(config)
    except ValueError as error:
        print(f"train_grpo_flux.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    try:
        train(*run)
    except (TrainingStopped, CheckpointNotWritten) as error:
        print(f"train_grpo_flux.py: stopped: {error}", file=sys.stderr)
        raise SystemExit(128 + error.number if isinstance(error, Interrupted) else 1) from error


if __name__ == "__main__":
    main()
