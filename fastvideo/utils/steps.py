"""Steps of a rollout and the kinds of transition: the coefficients of one step from noise level σ to σ'.

The transformer predicts the velocity v at noise level σ, and x0 = x − σ·v is the predicted picture. Δ = σ − σ'. Every
kind has a mean that is linear in x, v and earlier x0 predictions. So a few coefficients describe a step. They are
computed once in double precision. Rollout and training share them, so the first probability ratio is exactly 1.

A new kind is a function here and an entry in KINDS: `--sde_type`, the planners and the tests of all kinds follow.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def shift_time(t: float, shift: float) -> float:
    """Noise level of the unshifted time t (1: noise, 0: data): σ = s·t / (1 + (s − 1)·t)."""
    return shift * t / (1 + (shift - 1) * t)


def sigma_schedule(num_steps: int, shift: float) -> list[float]:
    """num_steps + 1 noise levels from 1 to 0."""
    return [shift_time(1 - i / num_steps, shift) for i in range(num_steps + 1)]


@dataclass(frozen=True)
class Step:
    """One transition of a rollout, from noise level sigma to sigma_next.

    branch: number of successors per row, each with its own noise. train: whether the policy loss covers the step.
    sigma_max: σ_1 of the base schedule; replaces σ where 1 − σ would be 0.
    parent: plan position of the step whose result this step starts from; −1: the initial noise; None: the step before.
    span: number of base-schedule steps that this step covers.
    """

    index: int
    sigma: float
    sigma_next: float
    sigma_max: float
    kind: str
    eta: float = 0.0
    branch: int = 1
    train: bool = False
    noise_scale: float = 1.0
    order: int = 1  # dpmpp only
    solver_type: str = "midpoint"  # dpmpp of order 2 only
    parent: int | None = None
    span: int = 1


@dataclass(frozen=True)
class Coefficients:
    """mean = x·latents + v·velocity + Σ_n history[n]·(x0 prediction of n + 1 steps ago); std 0: no noise."""

    x: float
    v: float
    std: float = 0.0
    history: tuple[float, ...] = ()


def ode(step: Step, earlier: Sequence[float]) -> Coefficients:
    """Euler step on the probability-flow ODE: mean = x − Δ·v."""
    return Coefficients(1.0, step.sigma_next - step.sigma)


def _with_score(step: Step, a: float) -> Coefficients:
    """mean = x − Δ·v + ½a²Δ·score with score = −(x + (1−σ)·v)/σ, std = noise_scale·a·√Δ."""
    sigma, delta = step.sigma, step.sigma - step.sigma_next
    correction = a * a * delta / (2 * sigma)
    std = a * math.sqrt(delta) * step.noise_scale
    return Coefficients(1 - correction, -delta - correction * (1 - sigma), std)


def flow_sde(step: Step, earlier: Sequence[float]) -> Coefficients:
    """Flow-GRPO, arXiv 2505.05470: mean = x·(1 − a²Δ/2σ) − v·Δ·(1 + a²(1−σ)/2σ), std = a·√Δ, a = η·√(σ/(1−σ)).

    At σ = 1 the denominator of `a` uses the schedule's next level.
    """
    sigma = step.sigma
    return _with_score(step, step.eta * math.sqrt(sigma / (1 - (step.sigma_max if sigma == 1 else sigma))))


def dance_sde(step: Step, earlier: Sequence[float]) -> Coefficients:
    """DanceGRPO, arXiv 2505.07818: mean = x − Δ·v + ½η²Δ·score, score = −(x − (1−σ)·x0)/σ², std = η·√Δ."""
    return _with_score(step, step.eta)


def cps(step: Step, earlier: Sequence[float]) -> Coefficients:
    """Coefficients-preserving sampling (MixGRPO v7): mean = (1−σ')·x0 + √(σ'²−s²)·(x + (1−σ)·v), s = σ'·sin(ηπ/2).

    noise_scale multiplies s. The coefficient of the noise stays σ', because the predicted noise shrinks as s grows. The
    marginal distribution isn't kept: pictures vary less than the data, because x0 is a mean of possible pictures.
    """
    return _keeping_the_noise_level(step, step.sigma_next * math.sin(step.eta * math.pi / 2))


def _keeping_the_noise_level(step: Step, std: float) -> Coefficients:
    """mean = (1−σ')·x0 + √(σ'²−s²)·(x + (1−σ)·v) with s = noise_scale·std.

    Raises ValueError if s exceeds σ'.
    """
    sigma, target, std = step.sigma, step.sigma_next, std * step.noise_scale
    if std > target:
        raise ValueError(f"step {step.index}: noise of {std:.4g} is more than the noise level {target:.4g} behind it")
    kept = math.sqrt(target**2 - std**2)
    return Coefficients(1 - target + kept, -sigma * (1 - target) + kept * (1 - sigma), std)


def precise(step: Step, earlier: Sequence[float]) -> Coefficients:
    """Precise SDE, arXiv 2605.23522: `cps` with s = σ'·√(1 − ρ^(η²)), ρ = σ'(1−σ)/(σ(1−σ')).

    ρ is the ratio of the two signal-to-noise ratios, so a longer step has more noise: E-GRPO can merge with it. From
    σ = 1 (ρ = 0) the step draws all of its noise anew, whatever η is. To σ' = 0 it has none.
    """
    sigma, target = step.sigma, step.sigma_next
    rho = target * (1 - sigma) / (sigma * (1 - target))
    return _keeping_the_noise_level(step, target * math.sqrt(1 - rho ** (step.eta**2)))


def _log_snr(sigma: float) -> float:
    """λ = log((1−σ)/σ)."""
    return math.inf if sigma == 0 else -math.inf if sigma == 1 else math.log((1 - sigma) / sigma)


def dpmpp(step: Step, earlier: Sequence[float]) -> Coefficients:
    """DPM-Solver++ multistep, arXiv 2211.01095, on x0 predictions m0 (now), m1, m2. With h = λ' − λ and α = 1 − σ':

    order 1: mean = (σ'/σ)·x − α·(e^−h − 1)·m0
    order 2: the same, and −½·α·(e^−h − 1)·D1 (midpoint) or α·((e^−h − 1)/h + 1)·D1 (heun), D1 = (m0 − m1)·h/(λ − λ_1)
    order 3: the same with heun's D1, and −α·((e^−h − 1 + h)/h² − ½)·D2

    A λ of ±∞ (σ of 0 or 1) needs no special case: the differences divided by it vanish.
    """
    target, now = _log_snr(step.sigma_next), _log_snr(step.sigma)
    h = target - now
    alpha, decay = 1 - step.sigma_next, math.exp(-h) - 1
    first = -alpha * decay  # weight of D0 = m0 in all orders
    weights = [first, 0.0, 0.0]
    if step.order >= 2:
        gap1 = now - _log_snr(earlier[0])
        d1 = h / gap1  # D1 = (m0 − m1)·h/gap1
    if step.order == 2:
        second = -0.5 * alpha * decay if step.solver_type == "midpoint" else alpha * (decay / h + 1)
        weights[0] += second * d1
        weights[1] -= second * d1
    elif step.order == 3:
        gap2 = _log_snr(earlier[0]) - _log_snr(earlier[1])
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


@dataclass(frozen=True)
class Kind:
    """A kind of transition.

    coefficients: (step, noise levels σ of the earlier steps on its path, latest first) -> coefficients of the step.
    sde_type: name in `--sde_type`. None: the kind has no noise, so it can't be trained.
    """

    coefficients: Callable[[Step, Sequence[float]], Coefficients]
    sde_type: str | None = None


KINDS = {
    "ode": Kind(ode),
    "flow_sde": Kind(flow_sde, "flow"),
    "dance_sde": Kind(dance_sde, "dance"),
    "cps": Kind(cps, "cps"),
    "precise": Kind(precise, "precise"),
    "dpmpp": Kind(dpmpp),
}
SDE_KINDS = {kind.sde_type: name for name, kind in KINDS.items() if kind.sde_type}  # --sde_type -> kind


# Weight of a trained step's loss, before it is normalised to mean 1 over the trained steps: `--step_weights`.
STEP_WEIGHTS: dict[str, Callable[[Coefficients], float]] = {
    "equal": lambda step: 1.0,
    "velocity": lambda step: 1 / abs(step.v),  # GRPO-Guard, arXiv 2510.22319: ∂μ/∂v is the coefficient of v
    "noise": lambda step: step.std,  # TempFlow-GRPO, arXiv 2508.04324
}


def entropy(std: float) -> float:
    """e^h = √(2πe)·std of a stochastic step, where h is the entropy per dimension (E-GRPO, arXiv 2601.00423)."""
    return math.sqrt(2 * math.pi * math.e) * std
