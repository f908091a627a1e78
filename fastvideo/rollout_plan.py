"""Every algorithm as data: a planner turns the settings and the window into a tuple of Steps; one sampler executes it.

A new algorithm is a new planner here, its flags in config.py and a recipe in scripts/finetune.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastvideo.config import GRPOConfig
from fastvideo.utils.sampling_utils import KINDS, STOCHASTIC_KINDS, coefficients, shift_time, sigma_schedule


@dataclass(frozen=True)
class Step:
    """One transition of a rollout, from noise level sigma to sigma_next.

    branch: how many successors every row gets, each with its own noise. train: whether the policy loss covers it.
    sigma_max: σ_1 of the base schedule, which stands in for σ where 1 − σ would be 0.
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


Plan = tuple[Step, ...]


def check_plan(plan: Plan) -> Plan:
    """The plan itself, if it can be executed and trained.

    Raises:
        ValueError: steps that leave a gap, don't run from 1 to 0, train or branch without noise, or train nothing.
    """
    sigmas = [step.sigma for step in plan] + [plan[-1].sigma_next]
    if sigmas[0] != 1 or sigmas[-1] != 0:
        raise ValueError(f"a plan runs from sigma 1 to 0, this one from {sigmas[0]} to {sigmas[-1]}")
    for step, following in zip(plan, plan[1:], strict=False):
        if step.sigma_next != following.sigma:
            raise ValueError(f"step {step.index} ends at sigma {step.sigma_next}, the next starts at {following.sigma}")
    for step in plan:
        if step.kind not in KINDS:
            raise ValueError(f"step {step.index}: unknown kind {step.kind!r}; choose from {list(KINDS)}")
        if step.sigma <= step.sigma_next:
            raise ValueError(f"step {step.index}: sigma must fall, not go from {step.sigma} to {step.sigma_next}")
    for step, numbers in zip(plan, coefficients(plan), strict=True):
        if (step.train or step.branch > 1) and not numbers.std > 0:
            raise ValueError(f"step {step.index} ({step.kind}) has no noise: it can be neither trained nor branched")
    if not any(step.train for step in plan):
        raise ValueError("the plan trains no step")
    return plan


def _base_steps(config: GRPOConfig, stochastic: Sequence[int]) -> list[Step]:
    """The full schedule: `sde_type` steps, all trained, at the indices `stochastic`, Euler elsewhere."""
    sigmas = sigma_schedule(config.sampling_steps, config.shift)
    kind = {"flow": "flow_sde", "dance": "dance_sde", "cps": "cps"}[config.sde_type]
    return [
        Step(i, sigmas[i], sigmas[i + 1], sigmas[1], kind, config.eta, train=True)
        if i in stochastic
        else Step(i, sigmas[i], sigmas[i + 1], sigmas[1], "ode")
        for i in range(config.sampling_steps)
    ]


def plan_mix(config: GRPOConfig, window: Sequence[int]) -> list[Step]:
    """MixGRPO (arXiv 2507.21802): noise only inside the window."""
    return _base_steps(config, window)


def plan_flash(config: GRPOConfig, window: Sequence[int]) -> list[Step]:
    """MixGRPO-Flash: past the window's last step r, DPM-Solver++ on max(⌊(T−r)·ratio⌋, 2) points from t_{r+1} to 0."""
    last, steps = window[-1], config.sampling_steps
    head = _base_steps(config, window)[: last + 1]
    points = max(int((steps - last) * config.dpm_post_compress_ratio), 2)
    start = 1 - (last + 1) / steps
    sigmas = [shift_time(start * (1 - i / (points - 1)), config.shift) for i in range(points)]
    sigmas[0] = head[-1].sigma_next
    tail = []
    for i in range(points - 1):
        # First order into σ=0, where λ is infinite; at most second order just before; never more than there is history.
        order = min(config.dpm_solver_order, points - 1 - i, len(head) + i + 1)
        tail.append(
            Step(
                len(head) + i,
                sigmas[i],
                sigmas[i + 1],
                head[0].sigma_max,
                "dpmpp",
                order=order,
                solver_type=config.dpm_solver_type,
            )
        )
    return head + tail


def plan_all(config: GRPOConfig, window: Sequence[int]) -> list[Step]:
    """DanceGRPO and Flow-GRPO: noise at every step; the last is not trained, with drop_last_sample it gives x0."""
    steps = _base_steps(config, range(config.sampling_steps))
    last = steps[-1]
    kind = "ode" if config.drop_last_sample else last.kind
    trained = config.frozen_init_timesteps or config.sampling_steps - 1
    return [
        *(
            Step(s.index, s.sigma, s.sigma_next, s.sigma_max, s.kind, s.eta, train=s.index < trained)
            for s in steps[:-1]
        ),
        Step(last.index, last.sigma, last.sigma_next, last.sigma_max, kind, last.eta),
    ]


PLANNERS: dict[str, Callable[[GRPOConfig, Sequence[int]], list[Step]]] = {
    "mix_grpo": plan_mix,
    "mix_grpo_flash": plan_flash,
    "mix_grpo_flash_star": plan_flash,
    "flow_grpo": plan_all,
    "dance_grpo": plan_all,
}


def make_plan(config: GRPOConfig, window: Sequence[int]) -> Plan:
    """The checked plan of one iteration. With shared noise and `share_prefix` the group splits at the first noisy step:
    everything before it, and the velocity there, is the same for all samples of a prompt.
    """
    steps = PLANNERS[config.algorithm](config, window)
    if config.init_same_noise and config.share_prefix:
        first = next(i for i, step in enumerate(steps) if step.kind in STOCHASTIC_KINDS)
        fields = {**steps[first].__dict__, "branch": config.num_generations}
        steps[first] = Step(**fields)
    return check_plan(tuple(steps))


def rows_per_prompt(plan: Plan, start: int) -> list[int]:
    """Rows a prompt has at the start of every step and after the last one, with `start` of them at first."""
    rows = [start]
    for step in plan:
        rows.append(rows[-1] * step.branch)
    return rows


def start_rows(config: GRPOConfig) -> int:
    """Trajectories a prompt starts with: one where all samples share their beginning, else the whole group."""
    return 1 if config.init_same_noise and config.share_prefix else config.num_generations


def function_evaluations(plan: Plan, start: int) -> int:
    """Velocity evaluations (rows × steps) a prompt costs in the rollout, NFE."""
    return sum(rows_per_prompt(plan, start)[:-1])


def describe_plan(plan: Plan, start: int) -> str:
    """One line a step: index, sigmas, kind, rows a prompt, and what happens there."""
    lines = []
    for step, rows, numbers in zip(plan, rows_per_prompt(plan, start), coefficients(plan), strict=False):
        notes = [f"std {numbers.std:.4f}"] if numbers.std else []
        notes += [f"splits into {step.branch}"] if step.branch > 1 else []
        notes += ["trained"] if step.train else []
        kind = f"{step.kind} order {step.order}" if step.kind == "dpmpp" else step.kind
        lines.append(
            f"  {step.index:3d}  {step.sigma:.4f} -> {step.sigma_next:.4f}  {kind:<14} rows {rows:3d}  "
            + ", ".join(notes)
        )
    return "\n".join(lines)
