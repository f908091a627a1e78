"""Float32 computations that rollout and training share: a transition's mean and density, and the noise."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from fastvideo.models.family import LatentShape
from fastvideo.utils.plan import Plan

import numpy as np
import torch

# v = velocity(x [N, L, C], σ [N], prompt index [N])
Velocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def transition_mean(latents: torch.Tensor, velocity: torch.Tensor, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Mean of a step without history. latents, velocity: [N, L, C]. x, v: coefficients, [N, 1, 1] or scalars."""
    return x * latents + v * velocity


def log_prob(sample: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Gaussian log-density of `sample`, averaged over all elements of a row: [N]. std broadcasts against mean.

    Clip ranges are about 1e-4 because this is the mean over elements, not the sum.
    """
    density = -((sample - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def normalised_log_ratio(
    sample: torch.Tensor, mean: torch.Tensor, old_mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """GRPO-Guard's log r̂ = s·(log r + mean(Δμ²)/(2s²)) = mean(ε·Δμ), [N] (arXiv 2510.22319), Δμ = μ − μ_old.

    log r itself is mean(ε·Δμ)/s − mean(Δμ²)/(2s²). So its mean lies below 0, and its spread depends on the step.

    Args:
        sample: x' = μ_old + s·ε. mean, old_mean: μ, μ_old, all [N, L, C]. std: s, [N, 1, 1].
    """
    return ((sample - old_mean) / std * (mean - old_mean)).mean(dim=(1, 2))


def gaussian_kl(mean: torch.Tensor, reference: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """KL divergence [N] of a transition from another model's: mean((μ − μ_ref)²) / (2 std²), equal std.

    mean, reference: [N, L, C]. std: [N, 1, 1]. The mean is over elements, as in `log_prob`.
    """
    return ((mean - reference) ** 2 / (2 * std**2)).mean(dim=(1, 2))


def split_log_probs(
    plan: Plan, log_probs: dict[int, torch.Tensor], gather: Callable[[torch.Tensor], torch.Tensor]
) -> dict[int, np.ndarray]:
    """For every split: rows per prompt before the split -> log-probabilities [P, rows after the split], all ranks.

    Args:
        log_probs: plan position -> [P·rows] of this rank. gather: puts the rows of all ranks together.
    """
    found = {}
    for position, (step, rows) in enumerate(zip(plan, plan.rows, strict=True)):
        if step.branch > 1:
            own = log_probs[position].reshape(-1, rows)
            found[rows // step.branch] = gather(own).double().cpu().numpy()
    return found


def transition_table(plan: Plan, device: torch.device) -> torch.Tensor:
    """Coefficients of x and v, std and σ of each step, float32 [steps, 4]. Rollout and training share this table."""
    rows = [(c.x, c.v, c.std, step.sigma) for c, step in zip(plan.coefficients, plan, strict=True)]
    return torch.tensor(rows, dtype=torch.float32, device=device)


def to_device(values: Sequence[float] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """The numbers as a tensor on `device`. Unlike a plain copy, the CPU doesn't wait for the GPU."""
    tensor = torch.as_tensor(values)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


@dataclass(frozen=True)
class Noise:
    """Standard normal noise that depends only on (seed, iteration, prompt slot, sample, stream).

    Attributes:
        slots: indices of the prompts among the prompts of all processes. shape: of the latents. device: of the result.
        samples: numbers of the samples, [prompts of all processes, rows of a prompt]. None: 0, 1, 2, …
    """

    seed: int
    iteration: int
    slots: Sequence[int]
    shape: LatentShape
    device: torch.device = torch.device("cpu")
    samples: np.ndarray | None = None

    def __call__(self, stream: int, rows: int) -> torch.Tensor:
        """Noise [prompts · rows, L, C]. Stream 0 is the initial noise; plan position i uses stream i + 1.

        Each row has its own generator on the CPU, so the numbers don't depend on rank, world size, micro-batch or
        device.
        """
        noise = torch.empty(len(self.slots) * rows, self.shape.tokens, self.shape.channels)
        for i, row in enumerate(noise):
            slot, place = self.slots[i // rows], i % rows
            sample = place if self.samples is None else int(self.samples[slot, place])
            key = np.random.SeedSequence([self.seed, self.iteration, slot, sample, stream, 0])
            row.normal_(generator=torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0]) >> 1))
        return to_device(noise, self.device)


@dataclass(frozen=True)
class InParts:
    """Computes a velocity in parts of equal length, at most `size` rows each.

    training: whether autograd records the calls; numbers then round as in training.
    timer: rows -> context that times a call; used for calls that have one row per prompt. prompts: number of prompts.
    """

    velocity: Velocity
    size: int
    training: bool = False
    timer: Callable[[int], AbstractContextManager] | None = None
    prompts: int = 0

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor, prompt_index: torch.Tensor) -> torch.Tensor:
        rows = len(latents)
        count = math.ceil(rows / self.size)
        timed = self.timer is not None and rows == self.prompts
        with torch.set_grad_enabled(self.training), self.timer(rows) if timed else nullcontext():
            parts = zip(*(x.tensor_split(count) for x in (latents, sigma, prompt_index)), strict=True)
            return torch.cat([self.velocity(*part).detach() for part in parts])
