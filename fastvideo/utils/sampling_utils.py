"""The transition maths: what one step x_i → x_j of a rollout plan does, and the density of its outcome.

The transformer predicts the velocity v at noise level σ; x0 = x − σ·v. Every kind of step has a mean that is linear in
x, v and earlier x0 predictions, so a step is a handful of numbers, computed once in double precision; rollout and
training apply the same numbers with the same operations in float32, which is what makes the first ratio exactly 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from fastvideo.models.flux import LatentShape
    from fastvideo.rollout_plan import Plan, Step


def shift_time(t: float, shift: float) -> float:
    """σ of the unshifted time t (1 noise, 0 data): σ = s·t / (1 + (s − 1)·t)."""
    return shift * t / (1 + (shift - 1) * t)


def sigma_schedule(num_steps: int, shift: float) -> list[float]:
    """num_steps + 1 noise levels from 1 to 0."""
    return [shift_time(1 - i / num_steps, shift) for i in range(num_steps + 1)]


@dataclass(frozen=True)
class Coefficients:
    """mean = x·latents + v·velocity + Σ_n history[n]·(x0 prediction of n + 1 steps ago); std 0: no noise."""

    x: float
    v: float
    std: float = 0.0
    history: tuple[float, ...] = ()


def _ode(step: "Step") -> Coefficients:
    """Euler on the probability-flow ODE."""
    return Coefficients(1.0, step.sigma_next - step.sigma)


def _flow_sde(step: "Step") -> Coefficients:
    """Flow-GRPO, arXiv 2505.05470, with a = η·√(σ/(1−σ)); at σ=1 that denominator uses the schedule's next level."""
    sigma, delta = step.sigma, step.sigma - step.sigma_next
    a = step.eta * math.sqrt(sigma / (1 - (step.sigma_max if sigma == 1 else sigma)))
    correction = a * a * delta / (2 * sigma)
    return Coefficients(1 - correction, -delta - correction * (1 - sigma), a * math.sqrt(delta))


def _dance_sde(step: "Step") -> Coefficients:
    """DanceGRPO, arXiv 2505.07818: Euler plus ½η²Δ·score, with score = −(x + (1−σ)·v)/σ."""
    sigma, delta = step.sigma, step.sigma - step.sigma_next
    correction = step.eta**2 * delta / (2 * sigma)
    return Coefficients(1 - correction, -delta - correction * (1 - sigma), step.eta * math.sqrt(delta))


def _cps(step: "Step") -> Coefficients:
    """Coefficients-preserving sampling (MixGRPO v7): x0 and predicted noise recombined, a share sin(ηπ/2) renewed."""
    sigma, std = step.sigma, step.sigma_next * math.sin(step.eta * math.pi / 2) * step.noise_scale
    kept = math.sqrt(step.sigma_next**2 - std**2)
    return Coefficients(1 - step.sigma_next + kept, -sigma * (1 - step.sigma_next) + kept * (1 - sigma), std)


def _log_snr(sigma: float) -> float:
    """λ = log((1−σ)/σ)."""
    return math.inf if sigma == 0 else -math.inf if sigma == 1 else math.log((1 - sigma) / sigma)


def _dpmpp(step: "Step", earlier_sigmas: list[float]) -> Coefficients:
    """DPM-Solver++ multistep, arXiv 2211.01095, on x0 predictions m0 (now), m1, m2 (`earlier_sigmas`, latest first).

    A λ of ±∞ (σ of 0 or 1) needs no special case: the differences that it divides vanish.
    """
    target, now = _log_snr(step.sigma_next), _log_snr(step.sigma)
    h = target - now
    alpha, decay = 1 - step.sigma_next, math.exp(-h) - 1
    first = -alpha * decay  # weight of D0 = m0 in all orders
    weights = [first, 0.0, 0.0]
    if step.order >= 2:
        gap1 = now - _log_snr(earlier_sigmas[0])
        d1 = h / gap1  # D1 = (m0 − m1)·h/gap1
    if step.order == 2:
        second = -0.5 * alpha * decay if step.solver_type == "midpoint" else alpha * (decay / h + 1)
        weights[0] += second * d1
        weights[1] -= second * d1
    elif step.order == 3:
        gap2 = _log_snr(earlier_sigmas[0]) - _log_snr(earlier_sigmas[1])
        d2 = h / gap2  # of (m1 − m2)
        share = 0.0 if math.isinf(gap2) else gap1 / (gap1 + gap2)
        scale = 0.0 if math.isinf(gap2) else h / (gap1 + gap2)
        second, third = alpha * (decay / h + 1), -alpha * ((decay + h) / h**2 - 0.5)
        # D1 = D1_0 + share·(D1_0 − D1_1), D2 = scale·(D1_0 − D1_1) with D1_0 = d1·(m0 − m1), D1_1 = d2·(m1 − m2)
        on_d10 = second * (1 + share) + third * scale
        on_d11 = -(second * share + third * scale)
        weights[0] += on_d10 * d1
        weights[1] += -on_d10 * d1 + on_d11 * d2
        weights[2] -= on_d11 * d2
    # m0 = x − σ·v
    x = (step.sigma_next / step.sigma) + weights[0]
    return Coefficients(x, -step.sigma * weights[0], 0.0, tuple(weights[1 : step.order]))


_KINDS = {"ode": _ode, "flow_sde": _flow_sde, "dance_sde": _dance_sde, "cps": _cps}
STOCHASTIC_KINDS = ("flow_sde", "dance_sde", "cps")
KINDS = (*_KINDS, "dpmpp")


def ancestors(plan: tuple["Step", ...], position: int) -> list[int]:
    """Positions of the steps that lead to the step at `position`, latest first. −1 would be the plan's start."""
    found = []
    while (position := position - 1 if plan[position].parent is None else plan[position].parent) >= 0:
        found.append(position)
    return found


def coefficients(plan: tuple["Step", ...]) -> list[Coefficients]:
    """The numbers of every step of a plan.

    `noise_scale` multiplies the standard deviation; cps then keeps less of the predicted noise, and its noise level.
    """
    found = []
    for i, step in enumerate(plan):
        if step.kind == "dpmpp":
            found.append(_dpmpp(step, [plan[earlier].sigma for earlier in ancestors(plan, i)]))
        else:
            c = _KINDS[step.kind](step)
            found.append(c if step.kind == "cps" else replace(c, std=c.std * step.noise_scale))
    return found


def entropy(std: float) -> float:
    """e^h of a stochastic step per dimension, √(2πe)·std (E-GRPO, arXiv 2601.00423)."""
    return math.sqrt(2 * math.pi * math.e) * std


def transition_mean(latents: torch.Tensor, velocity: torch.Tensor, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Mean of a step without history. latents, velocity: [N, L, C]; x, v: their coefficients, [N, 1, 1] or scalars."""
    return x * latents + v * velocity


def log_prob(sample: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Gaussian log-density of `sample`, its mean over all elements but the batch's: [N]. std broadcasts against mean.

    The mean, not the sum, over elements is why clip ranges are about 1e-4.
    """
    density = -((sample - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return density.flatten(1).mean(1)


def transition_table(plan: "Plan", device: torch.device) -> torch.Tensor:
    """Coefficients of x and v, std and σ of each step, [steps, 4]: the float32 numbers rollout and training share."""
    rows = [(c.x, c.v, c.std, step.sigma) for c, step in zip(coefficients(plan), plan, strict=True)]
    return torch.tensor(rows, dtype=torch.float32, device=device)


def draw_noise(
    seed: int, iteration: int, slots: Sequence[int], rows: int, step: int, shape: "LatentShape"
) -> torch.Tensor:
    """Standard normal noise [prompts · rows, L, C], a function of (seed, iteration, prompt slot, row, step) alone.

    One generator a row, on the CPU: the numbers depend neither on rank, world size and micro-batch nor on the device.
    """
    noise = torch.empty(len(slots) * rows, shape.tokens, shape.channels)
    for i, row in enumerate(noise):
        key = np.random.SeedSequence([seed, iteration, slots[i // rows], i % rows, step, 0])
        row.normal_(generator=torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0]) >> 1))
    return noise
