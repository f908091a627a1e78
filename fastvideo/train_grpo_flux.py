"""MixGRPO training of FLUX.1: samples groups of pictures with a mixed ODE-SDE sampler, scores them, trains on them.

    python fastvideo/train_grpo_flux.py --prompts_file prompts.txt --pretrained_model_name_or_path FLUX_PIPELINE ...
    torchrun --nproc_per_node 8 fastvideo/train_grpo_flux.py --parallel fsdp ...        # docs/distributed.md

One iteration, top to bottom in this file: `rollout` executes the plan that rollout_plan.py made for the current window
→ pictures → `compute_reward` → advantages → `optimize`: G/k optimizer steps with `policy_loss` on the trained
transitions, or on draws of finished pictures (V-GRPO).
scripts/finetune holds recipes. docs/algorithms.md gives each formula beside its flags. docs/deviations.md lists what
differs from the references on purpose.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Protocol

from fastvideo.cli import flag_errors, parse_dataclass, parse_first
from fastvideo.config import CURRENT, OLD_POLICY, REFERENCE, GRPOConfig, world_size_of_environment
from fastvideo.reference_flags import translate

if __name__ == "__main__":  # before the slow imports of torch and diffusers, so that --help answers at once
    parse_first(GRPOConfig, None, __doc__, translate)

from fastvideo.data_preprocess.preprocess_flux_embedding import embed_prompts
from fastvideo.dataset.latent_flux_rl_datasets import TENSORS, LatentFluxRLDataset, PromptSampler, read_ahead
from fastvideo.eval.live import live_report
from fastvideo.io.lock import FolderLock
from fastvideo.io.messages import is_first, warn
from fastvideo.io.processes import entry_point, stop_signals
from fastvideo.io.progress_line import ProgressLine, describe_iteration
from fastvideo.io.scores import reward_schema
from fastvideo.models.family import Conditioning, LatentShape
from fastvideo.models.pretrained import (
    check_lora_targets,
    check_sequence_split,
    decode_latents,
    family_of,
    load_vae,
    meta_transformer,
)
from fastvideo.models.reward_model.utils import check_custom_rewards
from fastvideo.models.speed import compile_decoder
from fastvideo.rollout_plan import describe, make_plan, optimizer_steps, scout_plan
from fastvideo.runtime.checkpoint import CheckpointWriter
from fastvideo.runtime.engines import Engine, build_engine, main_process_first
from fastvideo.runtime.evaluation import Evaluation, Sampling, build_held_out, takes_empty_prompt
from fastvideo.runtime.log import Log
from fastvideo.runtime.memory import predict_memory
from fastvideo.runtime.policies import Policies
from fastvideo.runtime.preflight import check_run
from fastvideo.runtime.resume import Progress, load_policies, load_trained, open_output
from fastvideo.runtime.rollout_drift import rollout_drift
from fastvideo.runtime.scoring import Scoring
from fastvideo.runtime.stopping import last_line, saving_on_error, why_stopped
from fastvideo.runtime.throughput import Throughput
from fastvideo.utils.advantages import plan_advantages
from fastvideo.utils.draws import ERRORS, Draws, make_draws, nft_loss, velocity_error
from fastvideo.utils.grpo_states import windows
from fastvideo.utils.plan import Plan
from fastvideo.utils.sampling_utils import (
    InParts,
    Noise,
    Velocity,
    gaussian_kl,
    log_prob,
    normalised_log_ratio,
    split_log_probs,
    to_device,
    transition_mean,
    transition_table,
)
from fastvideo.utils.scouting import Scouted
from fastvideo.utils.step_statistics import StepStatistics
from fastvideo.utils.transitions import Transition, deal_out, even_out

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from PIL import Image

# In bf16 on an H100, batches of 2 or more rows round alike. A batch of 1 row differs by as much as the clip range.
FEW_ROWS = 2

DRIFT = (
    "before the first update the probability ratio deviates from 1 by more than a tenth of --clip_range "
    "(ratio_first_deviation in metrics.jsonl): rollout and training round differently. Use --recompute_old_log_prob"
)


# --- rollout: the mixed ODE-SDE sampler -------------------------------------------------------------------------------


@dataclass
class Rollout:
    """Samples of a plan, and the states of its trained steps. The dict keys are positions in the plan."""

    latents: torch.Tensor  # [P·pictures, L, C] at σ = 0, sorted by prompt, then in the order of plan.leaves
    before: dict[int, torch.Tensor] = field(default_factory=dict)  # x, [P·rows, L, C]
    after: dict[int, torch.Tensor] = field(default_factory=dict)  # x', [P·rows·branch, L, C]
    means: dict[int, torch.Tensor] = field(default_factory=dict)  # mean of x' while sampling, as `after`
    log_probs: dict[int, torch.Tensor] = field(default_factory=dict)  # log p(x') while sampling, [P·rows·branch]

    @classmethod
    def join(cls, parts: Sequence["Rollout"]) -> "Rollout":
        """Joins rollouts of consecutive prompts into one."""
        names = ("before", "after", "means", "log_probs")
        by_position = ([getattr(part, name) for part in parts] for name in names)
        return cls(
            torch.cat([part.latents for part in parts]),
            *({position: torch.cat([d[position] for d in dicts]) for position in dicts[0]} for dicts in by_position),
        )


@torch.no_grad()
def rollout(
    plan: Plan,
    latents: torch.Tensor,
    prompts: int,
    velocity: Velocity,
    noise: Callable[[int, int], torch.Tensor],
    instead: Mapping[int, Velocity] | None = None,
) -> Rollout:
    """Executes a plan from noise to pictures.

    Args:
        latents: [P·plan.start, L, C] at σ = 1, sorted by prompt. prompts: P.
        noise: (stream, rows per prompt) -> standard normal [P·rows, L, C]; plan position i uses stream i + 1.
        instead: state, as the position of the step that leads to it (−1: noise) -> what replaces `velocity` there.
    """
    table, parents = transition_table(plan, latents.device), plan.parents
    result = Rollout(latents)
    states = {-1: (latents, ())}  # position -> (x after the step, latest x0 predictions on its path)
    velocities: dict[int, torch.Tensor] = {}
    for position, (step, numbers, parent) in enumerate(zip(plan, plan.coefficients, parents, strict=True)):
        x_weight, v_weight, std, sigma = table[position]
        latents, history = states[parent]
        rows = len(latents) // prompts
        if parent not in velocities:  # steps that start from one state share one velocity
            prompt_index = torch.arange(prompts, device=latents.device).repeat_interleave(rows)
            evaluate = (instead or {}).get(parent, velocity)
            velocities[parent] = evaluate(latents, sigma.expand(len(latents)), prompt_index)
        v = velocities[parent]
        if step.train:
            result.before[position] = latents
        history = (latents - sigma * v, *history[:2])
        if step.branch > 1:
            latents, v, *history = (x.repeat_interleave(step.branch, 0) for x in (latents, v, *history))
        mean = transition_mean(latents, v, x_weight, v_weight)
        for weight, x0 in zip(numbers.history, history[1:], strict=False):
            mean = mean + weight * x0
        latents = mean + std * noise(position + 1, rows * step.branch) if numbers.std else mean
        if step.train:
            result.after[position], result.means[position] = latents, mean
        if step.train or step.branch > 1:
            result.log_probs[position] = log_prob(latents, mean, std)
        states[position] = (latents, tuple(history))
        if parent not in parents[position + 1 :]:
            del states[parent], velocities[parent]
    pictures = [states[leaf][0].unflatten(0, (prompts, -1)) for leaf in plan.leaves]
    result.latents = torch.cat(pictures, 1).flatten(0, 1)
    return result


# --- loss -------------------------------------------------------------------------------------------------------------


def policy_loss(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    clip_range: float,
    kl_coeff: float,
    too_far: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped surrogate of each transition, max(−A·r, −A·clip(r, 1 ± ε)), plus kl_coeff · ½(log r)².

    Args:
        log_ratio: log p_new − log p_old, [N]. advantages: A, [N].
        too_far: [N], bool. Flow-DPPO (arXiv 2606.11025) clips nothing: the surrogate −A·r has no gradient where the
            transition is too far from the old policy's and the update would take it further.

    Returns:
        loss [N], and the parts `policy_loss`, `kl_loss`, `ratio`, `clip_high`, `clip_low`, `log_ratio`, each [N] and
        without gradient. clip_high, clip_low: 1 where r is above, below what clipping or `too_far` allows.
    """
    ratio = torch.exp(log_ratio)
    if too_far is None:
        surrogate = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))
        high, low = ratio > 1 + clip_range, ratio < 1 - clip_range
    else:
        high, low = too_far & (ratio > 1), too_far & (ratio < 1)
        stopped = (high & (advantages > 0)) | (low & (advantages < 0))
        surrogate = -advantages * torch.where(stopped, ratio.detach(), ratio)
    kl = 0.5 * log_ratio**2
    parts = {
        "policy_loss": surrogate,
        "kl_loss": kl,
        "ratio": ratio,
        "clip_high": high.float(),
        "clip_low": low.float(),
        "log_ratio": log_ratio,
    }
    return surrogate + kl_coeff * kl, {name: part.detach() for name, part in parts.items()}


class Objective(Protocol):
    """The loss of an algorithm, on micro-batches of N transitions. `velocity` is always the acting policy's."""

    # Policy (of runtime/policies.py) -> what is stored of it for every micro-batch before the first update.
    before_updates: dict[str, Callable[[list[Transition], Velocity], None]]

    def loss(self, batch: list[Transition], velocity: Velocity) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss [N] with gradient, and its parts without, each [N]."""


class StepsObjective:
    """Trains the denoising steps of a rollout: computes them again, with gradient."""

    def __init__(self, config: GRPOConfig, sampled: Rollout, table: torch.Tensor) -> None:
        self.config, self.sampled, self.table = config, sampled, table
        self.reference = {i: torch.empty_like(mean) for i, mean in sampled.means.items() if config.ref_kl_coeff}
        self.before_updates = {CURRENT: self.remember_log_probs} if config.recompute_old_log_prob else {}
        self.before_updates |= {REFERENCE: self.remember_reference} if config.ref_kl_coeff else {}

    def predict(self, batch: list[Transition], velocity: Velocity) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean [N, L, C] and std [N, 1, 1] of the transitions under the acting policy."""
        rows = list(dict.fromkeys((t.position, t.parent, t.prompt) for t in batch))
        place = {row[:2]: i for i, row in enumerate(rows)}
        device = self.table.device
        latents = torch.stack([self.sampled.before[position][parent] for position, parent, _ in rows])
        sigma = self.table[to_device([position for position, _, _ in rows], device), 3]
        v = velocity(latents, sigma, to_device([prompt for _, _, prompt in rows], device))
        leaving = to_device([place[t.position, t.parent] for t in batch], device)
        x_weight, v_weight, std = self.table[to_device([t.position for t in batch], device), :3, None, None].unbind(1)
        return transition_mean(latents[leaving], v[leaving], x_weight, v_weight), std

    def remember_log_probs(self, batch: list[Transition], velocity: Velocity) -> None:
        """Replaces what the rollout stored by what the current policy gives in training's micro-batches."""
        mean, std = self.predict(batch, velocity)
        store(batch, self.sampled.log_probs, log_prob(of_children(batch, self.sampled.after), mean, std))
        store(batch, self.sampled.means, mean)

    def remember_reference(self, batch: list[Transition], velocity: Velocity) -> None:
        store(batch, self.reference, self.predict(batch, velocity)[0])

    def loss(self, batch: list[Transition], velocity: Velocity) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config = self.config
        mean, std = self.predict(batch, velocity)
        after, old_mean = of_children(batch, self.sampled.after), of_children(batch, self.sampled.means)
        if config.ratio_norm:
            log_ratio = normalised_log_ratio(after, mean, old_mean, std)
        else:
            log_ratio = log_prob(after, mean, std) - of_children(batch, self.sampled.log_probs)
        by_divergence = config.trust_region == "divergence"
        too_far = gaussian_kl(mean.detach(), old_mean, std) >= config.divergence_limit if by_divergence else None
        advantages = to_device([t.advantage for t in batch], mean.device)
        loss, parts = policy_loss(log_ratio, advantages, config.clip_range, config.kl_coeff, too_far)
        if config.ref_kl_coeff:
            divergence = gaussian_kl(mean, of_children(batch, self.reference), std)
            loss, parts["ref_kl_loss"] = loss + config.ref_kl_coeff * divergence, divergence.detach()
        return loss, parts


class DrawsObjective:
    """Trains draws of time and noise on finished pictures, see utils/draws.py. A transition is a draw of a picture.

    V-GRPO and AWM: `policy_loss` with log r = ℓ_old − ℓ. DiffusionNFT: `nft_loss`; its ratio is only shown.
    """

    def __init__(self, config: GRPOConfig, drawn: Draws) -> None:
        self.config, self.drawn = config, drawn
        self.old_errors = {j: torch.empty_like(times) for j, times in drawn.times.items()}
        self.velocities = {  # of the policies that the loss compares with
            name: {j: torch.empty_like(flow) for j, flow in drawn.flows.items()}
            for name in {OLD_POLICY, REFERENCE}.intersection(config.copies)
        }
        self.before_updates = {name: partial(self.remember_velocity, name=name) for name in sorted(self.velocities)}
        self.before_updates |= {CURRENT: self.remember_errors} if config.algorithm != "diffusion_nft" else {}

    def predict(self, batch: list[Transition], velocity: Velocity) -> tuple[torch.Tensor, ...]:
        """v of the acting policy and f, both [N, L, C], and t [N]."""
        flow, times = of_children(batch, self.drawn.flows), of_children(batch, self.drawn.times)
        noisy = torch.stack([self.drawn.pictures[t.child] for t in batch]) + times[:, None, None] * flow
        return velocity(noisy, times, to_device([t.prompt for t in batch], noisy.device)), flow, times

    def remember_errors(self, batch: list[Transition], velocity: Velocity) -> None:
        store(batch, self.old_errors, ERRORS[self.config.algorithm](*self.predict(batch, velocity)))

    def remember_velocity(self, batch: list[Transition], velocity: Velocity, name: str) -> None:
        store(batch, self.velocities[name], self.predict(batch, velocity)[0])

    def loss(self, batch: list[Transition], velocity: Velocity) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        config, error = self.config, ERRORS[self.config.algorithm]
        v, flow, times = self.predict(batch, velocity)
        others = {name: of_children(batch, values) for name, values in self.velocities.items()}
        advantages = to_device([t.advantage for t in batch], v.device)
        if config.algorithm == "diffusion_nft":
            old = others[OLD_POLICY]
            log_ratio = (error(old, flow, times) - error(v, flow, times)).detach()
            _, parts = policy_loss(log_ratio, advantages, math.inf, 0.0)
            loss = nft_loss(v, old, flow, times, advantages, config.nft_beta, config.adv_clip_max)
            parts["policy_loss"] = loss.detach()
        else:
            log_ratio = of_children(batch, self.old_errors) - error(v, flow, times)
            loss, parts = policy_loss(log_ratio, advantages, config.clip_range, config.kl_coeff)
        held = {REFERENCE: ("ref_kl_loss", config.ref_kl_coeff)}
        held |= {OLD_POLICY: ("old_kl_loss", config.old_kl_coeff)} if config.algorithm == "awm" else {}
        for name, (part, weight) in held.items():
            if name in others:
                distance = velocity_error(v, others[name], times)
                loss, parts[part] = loss + weight * distance, distance.detach()
        return loss, parts


def of_children(batch: list[Transition], values: dict[int, torch.Tensor]) -> torch.Tensor:
    """The stored values of a micro-batch's N transitions: [N, ...]. values: as Rollout.after."""
    return torch.stack([values[t.position][t.child] for t in batch])


def store(batch: list[Transition], values: dict[int, torch.Tensor], found: torch.Tensor) -> None:
    """Stores [N, ...] values of a micro-batch's N transitions, without gradient, where `of_children` finds them."""
    for t, value in zip(batch, found.detach(), strict=True):
        values[t.position][t.child] = value


# --- one run ----------------------------------------------------------------------------------------------------------


class Trainer:
    """A run: its models, its optimizer and its progress. `iteration` does the work."""

    def __init__(self, config: GRPOConfig, engine: Engine, scoring: Scoring, checkpoint: Path | None) -> None:
        self.config, self.engine, self.scoring, self.accelerator = config, engine, scoring, engine.accelerator
        self.local_prompts = config.local_prompts(self.accelerator.num_processes)
        # Indices of this data rank's prompts among all prompts of an iteration.
        self.slots = range(engine.data_rank * self.local_prompts, (engine.data_rank + 1) * self.local_prompts)
        device, path = self.accelerator.device, config.pretrained_model_name_or_path
        transformer = load_trained(config, engine, checkpoint)
        self.vae = load_vae(path, engine.frozen_dtype).to(device, memory_format=torch.channels_last)
        if engine.compiled:
            compile_decoder(self.vae.decoder)
        self.shape = LatentShape.of(self.vae, config.h, config.w)
        self.family = engine.family
        self.image_ids = self.family.image_ids(self.shape, device)
        self.negative_prompt_embeds: torch.Tensor | None = None

        engine.prepare(transformer, {"lr": config.learning_rate, "weight_decay": config.weight_decay})
        self.steps_per_iteration = optimizer_steps(config)
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler,
            engine.raw_optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps * self.steps_per_iteration,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        self.policies = Policies(config, engine)
        self.writer = CheckpointWriter(engine, self.policies)
        self.throughput = Throughput(config, device, transformer)
        self.evaluation: Evaluation | None = None
        self.progress = Progress()
        self.unread = False  # whether the result of an optimizer step is still to be read
        if checkpoint is not None:
            self._resume(checkpoint)

    def _resume(self, checkpoint: Path) -> None:
        output = Path(self.config.output_dir)
        self.engine.load_optimizer(checkpoint / "optimizer")
        self.progress = Progress.of_checkpoint(checkpoint)
        if not self.engine.any_process(self.accelerator.is_main_process and self.progress.best_is_in(output)):
            self.progress.best = None  # a new --output_dir
        if self.progress.optimizer_steps:  # moves the schedule that the flags ask for to this optimizer step
            self.lr_scheduler._step_count = self.lr_scheduler.last_epoch = self.progress.optimizer_steps - 1
            self.lr_scheduler.step()
        load_policies(checkpoint, self.policies)

    def save(self, sampler: PromptSampler) -> None:
        """Starts to write checkpoint-{iterations done}-{epoch}."""
        done = self.progress.iteration
        if self.unread:  # an error came between two optimizer steps, which then are part of the checkpoint
            self._after_step(done + 1)
        self.writer.save(self.progress.record(sampler.epoch_of(done), sampler.position(done + 1), self.scoring.judge))

    # --- pictures ---------------------------------------------------------------------------------------------------

    def conditioning(self, batch: dict) -> Conditioning:
        """Prompt embeddings of a batch, on the device."""
        device, names = self.accelerator.device, self.family.embeddings
        tensors = {name: batch[name].to(device, torch.float32, non_blocking=True) for name in names}
        embeds, pooled, text_ids = map(tensors.get, TENSORS)
        return Conditioning(
            embeds,
            pooled,
            text_ids[0],
            self.image_ids,
            self.config.guidance_scale,
            negative_prompt_embeds=self.negative_prompt_embeds,
        )

    def velocity_of(self, model: torch.nn.Module, conditioning: Conditioning, training: bool = True) -> Velocity:
        """The velocity that a model predicts, with the same precision and autocast in rollout and training.

        training: whether numbers must round as in training. Batches of fewer than FEW_ROWS rows are then padded with
        copies of the last row, because kernels round small batches differently.
        """
        fills_up = training and (self.engine.compiled or self.accelerator.device.type == "cuda")
        few = min(FEW_ROWS, self.config.train_micro_batch_size) if fills_up else 0

        def velocity(latents: torch.Tensor, sigma: torch.Tensor, prompt_index: torch.Tensor) -> torch.Tensor:
            given = len(latents)
            if given < few:
                place = torch.arange(few, device=latents.device).clamp(max=given - 1)
                latents, sigma, prompt_index = latents[place], sigma[place], prompt_index[place]
            with self.accelerator.autocast(), self.engine.attention(training):
                v = self.family.velocity(model, latents, sigma, prompt_index, conditioning)
            return v[:given]

        return velocity

    def sample(
        self, plan: Plan, number: int, slots: range, conditioning: Conditioning, picks: np.ndarray | None = None
    ) -> Rollout:
        """The rollout of iteration `number` for the prompts in `slots`. picks: the samples' numbers, see Noise."""
        config, prompts, shape = self.config, len(slots), conditioning.shape or self.shape
        noise = Noise(config.seed, number, slots, shape, self.accelerator.device, picks)
        own = 1 if config.init_same_noise else plan.start
        latents = noise(0, own).repeat_interleave(plan.start // own, 0)
        size = config.rollout_batch_size or prompts * config.num_generations
        with self.engine.sampling_model() as model:
            plain = self.velocity_of(model, conditioning, training=False)
            plain = InParts(plain, size, timer=self.throughput.prefix.lap, prompts=prompts)
            # Trained steps round as in training, others may be in FP8.
            trained = InParts(self.velocity_of(model, conditioning), config.train_micro_batch_size, training=True)
            instead = dict.fromkeys(plan.trained_states, trained)
            instead |= dict.fromkeys(self.engine.float8_states(plan), self.engine.in_float8(plain))
            return rollout(plan, latents, prompts, plain, noise, instead)

    def decode(self, sampled: Rollout, batch_size: int) -> list[Image.Image]:
        """Decodes a rollout to pictures, `batch_size` pictures at a time."""
        return decode_latents(self.family, self.vae, sampled.latents, self.config.h, self.config.w, batch_size)

    def draw(self, plan: Plan, batch: dict, slot: int) -> list[Image.Image]:
        """Pictures of one prompt for an evaluation. Empty, except on the first process of a sequence group."""
        conditioning, size = self.evaluation.conditioning(self.conditioning(batch)), self.evaluation.sampling[:2]
        sampled = self.sample(plan, 0, range(slot, slot + 1), conditioning)  # training starts at 1
        if self.engine.place_in_group:
            return []
        return decode_latents(self.family, self.vae, sampled.latents, *size, 1)

    def evaluate(self, iteration: int) -> dict[str, float]:
        """Metrics of the evaluation after an iteration. Empty if none is due or the iteration did not train."""
        due = self.evaluation and iteration == self.progress.iteration and self.evaluation.due(iteration)
        return self.evaluation.run(iteration, self.draw, self.engine, self.progress) if due else {}

    # --- scores -----------------------------------------------------------------------------------------------------

    def score(
        self, pictures: list[Image.Image], batch: dict, part: slice, plan: Plan, number: int
    ) -> dict[str, np.ndarray]:
        """Scores of the pictures of P prompts, a part of the batch: name -> [P, pictures], NaN where failed."""
        per_prompt = plan.pictures
        captions, metadata = ([x for x in batch[k][part] for _ in range(per_prompt)] for k in ("caption", "metadata"))
        place = self.scoring.place(plan, len(captions) // per_prompt, number)
        scores = self.scoring.compute(pictures, captions, self.scoring.models, **place, metadata=metadata)
        return {name: v.reshape(-1, per_prompt) for name, v in scores.items()}

    def scout(self, number: int, conditioning: Conditioning, batch: dict) -> Scouted | None:
        """With --scouts: scores candidates of all prompts that are sampled in few steps, and picks those to train."""
        if (plan := scout_plan(self.config)) is None:
            return None
        with self.throughput.phase("scout"):
            _, _, scores = self.collect(plan, number, conditioning, batch)
        return Scouted.of(self.config, number, scores, self.scoring.advantage_weights(plan, number))

    def collect(
        self, plan: Plan, number: int, conditioning: Conditioning, batch: dict, picks: np.ndarray | None = None
    ) -> tuple[Rollout, list[Image.Image], dict[str, np.ndarray]]:
        """Rollout and pictures of this data rank (pictures on its first process), and scores of all ranks.

        Samples as many whole groups at a time as --rollout_batch_size holds. Scores them while it samples the next.
        """
        config, local, group = self.config, self.local_prompts, max(plan.rows)
        together = max(1, (config.rollout_batch_size or local * group) // group)
        parts, images, scored = [], [], []
        for begin in range(0, local, together):
            end = min(begin + together, local)
            with self.throughput.phase("rollout"):
                parts.append(self.sample(plan, number, self.slots[begin:end], conditioning.of(begin, end), picks))
            if self.engine.place_in_group:
                continue  # the first process of a sequence group decodes and scores
            with self.throughput.phase("decode"):
                pictures = self.decode(parts[-1], config.rollout_batch_size or config.num_generations)
            images += pictures
            scored.append(self.scoring.begin(self.score, pictures, batch, slice(begin, end), plan, number))
        with self.throughput.phase("reward"):  # the time that does not overlap with sampling
            scores = self.scoring.gather_arrays(scored)
        return Rollout.join(parts), images, scores

    # --- optimizer steps --------------------------------------------------------------------------------------------

    def optimize(
        self, plan: Plan, number: int, sampled: Rollout, advantages: dict[int, np.ndarray], conditioning: Conditioning
    ) -> dict[str, float]:
        """Takes the optimizer steps of an iteration (see `Plan.updates`). Returns the metrics of all ranks.

        advantages: plan position -> [P, rows after the step], all ranks.
        """
        config, accelerator = self.config, self.accelerator
        work = even_out(deal_out(config, plan, number, self.slots, advantages), accelerator.gather, accelerator.device)
        velocity = self.velocity_of(self.engine.model, conditioning)
        if plan.draws:
            noise = Noise(config.seed, number, self.slots, self.shape, accelerator.device)
            objective = DrawsObjective(config, make_draws(config, sampled.latents, len(plan) + 1, noise))
        else:
            objective = StepsObjective(config, sampled, transition_table(plan, accelerator.device))
        for policy, remember in objective.before_updates.items():
            with self.policies.acting(policy):
                for batch in chain.from_iterable(work):
                    with self.engine.micro_batch(last=False):
                        remember(batch, velocity)
        statistics, norms = StepStatistics(plan, self.steps_per_iteration, accelerator.device), []
        for place, batches in enumerate(work):
            step_loss = torch.zeros((), device=accelerator.device)
            for i, batch in enumerate(batches):
                weights = to_device([t.weight for t in batch], accelerator.device)
                with self.engine.micro_batch(last=i == len(batches) - 1):
                    loss, parts = objective.loss(batch, velocity)
                    self.engine.backward(loss @ weights)
                statistics.add(batch, weights, parts | {"loss": loss.detach()}, first=not place)
                step_loss += loss.detach() @ weights
            if place:  # reads the previous step's result only now, so that the GPU has work while the CPU waits
                norms.append(self._after_step(number))
            if self.progress.skipped_in_a_row >= config.max_skipped_steps:
                break
            self.engine.step(step_loss)
            self.unread = True
        else:
            norms.append(self._after_step(number))
        self.policies.after_iteration(number)
        taken = [norm for norm in norms if norm is not None]
        metrics = statistics.metrics(accelerator.gather)
        moved = metrics["ratio_first_deviation"] > config.clip_range / 10 and config.algorithm != "diffusion_nft"
        if accelerator.is_main_process and moved:
            warn(DRIFT)
        trained = {(i, t.position, t.parent) for i, step in enumerate(work) for t in chain(*step)}
        return metrics | {
            "grad_norm": float(np.mean(taken)) if taken else math.nan,
            "trained_rows": len(trained),
            "optimizer_steps": len(taken),
            "skipped_steps": len(norms) - len(taken),
            "lr": self.lr_scheduler.get_last_lr()[0],
        }

    def _after_step(self, number: int) -> float | None:
        """Updates schedule, counters and EMA after an optimizer step. Returns its gradient norm; None: skipped."""
        norm, self.unread = self.engine.gradient_norm(), False
        if norm is None:
            self.progress.skipped_in_a_row += 1
            return None
        self.lr_scheduler.step()
        self.progress.optimizer_steps += 1
        self.progress.skipped_in_a_row = 0
        self.policies.after_step(number)
        return norm

    # --- one iteration ----------------------------------------------------------------------------------------------

    def iteration(self, batch: dict, window: list[int]) -> tuple[dict, list[Image.Image]]:
        """Rollout, rewards, advantages, optimizer steps. Returns the metrics of all ranks and this rank's pictures."""
        config, progress, conditioning = self.config, self.progress, self.conditioning(batch)
        number = progress.iteration + 1
        plan = make_plan(config, window, number)
        self.throughput.begin()
        with self.policies.acting(config.sampling_policy):
            scouted = self.scout(number, conditioning, batch)
            given = (plan, number, conditioning, batch, scouted and scouted.picks)
            sampled, images, scores = self.collect(*given)
            drift = rollout_drift(self, given, sampled.latents, scores)
        looks = self.scoring.begin_looks(plan, images)
        weights = self.scoring.advantage_weights(plan, number)
        weighted = config.tree_fusion == "probability"  # BranchGRPO's inner nodes weigh their leaves by probability
        splits = split_log_probs(plan, sampled.log_probs, self.engine.gather) if weighted else {}
        advantages, flat = plan_advantages(config, plan, scores, weights, splits)
        reward_metrics = self.scoring.metrics(plan, scores, number, scouted)
        failures, scored = self.scoring.failures(reward_metrics)
        too_many = config.max_reward_failures is not None and failures > config.max_reward_failures
        if not scored and self.accelerator.is_main_process:
            warn(f"iteration {number}: all {failures} scores failed; nothing is trained")
        with self.throughput.phase("train"):
            if scored and not too_many:
                metrics = self.optimize(plan, number, sampled, advantages, conditioning)
            else:  # all scores failed on all ranks, or too many
                progress.skipped_in_a_row += self.steps_per_iteration
                metrics = {"optimizer_steps": 0, "skipped_steps": self.steps_per_iteration}
        reward_metrics |= self.scoring.looks(looks)
        progress.too_many_failures = too_many
        progress.iteration = number - too_many  # a resumed run repeats an iteration with too many failed scores
        tokens, trained_rows = (len(self.image_ids), len(conditioning.text_ids)), metrics.pop("trained_rows", 0)
        prompts = self.local_prompts * self.engine.data_ranks
        metrics |= {
            "step": number,
            "images": prompts * plan.pictures,
            "nfe": prompts * (plan.evaluations + config.scouts * config.scout_steps),
            **plan.metrics(),
            "zero_spread_groups": flat,
        }
        speed = self.throughput.metrics(tokens, self.local_prompts * plan.evaluations, trained_rows)
        return metrics | reward_metrics | drift | speed, images


# --- command line -----------------------------------------------------------------------------------------------------


def set_up(config: GRPOConfig, lock: FolderLock | None = None) -> tuple[Trainer, PromptSampler, Iterator[dict]]:
    """Builds the trainer and its data. Everything that bad input can break happens here, the cheap checks first.

    lock: of --output_dir; the first process takes it. None: no other program can want the folder.
    """
    transformer = meta_transformer(config.pretrained_model_name_or_path)
    widths = family_of(config.pretrained_model_name_or_path).widths(transformer)

    def cached(index: str | Path) -> LatentFluxRLDataset:
        return LatentFluxRLDataset(index, config.cfg, config.sampler_seed, widths)

    dataset = cached(config.data_json_path) if config.data_json_path else None
    if config.use_lora:
        check_lora_targets(transformer, config.lora_target_modules)
    if config.train_micro_batch_size is None:
        config = replace(config, train_micro_batch_size=predict_memory(config, world_size_of_environment())["rows"])
    engine = build_engine(config, world_size_of_environment())
    accelerator, config = engine.accelerator, engine.config
    checkpoint = main_process_first(accelerator, lambda: open_output(config, accelerator.num_processes, lock))

    def embed(flag: str, folder: str) -> Path:
        return embed_prompts(
            config.pretrained_model_name_or_path,
            getattr(config, flag),
            Path(config.output_dir) / folder,
            device=str(accelerator.device),
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            prompts_flag=flag,
            prompt_column=config.prompt_column,
        )

    # Before prompts are embedded, because a reward model that can't be downloaded ends the run.
    scoring = Scoring(config, accelerator.device)
    held_out = build_held_out(config, accelerator.device, scoring)
    if dataset is None:
        dataset = cached(embed("prompts_file", "rl_embeddings"))
    judged = None
    if config.eval_split is not None:
        dataset, judged = dataset.split(config.eval_split)
    elif config.eval_steps:
        judged = LatentFluxRLDataset(embed("eval_prompts", "eval_embeddings"))
    if config.sp_size > 1:
        text_tokens = len(dataset[0]["prompt_embeds"])
        for size in {(config.h, config.w), Sampling.of(config)[:2]}:
            check_sequence_split(config.pretrained_model_name_or_path, *size, text_tokens, config.sp_size)
    trainer = Trainer(config, engine, scoring, checkpoint)
    if takes_empty_prompt(config):
        trainer.negative_prompt_embeds = dataset.negative_prompt_embeds.to(accelerator.device, torch.float32)
    if judged is not None:
        trainer.evaluation = Evaluation(config, judged, scoring, held_out, trainer.vae)
    sampler = PromptSampler(
        len(dataset),
        trainer.local_prompts * engine.data_ranks,
        engine.data_rank,
        engine.data_ranks,
        config.sampler_seed,
        start_iteration=trainer.progress.iteration + 1,
        prompts_before=trainer.progress.prompts,
        weights=dataset.weights,
    )
    return trainer, sampler, read_ahead(dataset, sampler, config.dataloader_num_workers, accelerator.device)


def train(trainer: Trainer, sampler: PromptSampler, batches: Iterator[dict]) -> None:
    """Runs iterations and writes metrics, pictures and checkpoints, until exactly max_train_steps.

    Raises:
        TrainingStopped, Interrupted: see `why_stopped`. A checkpoint is saved first.
        IterationFailed: after any other error. A checkpoint is saved first if possible.
        CheckpointNotWritten: for instance, the disk is full.
    """
    config, progress, main_process = trainer.config, trainer.progress, trainer.accelerator.is_main_process
    if (done := progress.iteration) >= config.max_train_steps:  # the folder keeps the settings of what it holds
        if main_process:
            print(f"nothing to do: {done} of --max_train_steps {config.max_train_steps} iterations are done")
        return
    held_out = trainer.evaluation.models if trainer.evaluation else {}
    names = reward_schema(held_out | trainer.scoring.models, trainer.scoring.weights)
    log = Log(config, progress.wandb_id, progress.iteration, names) if main_process else None
    schedule = islice(windows(config), progress.iteration, config.max_train_steps)
    line = ProgressLine("training", config.max_train_steps, progress.iteration, main_process)

    def save() -> None:
        trainer.save(sampler)
        trainer.writer.finish()

    rescue = saving_on_error(progress, save, trainer.accelerator.num_processes == 1)
    with closing(log) if log else nullcontext(), line, stop_signals() as asked, trainer.writer.thread, rescue:
        before = trainer.evaluate(0)  # the model before training
        if log is not None and before:
            log.write({"step": 0} | before)
        evaluated = before.get("evaluation_reward")
        for window, batch in zip(schedule, batches, strict=False):
            metrics, images = trainer.iteration(batch, window)
            try:
                metrics |= trainer.evaluate(metrics["step"])
            finally:
                if log is not None:
                    log.write(metrics | {"epoch": sampler.epoch_of(metrics["step"])})
            if log is not None and config.image_log_steps and metrics["step"] % config.image_log_steps == 0:
                log.write_images(metrics["step"], images[: config.num_generations], batch["caption"][0])
            evaluated = metrics.get("evaluation_reward", evaluated)
            line.show(metrics["step"], describe_iteration(metrics, evaluated))
            # A checkpoint that can't be written ends the run too, at the latest when the next checkpoint starts.
            interrupted = trainer.engine.any_process(bool(asked) or trainer.writer.failed)
            reason = why_stopped(config, progress, metrics, asked, interrupted)
            ends = interrupted or reason is not None or progress.iteration == config.max_train_steps
            best = progress.best is not None and progress.best["iteration"] == progress.iteration
            if ends or best or progress.iteration % config.checkpointing_steps == 0:
                trainer.save(sampler)
            if ends:
                trainer.writer.finish()
            if reason is not None:
                raise reason


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Bad input prints one line and exits with status 2; a stopped run, with status 1."""
    run(parse_dataclass(GRPOConfig, argv, __doc__, translate))


def run(config: GRPOConfig) -> None:
    """A whole run. It may also be called from Python: `run(GRPOConfig.create(algorithm="awm", prompts_file=...))`.

    Raises:
        SystemExit: as the command line, after a line on stderr that says why.
    """
    with flag_errors("train_grpo_flux.py"), ExitStack() as held:
        for field in [name for name in ("reward_model", "eval_reward") if getattr(config, name) is not None]:
            check_custom_rewards(config.held_out() if field == "eval_reward" else config, field)
        world_size = world_size_of_environment()
        text = describe(config, world_size)
        if not config.dry_run:  # which shows the plan even if something is missing
            check_run(config, world_size)
        if is_first():
            print(text, flush=True)
        if config.dry_run:
            return check_run(config, world_size)
        live = live_report(config.output_dir, config.serve_report)
        parts = set_up(config, held.enter_context(FolderLock("output_dir", config.output_dir)))
        held = held.pop_all()  # the lock lasts until the run ends
    with last_line("train_grpo_flux.py", config.output_dir), held, live:
        train(*parts)


if __name__ == "__main__":
    entry_point(main)
