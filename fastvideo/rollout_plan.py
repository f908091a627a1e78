"""Every algorithm as data: a planner turns the settings and the window into a list of Steps; one sampler executes them.

Two rules hold for all algorithms. The advantage of a trained transition compares the score of its pictures with the
scores of the other rows of its step. Trained steps on one path share an optimizer step; trained steps on different
paths (E-GRPO's) take one optimizer step after the other. Only a tree's optimizer steps share its transitions at random.

A new algorithm is a planner here with an entry in PLANNERS, an entry in config.py's ALGORITHMS with the flags that it
reads, and a recipe in scripts/finetune. A planner gets (config, window, rng): the window of the iteration, and a random
generator seeded with (seed, iteration), so that all processes draw the same numbers.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

from fastvideo.cli import FlagError
from fastvideo.config import DRAWN, MERGES, OLD_POLICY, REFERENCE, TREES, GRPOConfig
from fastvideo.io.words import counted
from fastvideo.models.reward_model.spec import REWARDS, resolve_reward_spec
from fastvideo.utils.grpo_states import window_counts, windows
from fastvideo.utils.plan import Plan
from fastvideo.utils.steps import KINDS, SDE_KINDS, Step, entropy, shift_time, sigma_schedule

import numpy as np

SAMPLE = 1000  # iterations that stand for all in `describe`, where plans are drawn at random

Planner = Callable[[GRPOConfig, Sequence[int], np.random.Generator], list[Step]]


def start_rows(config: GRPOConfig) -> int:
    """Rows per prompt at the start: 1 if all samples share the first steps, else num_generations."""
    return 1 if config.init_same_noise and config.share_prefix else config.num_generations


# --- planners ---------------------------------------------------------------------------------------------------------


def _base_step(config: GRPOConfig, first: int, last: int, stochastic: bool, **more) -> Step:
    """A step from noise level `first` to `last` of the full schedule: a trained step of `sde_type`, or Euler."""
    sigmas = sigma_schedule(config.sampling_steps, config.shift)
    noisy = {"kind": SDE_KINDS[config.sde_type], "eta": config.eta, "train": True}
    given = noisy if stochastic else {"kind": "ode"}
    return Step(first, sigmas[first], sigmas[last], sigmas[1], span=last - first, **{**given, **more})


def _base_steps(config: GRPOConfig, stochastic: Sequence[int]) -> list[Step]:
    """The full schedule: trained `sde_type` steps at the indices `stochastic`, Euler steps elsewhere."""
    return [_base_step(config, i, i + 1, i in stochastic) for i in range(config.sampling_steps)]


def plan_mix(config: GRPOConfig, window: Sequence[int], rng: np.random.Generator) -> list[Step]:
    """MixGRPO (arXiv 2507.21802): noise only inside the window."""
    return _base_steps(config, window)


def plan_flash(config: GRPOConfig, window: Sequence[int], rng: np.random.Generator) -> list[Step]:
    """MixGRPO-Flash: after the window's last step r, DPM-Solver++ on max(⌊(T−r)·ratio⌋, 2) points from t_{r+1} to 0."""
    last, steps = window[-1], config.sampling_steps
    head = _base_steps(config, window)[: last + 1]
    points = max(int((steps - last) * config.dpm_post_compress_ratio), 2)
    start = 1 - (last + 1) / steps
    sigmas = [shift_time(start * (1 - i / (points - 1)), config.shift) for i in range(points)]
    sigmas[0] = head[-1].sigma_next
    tail = []
    for i in range(points - 1):
        # The last step has order 1 (λ is infinite at σ = 0), the step before at most 2. History limits the order too.
        order = min(config.dpm_solver_order, points - 1 - i, len(head) + i + 1)
        tail.append(_dpm_step(config, len(head) + i, sigmas[i], sigmas[i + 1], order))
    return head + tail


def _dpm_step(config: GRPOConfig, index: int, sigma: float, sigma_next: float, order: int) -> Step:
    sigma_max = sigma_schedule(config.sampling_steps, config.shift)[1]
    return Step(index, sigma, sigma_next, sigma_max, "dpmpp", order=order, solver_type=config.dpm_solver_type)


def plan_without_noise(config: GRPOConfig, window: Sequence[int], rng: np.random.Generator) -> list[Step]:
    """Likelihood-free algorithms train finished pictures, so all steps are Euler's, or DPM-Solver++'s if asked for."""
    if config.dpm_algorithm_type is None:
        return _base_steps(config, ())
    return _solver_steps(config, config.sampling_steps)


def _solver_steps(config: GRPOConfig, count: int) -> list[Step]:
    """The way from noise to picture in `count` DPM-Solver++ steps."""
    sigmas = sigma_schedule(count, config.shift)
    orders = [min(config.dpm_solver_order, i + 1, count - i) for i in range(count)]
    return [_dpm_step(config, i, sigmas[i], sigmas[i + 1], order) for i, order in enumerate(orders)]


def scout_plan(config: GRPOConfig) -> Plan | None:
    """Scouting (Sol-RL, arXiv 2604.06916): few noise-free steps for `scouts` candidates per prompt. None without it."""
    return Plan(tuple(_solver_steps(config, config.scout_steps)), config.scouts) if config.scouts else None


def fast_start(config: GRPOConfig, rng: np.random.Generator) -> int:
    """Flow-GRPO-Fast's first stochastic step."""
    return int(rng.integers(0, config.sampling_steps - 2 - config.flow_grpo_fast_steps + 1))


def plan_all(config: GRPOConfig, window: Sequence[int], rng: np.random.Generator) -> list[Step]:
    """DanceGRPO and Flow-GRPO: noise at every step. The last step is not trained. With drop_last_sample it is Euler.

    Flow-GRPO-Fast adds noise only in `flow_grpo_fast_steps` consecutive steps, drawn at random from 0 … T−3.
    """
    if size := config.flow_grpo_fast_steps:
        start = fast_start(config, rng)
        return _base_steps(config, range(start, start + size))
    trained = config.frozen_init_timesteps or config.sampling_steps - 1
    last = config.sampling_steps - 1
    steps = [replace(s, train=s.index < trained) for s in _base_steps(config, range(last + 1))]
    return [*steps[:last], _base_step(config, last, last + 1, not config.drop_last_sample, train=False)]


def merged_steps(config: GRPOConfig) -> list[Step]:
    """E-GRPO's stochastic steps (arXiv 2601.00423). A stochastic step may merge several steps of the schedule.

    The active steps are `eta_step_list`, or the first half of the schedule. Each merges with as few following steps as
    bring its e^h above `entropy_threshold`. A step that no merge brings above it is left out. `eta_step_merge_list`
    sets the merges directly. Granular-GRPO doesn't merge.

    Raises:
        FlagError: all steps are left out.
    """
    active = config.eta_step_list or list(range(config.sampling_steps // 2))
    merges = [1] * len(active) if config.algorithm == "granular_grpo" else config.eta_step_merge_list
    found = []
    for number, first in enumerate(active):
        lasts = [first + merges[number]] if merges else range(first + 1, config.sampling_steps)
        steps = (_base_step(config, first, last, True) for last in lasts)
        stds = ((step, KINDS[step.kind].coefficients(step, ()).std) for step in steps)
        enough = (step for step, std in stds if merges or entropy(std) > config.entropy_threshold)
        found += [step for step in [next(enough, None)] if step is not None]
    if not found:
        raise FlagError("entropy_threshold", config.entropy_threshold, "no step and no merge has an e^h above it")
    return found


def plan_merge(config: GRPOConfig, window: Sequence[int], rng: np.random.Generator) -> list[Step]:
    """E-GRPO and Granular-GRPO: one ODE run per prompt, the anchor. At every active step, G samples leave the anchor by
    one stochastic step. Each then follows the ODE to σ = 0, once per stride of `granular_list`.
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


def plan_branch(config: GRPOConfig, window: Sequence[int], rng: np.random.Generator) -> list[Step]:
    """BranchGRPO: DanceGRPO on a tree. Every row splits at `tree_split_points`, where the noise is scaled. The mixed
    variant adds noise only at the splits and in the window. Steps before the first split are not trained.
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
        for step in plan_all(config, window, rng)
    ]


PLANNERS: dict[str, Planner] = {
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
    **dict.fromkeys(DRAWN, plan_without_noise),
}


def pruned_depths(config: GRPOConfig, iteration: int) -> set[int]:
    """BranchGRPO's depth pruning: the depths (steps from the root) that iteration `iteration` (1, 2, …) does not train.

    All depths decrease by 1 every `depth_pruning_slide_interval` iterations, until the smallest is
    `depth_pruning_stop_depth`.
    """
    if not config.depth_pruning:
        return set()
    interval, room = config.depth_pruning_slide_interval, min(config.depth_pruning) - config.depth_pruning_stop_depth
    shift = min((iteration - 1) // interval, max(room, 0)) if interval else 0
    return {depth - shift for depth in config.depth_pruning}


def tree_parts(config: GRPOConfig) -> int:
    """Optimizer steps per iteration of a tree: one per `gradient_accumulation_steps` edges of a prompt.

    Counts the edges without pruning and without a window, so that the number is the same in every iteration.
    """
    tree = Plan(tuple(plan_branch(config, (), np.random.default_rng(config.seed))))
    return math.ceil(sum(tree.rows[position] for position in tree.trained) / config.gradient_accumulation_steps)


def make_plan(config: GRPOConfig, window: Sequence[int], iteration: int = 1) -> Plan:
    """The checked plan of one iteration. With shared noise and `share_prefix` the group splits at the first noisy step,
    because all samples of a prompt have the same states and velocities up to there.

    Raises:
        FlagError: the settings make no plan that can be trained, see Plan.check.
    """
    steps = PLANNERS[config.algorithm](config, window, np.random.default_rng([config.seed, iteration]))
    if start_rows(config) < config.num_generations and all(step.branch == 1 for step in steps):
        first = next(i for i, step in enumerate(steps) if KINDS[step.kind].sde_type)
        steps[first] = replace(steps[first], branch=config.num_generations)
    pruned = pruned_depths(config, iteration)
    steps = [replace(step, train=step.train and step.index + 1 not in pruned) for step in steps]
    parts = tree_parts(config) if config.algorithm in TREES else None
    draws = config.draws if config.algorithm in DRAWN else 0
    try:
        plan = Plan(tuple(steps), start_rows(config), parts, draws).check()
    except ValueError as error:
        raise FlagError("algorithm", config.algorithm, str(error)) from error
    draws_steps = config.training_strategy == "all" and not config.frozen_init_timesteps and not draws
    if draws_steps and int(len(plan.trained) * config.timestep_fraction) < 1:
        problem = f"leaves no step of {len(plan.trained)} to train"
        raise FlagError("timestep_fraction", config.timestep_fraction, problem)
    return plan


# --- description of a run ---------------------------------------------------------------------------------------------


def optimizer_steps(config: GRPOConfig) -> int:
    """Optimizer steps per iteration, the same in every window."""
    plan = make_plan(config, next(windows(config)))
    return plan.optimizer_steps(config.num_generations, config.gradient_accumulation_steps)


def plans_of_run(config: GRPOConfig) -> list[tuple[Plan, int]]:
    """The different plans of a run, each with its number of iterations. Takes no longer for more iterations.

    Where windows or steps are drawn at random, the first SAMPLE iterations stand for all.

    Raises:
        FlagError: an iteration can't be planned.
    """
    fast, most = bool(config.flow_grpo_fast_steps), config.max_train_steps
    if fast or config.sample_strategy == "random":
        drawn = enumerate(islice(windows(config), min(most, SAMPLE)), start=1)
        occasions = [(window, number, 1) for number, window in drawn]
    else:
        occasions = [
            (window, first, iterations)
            for first, last in _pruning_phases(config)
            for window, iterations in window_counts(config, first, last)
        ]
    plans: dict[object, Plan] = {}
    counts: Counter[object] = Counter()
    for window, number, iterations in occasions:
        start = fast_start(config, np.random.default_rng([config.seed, number])) if fast else 0
        key = (tuple(window), frozenset(pruned_depths(config, number)), start)
        if key not in plans:
            plans[key] = make_plan(config, window, number)
        counts[key] += iterations
    return [(plan, counts[key]) for key, plan in plans.items()]


def _pruning_phases(config: GRPOConfig) -> list[tuple[int, int]]:
    """(first, last) of consecutive iterations that prune the same depths, until --max_train_steps."""
    most, interval = config.max_train_steps, config.depth_pruning_slide_interval
    moves = max(min(config.depth_pruning) - config.depth_pruning_stop_depth, 0) if config.depth_pruning else 0
    firsts = [1 + interval * move for move in range(moves + 1 if interval else 1) if interval * move < most]
    return list(zip(firsts, [*(first - 1 for first in firsts[1:]), most], strict=True))


def float8_states(config: GRPOConfig, plan: Plan) -> set[int]:
    """States of the plan whose velocities are computed in FP8 (see `Plan.untrained_states`)."""
    return set() if config.rollout_precision == "bf16" else plan.untrained_states(config.fp8_steps == "all")


def _describe_float8(config: GRPOConfig, plans: list[tuple[Plan, int]]) -> list[str]:
    """How many velocity evaluations are in FP8, as a line; none without FP8."""
    if config.rollout_precision == "bf16":
        return []
    counts = [plan.evaluations_of(float8_states(config, plan)) for plan, _ in plans]
    candidates = "; and all for candidates" if config.scouts else ""
    return [f"of these in FP8 ({config.rollout_precision}): {_spread(counts, plans)}{candidates}"]


def _spread(counts: Sequence[int], plans: list[tuple[Plan, int]]) -> str:
    """The least, the greatest and the mean of a number that each plan has; plans: with their iterations."""
    least, most = min(counts), max(counts)
    mean = np.average(counts, weights=[iterations for _, iterations in plans])
    return f"{least} to {most}, mean {mean:.1f}" if least < most else f"{most}"


LEGEND = (
    "  step, sigma before and after it (1: noise, 0: picture), kind, rows per prompt that the model computes; std of "
    "the noise that the step adds, and e^h = 4.13 std, how widely it explores (h: entropy)\n"
    "  kinds: ode and dpmpp only take noise out; flow_sde, dance_sde, cps and precise also add new noise"
)


def describe(config: GRPOConfig, world_size: int) -> str:
    """Counts per iteration, reward weights and the plan of the first window, as text. Checks the plan of every window.

    Raises:
        FlagError: a window can't be planned, or the prompts don't divide among the processes.
    """
    prompts = config.local_prompts(world_size) * config.data_ranks(world_size)
    k, plans = config.gradient_accumulation_steps, plans_of_run(config)
    evaluations, apart = (
        _spread([getattr(plan, name) for plan, _ in plans], plans)
        for name in ("evaluations", "evaluations_without_sharing")
    )
    first, steps, scouts = plans[0][0], optimizer_steps(config), scout_plan(config)
    if config.lr_scheduler == "polynomial" and config.lr_warmup_steps >= config.max_train_steps * steps:
        problem = (
            f"--lr_scheduler polynomial needs less than the run's {config.max_train_steps * steps} optimizer steps"
        )
        raise FlagError("lr_warmup_steps", config.lr_warmup_steps, problem)
    taken = counted(k, "sample") if first.parts is None else f"at most about {counted(k, 'edge')}"
    trained = [first[position].index for position in first.trained]
    wanted = config.eta_step_list or range(config.sampling_steps // 2) if config.algorithm in MERGES else ()
    left_out = [
        f"step {e} is inactive: no merge brings its e^h above --entropy_threshold {config.entropy_threshold}"
        for e in wanted
        if e not in trained
    ]
    return "\n".join(
        [
            f"{config.algorithm}: {counted(prompts, 'prompt')} x {counted(first.pictures, 'sample')} = "
            f"{counted(prompts * first.pictures, 'image')} per iteration on {counted(world_size, 'process')}"
            + (f", {config.sp_size} per picture" if config.sp_size > 1 else ""),
            *_describe_rewards(config),
            f"{counted(steps, 'optimizer step')} per iteration, each on {taken} per prompt, in "
            f"{counted(config.max_train_steps, 'iteration')}: "
            f"{counted(config.max_train_steps * steps, 'optimizer step')}",
            f"loss: {_describe_loss(config)}",
            f"velocity evaluations (NFE) per prompt and iteration: {evaluations}"
            + (f" (without sharing {apart})" if apart != evaluations else "")
            + (f"; and {scouts.evaluations} for candidates" if scouts else ""),
            *_describe_float8(config, plans),
            *left_out,
            *(_describe_scouts(config, scouts) if scouts else ()),
            f"{counted(first.draws, 'draw')} of time and noise per picture in the loss; plan:"
            if first.draws
            else f"plan of the first window {trained}:",
            LEGEND,
            first.describe(float8_states(config, first)),
        ]
    )


def _describe_loss(config: GRPOConfig) -> str:
    """What is minimised, with the settings that decide it."""
    names = {REFERENCE: config.ref_kl_coeff, OLD_POLICY: config.old_kl_coeff if config.algorithm == "awm" else 0}
    if config.algorithm == "diffusion_nft":
        parts = [f"DiffusionNFT, beta {config.nft_beta:g}, old policy of decay {config.old_policy_decay:g}"]
    elif config.trust_region == "divergence":
        parts = [f"unclipped ratio, masked from a divergence of {config.divergence_limit:g}"]
    else:
        parts = [f"{'normalised ' if config.ratio_norm else ''}ratio, clipped at ±{config.clip_range:g}"]
    parts += [f"steps weighted by {config.step_weights}"] if config.step_weights != "equal" else []
    parts += [f"{config.kl_coeff:g} x squared log-ratio"] if config.kl_coeff else []
    parts += [f"{weight:g} x distance from the {name.replace('_', ' ')}" for name, weight in names.items() if weight]
    return ", ".join(parts)


def _describe_rewards(config: GRPOConfig) -> list[str]:
    """The rewards with their weights, and the weights of components at the start and the end of training."""
    weights = resolve_reward_spec(config)
    lines = [f"rewards: {', '.join(f'{name} {weight:.4g}' for name, weight in weights.items())}"]
    for name in filter(REWARDS.__contains__, weights):
        parts = REWARDS[name].scored_components(config, evaluation=False)
        moves = zip(parts, config.granular_start_weights, config.granular_end_weights, strict=False)
        if parts:
            texts = (f"{part} {start:.4g}" + f" to {end:.4g}" * (start != end) for part, start, end in moves)
            lines.append(
                f"components of {name} (see docs/rewards.md), first to last iteration ({config.granular_schedule}): "
                f"{', '.join(texts)}"
            )
    return lines


def _describe_scouts(config: GRPOConfig, scouts: Plan) -> list[str]:
    picked = {"extremes": "the best and the worst", "random": "random ones"}[config.scout_pick]
    taken = f"{config.num_generations} of them, {picked}, are sampled again in full and trained; their plan:"
    return [
        f"{scouts.pictures} candidates per prompt are sampled and scored first; {taken}",
        scouts.describe(float8_states(config, scouts)),
    ]
