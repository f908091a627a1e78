"""Every algorithm as data: a planner turns the settings and the window into a tuple of Steps; one sampler executes it.

Steps form a tree: each starts from the result of an earlier one, by default of the one before it. A step's `branch`
gives every row several successors; several steps with one `parent` share that state and one velocity evaluation. A step
that no other one starts from is a leaf and ends in pictures. Two things hold for all algorithms: a trained transition's
advantage is its pictures' score compared with those of the other rows of its step; and trained steps on one path are
updated together, those on different paths (E-GRPO's) one after the other.

A new algorithm is a new planner here, its flags in config.py and a recipe in scripts/finetune.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from fastvideo.config import MERGES, GRPOConfig
from fastvideo.models.reward_model.utils import resolve_reward_spec
from fastvideo.utils.grpo_states import windows
from fastvideo.utils.sampling_utils import (
    KINDS,
    STOCHASTIC_KINDS,
    ancestors,
    coefficients,
    entropy,
    shift_time,
    sigma_schedule,
)

import numpy as np


@dataclass(frozen=True)
class Step:
    """One transition of a rollout, from noise level sigma to sigma_next.

    branch: how many successors every row gets, each with its own noise. train: whether the policy loss covers it.
    sigma_max: σ_1 of the base schedule, which stands in for σ where 1 − σ would be 0.
    parent: position in the plan of the step it starts from, −1: the initial noise, None: the step before.
    span: steps of the base schedule that it covers.
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


Plan = tuple[Step, ...]


def parents(plan: Plan) -> list[int]:
    """The position that each step starts from, −1 for the initial noise."""
    return [i - 1 if step.parent is None else step.parent for i, step in enumerate(plan)]


def check_plan(plan: Plan) -> Plan:
    """The plan itself, if it can be executed and trained.

    Raises:
        ValueError: steps that leave a gap, don't run from 1 to 0, train or branch without noise, or train nothing.
    """
    for i, (step, parent) in enumerate(zip(plan, parents(plan), strict=True)):
        if not -1 <= parent < i:
            raise ValueError(f"step {step.index} at position {i} starts from position {parent}, which comes later")
        if parent == -1 and step.sigma != 1:
            raise ValueError(f"a plan runs from sigma 1 to 0, this one from {step.sigma}")
        if parent >= 0 and plan[parent].sigma_next != step.sigma:
            raise ValueError(
                f"step {plan[parent].index} ends at sigma {plan[parent].sigma_next}, the next starts at {step.sigma}"
            )
        if step.kind not in KINDS:
            raise ValueError(f"step {step.index}: unknown kind {step.kind!r}; choose from {list(KINDS)}")
        if step.sigma <= step.sigma_next:
            raise ValueError(f"step {step.index}: sigma must fall, not go from {step.sigma} to {step.sigma_next}")
    for leaf in leaves(plan):
        if plan[leaf].sigma_next != 0:
            raise ValueError(f"a plan runs from sigma 1 to 0, this one to {plan[leaf].sigma_next}")
    for step, numbers in zip(plan, coefficients(plan), strict=True):
        if (step.train or step.branch > 1) and not numbers.std > 0:
            raise ValueError(f"step {step.index} ({step.kind}) has no noise: it can be neither trained nor branched")
    if not any(step.train for step in plan):
        raise ValueError("the plan trains no step")
    return plan


# --- planners ---------------------------------------------------------------------------------------------------------


def _base_step(config: GRPOConfig, first: int, last: int, stochastic: bool, **more) -> Step:
    """From noise level `first` to `last` of the full schedule: a trained step of `sde_type`, or Euler."""
    sigmas = sigma_schedule(config.sampling_steps, config.shift)
    kind = {"flow": "flow_sde", "dance": "dance_sde", "cps": "cps"}[config.sde_type]
    given = {"kind": kind, "eta": config.eta, "train": True} if stochastic else {"kind": "ode"}
    return Step(first, sigmas[first], sigmas[last], sigmas[1], span=last - first, **{**given, **more})


def _base_steps(config: GRPOConfig, stochastic: Sequence[int]) -> list[Step]:
    """The full schedule: `sde_type` steps, all trained, at the indices `stochastic`, Euler elsewhere."""
    return [_base_step(config, i, i + 1, i in stochastic) for i in range(config.sampling_steps)]


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
    """DanceGRPO and Flow-GRPO: noise at every step; the last is not trained, with drop_last_sample it gives x0.

    Flow-GRPO-Fast (`flow_grpo_fast_steps`) makes noise only in a window drawn at random.
    """
    if config.flow_grpo_fast_steps:
        return plan_mix(config, window)
    trained = config.frozen_init_timesteps or config.sampling_steps - 1
    last = config.sampling_steps - 1
    steps = [replace(s, train=s.index < trained) for s in _base_steps(config, range(last + 1))]
    return [*steps[:last], _base_step(config, last, last + 1, not config.drop_last_sample, train=False)]


def merged_steps(config: GRPOConfig) -> list[Step]:
    """E-GRPO's stochastic steps (arXiv 2601.00423): the active ones, each over as many of the schedule as it takes.

    Without `eta_step_list` the first half is active. A step whose e^h is not above `entropy_threshold` is merged with
    as few of the following ones as bring it there; one that can't be brought there is left out. `eta_step_merge_list`
    overrides, and Granular-GRPO doesn't merge.

    Raises:
        ValueError: no step is left.
    """
    active = config.eta_step_list or list(range(config.sampling_steps // 2))
    merges = [1] * len(active) if config.algorithm == "granular_grpo" else config.eta_step_merge_list
    found = []
    for number, first in enumerate(active):
        lasts = [first + merges[number]] if merges else range(first + 1, config.sampling_steps)
        steps = (_base_step(config, first, last, True) for last in lasts)
        enough = (s for s in steps if merges or entropy(coefficients((s,))[0].std) > config.entropy_threshold)
        found += [step for step in [next(enough, None)] if step is not None]
    if not found:
        raise ValueError(f"--entropy_threshold {config.entropy_threshold}: no step and no merge has an e^h above it")
    return found


def plan_merge(config: GRPOConfig, window: Sequence[int]) -> list[Step]:
    """E-GRPO and Granular-GRPO: one ODE run a prompt, the anchor; from its state at every active step G samples take
    one stochastic step, then the ODE from there, once for each stride of `granular_list`. Every tail ends at σ = 0.
    """
    steps = _base_steps(config, ())
    for active in merged_steps(config):
        noisy, end = len(steps), active.index + active.span
        branch = config.num_generations // start_rows(config)
        steps.append(replace(active, branch=branch, parent=active.index - 1))
        for stride in config.granular_list:
            parent = noisy
            for first in range(end, config.sampling_steps, stride):
                last = min(first + stride, config.sampling_steps)
                steps.append(_base_step(config, first, last, False, parent=parent))
                parent = len(steps) - 1
    return steps


def plan_branch(config: GRPOConfig, window: Sequence[int]) -> list[Step]:
    """BranchGRPO: as DanceGRPO, but a tree: every row splits at `tree_split_points`, where noise is scaled. The mixed
    variant makes noise only at the splits and in the window. Before the first split there is nothing to compare.
    """
    noisy = set(range(config.sampling_steps))
    if config.algorithm == "branch_grpo_mix":
        noisy = {*config.tree_split_points, *window}
    splits = {"branch": config.tree_split_children, "noise_scale": config.tree_split_noise_scale}
    return [
        replace(
            step,
            train=step.train and step.index >= config.tree_split_points[0],
            **(splits if step.index in config.tree_split_points else {}),
        )
        if step.index in noisy
        else _base_step(config, step.index, step.index + 1, False)
        for step in plan_all(config, window)
    ]


PLANNERS: dict[str, Callable[[GRPOConfig, Sequence[int]], list[Step]]] = {
    "mix_grpo": plan_mix,
    "mix_grpo_flash": plan_flash,
    "mix_grpo_flash_star": plan_flash,
    "flow_grpo": plan_all,
    "dance_grpo": plan_all,
    "dance_grpo_lora": plan_all,
    "grpo_merge": plan_merge,
    "granular_grpo": plan_merge,
    "branch_grpo": plan_branch,
    "branch_grpo_mix": plan_branch,
}


def pruned_depths(config: GRPOConfig, iteration: int) -> set[int]:
    """BranchGRPO's depth pruning: depths (steps from the root) not trained in iteration `iteration`, from 1.

    The set moves one shallower every `depth_pruning_slide_interval` iterations until its shallowest depth is
    `depth_pruning_stop_depth`.
    """
    if not config.depth_pruning:
        return set()
    interval, room = config.depth_pruning_slide_interval, min(config.depth_pruning) - config.depth_pruning_stop_depth
    shift = min((iteration - 1) // interval, max(room, 0)) if interval else 0
    return {depth - shift for depth in config.depth_pruning}


def make_plan(config: GRPOConfig, window: Sequence[int], iteration: int = 1) -> Plan:
    """The checked plan of one iteration. With shared noise and `share_prefix` the group splits at the first noisy step:
    everything before it, and the velocity there, is the same for all samples of a prompt.
    """
    steps = PLANNERS[config.algorithm](config, window)
    if start_rows(config) < config.num_generations and all(step.branch == 1 for step in steps):
        first = next(i for i, step in enumerate(steps) if step.kind in STOCHASTIC_KINDS)
        steps[first] = replace(steps[first], branch=config.num_generations)
    pruned = pruned_depths(config, iteration)
    return check_plan(tuple(replace(s, train=s.train and s.index + 1 not in pruned) for s in steps))


# --- what a plan amounts to -------------------------------------------------------------------------------------------


def start_rows(config: GRPOConfig) -> int:
    """Trajectories a prompt starts with: one where all samples share their beginning, else the whole group."""
    return 1 if config.init_same_noise and config.share_prefix else config.num_generations


def rows_after(plan: Plan, start: int) -> list[int]:
    """Rows a prompt has after every step, with `start` of them at first."""
    rows: list[int] = []
    for step, parent in zip(plan, parents(plan), strict=True):
        rows.append((rows[parent] if parent >= 0 else start) * step.branch)
    return rows


def trained_above(plan: Plan, position: int) -> list[int]:
    """Positions of the trained steps on the path from the start to `position`, which may be one of them."""
    return [i for i in [*ancestors(plan, position)[::-1], position] if plan[i].train]


def leaves(plan: Plan) -> list[int]:
    """Positions of the steps that end in pictures, in the pictures' order; those that train nothing (anchors) last."""
    followed = set(parents(plan))
    found = [i for i in range(len(plan)) if i not in followed]
    return sorted(found, key=lambda leaf: not trained_above(plan, leaf))


def leaf_columns(plan: Plan, start: int) -> dict[int, slice]:
    """Where each leaf's pictures lie among a prompt's."""
    rows, found, end = rows_after(plan, start), {}, 0
    for leaf in leaves(plan):
        found[leaf] = slice(end, end + rows[leaf])
        end += rows[leaf]
    return found


def group_places(plan: Plan, config: GRPOConfig) -> np.ndarray:
    """The place of each of a prompt's pictures in its group, from 0 to below G."""
    sizes = [columns.stop - columns.start for columns in leaf_columns(plan, start_rows(config)).values()]
    return np.concatenate([np.arange(size) * config.num_generations / size for size in sizes])


def updates(plan: Plan, samples: int, k: int) -> list[tuple[slice, list[int]]]:
    """The optimizer steps of an iteration: which of a group's samples, and which positions, each trains.

    k samples at a time. Trained steps on one path go together; those on different paths have steps of their own.
    """
    paths: dict[int, list[int]] = {}
    for position, step in enumerate(plan):
        if step.train:
            paths.setdefault(trained_above(plan, position)[0], []).append(position)
    return [(slice(s, s + k), positions) for positions in paths.values() for s in range(0, samples, k)]


def function_evaluations(plan: Plan, start: int) -> int:
    """Velocity evaluations (rows × states that steps start from) a prompt costs in the rollout, NFE."""
    rows = rows_after(plan, start)
    return sum(rows[parent] if parent >= 0 else start for parent in set(parents(plan)))


def evaluations_without_sharing(plan: Plan, start: int) -> int:
    """NFE if every picture were made on its own."""
    rows = rows_after(plan, start)
    return sum(rows[leaf] * (len(ancestors(plan, leaf)) + 1) for leaf in leaves(plan))


def entropies(plan: Plan) -> list[float]:
    """e^h of every trained step."""
    return [entropy(numbers.std) for step, numbers in zip(plan, coefficients(plan), strict=True) if step.train]


def describe_plan(plan: Plan, start: int) -> str:
    """One line a step: index, sigmas, kind, rows a prompt, and what happens there."""
    lines, rows = [], rows_after(plan, start)
    for i, (step, parent, numbers) in enumerate(zip(plan, parents(plan), coefficients(plan), strict=True)):
        notes = [f"std {numbers.std:.4f}, e^h {entropy(numbers.std):.2f}"] if numbers.std else []
        notes += [f"covers {step.span} steps"] if step.span > 1 else []
        notes += [f"splits into {step.branch}"] if step.branch > 1 else []
        notes += ["trained"] if step.train else []
        kind = f"{step.kind} order {step.order}" if step.kind == "dpmpp" else step.kind
        origin = "" if parent == i - 1 else f"  (from the state before step {step.index}, line {parent + 1})"
        lines.append(
            f"  {step.index:3d}  {step.sigma:.4f} -> {step.sigma_next:.4f}  {kind:<14} "
            f"rows {rows[parent] if parent >= 0 else start:3d}  " + ", ".join(notes) + origin
        )
    return "\n".join(lines)


def optimizer_steps(config: GRPOConfig) -> int:
    """Optimizer steps an iteration, the same in every window."""
    plan = make_plan(config, next(windows(config)))
    return len(updates(plan, config.num_generations, config.gradient_accumulation_steps))


def describe(config: GRPOConfig, world_size: int) -> str:
    """The derived arithmetic, reward weights and the first window's plan. Every window is checked on the way.

    Raises:
        ValueError: a window can't be planned, or the prompts don't divide among the processes.
    """
    prompts = config.local_prompts(world_size) * config.data_ranks(world_size)
    start, k = start_rows(config), config.gradient_accumulation_steps
    schedule = list(islice(windows(config), config.max_train_steps))
    plans = [make_plan(config, window, number) for number, window in enumerate(schedule, start=1)]
    nfe = [function_evaluations(plan, start) for plan in plans]
    first, steps = plans[0], optimizer_steps(config)
    pictures = max(columns.stop for columns in leaf_columns(first, start).values())
    trained = [step.index for step in first if step.train]
    wanted = config.eta_step_list or range(config.sampling_steps // 2) if config.algorithm in MERGES else ()
    left_out = [
        f"step {e} is inactive: no merge brings its e^h above --entropy_threshold {config.entropy_threshold}"
        for e in wanted
        if e not in trained
    ]
    return "\n".join(
        [
            f"{config.algorithm}: {prompts} prompts x {pictures} samples = {prompts * pictures} images an iteration on "
            f"{world_size} process(es)" + (f", {config.sp_size} to a picture" if config.sp_size > 1 else ""),
            f"rewards: {', '.join(f'{name} {weight:.4g}' for name, weight in resolve_reward_spec(config).items())}",
            f"{steps} optimizer steps an iteration, each on {k} samples a prompt, "
            f"in {config.max_train_steps} iterations: {config.max_train_steps * steps} optimizer steps",
            f"velocity evaluations (NFE) a prompt and iteration: {min(nfe)} to {max(nfe)}, mean {np.mean(nfe):.1f} "
            f"(without sharing {evaluations_without_sharing(first, start)})",
            *left_out,
            f"plan of the first window {trained}:",
            describe_plan(first, start),
        ]
    )
