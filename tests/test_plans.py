"""Properties of all plans of all algorithms, tested with random settings."""

import math
from collections import Counter
from itertools import islice

from fastvideo.cli import FlagError
from fastvideo.config import ALGORITHMS, DRAWN, MERGES, TREES, GRPOConfig
from fastvideo.io.words import counted
from fastvideo.rollout_plan import PLANNERS, describe, make_plan, plan_mix, plans_of_run
from fastvideo.utils.grpo_states import windows
from fastvideo.utils.steps import KINDS, SDE_KINDS, sigma_schedule
from fastvideo.utils.transitions import micro_batches, slice_transitions, split_edges

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_algorithms import toy

everywhere = settings(derandomize=True, database=None, deadline=None, max_examples=60)


@st.composite
def flags(draw, algorithm: str) -> dict:
    """Random flags that the algorithm accepts."""
    steps = draw(st.integers(4, 14))
    sde = draw(st.sampled_from(list(SDE_KINDS)))
    found = {"algorithm": algorithm, "sampling_steps": steps, "sde_type": sde, "shift": draw(st.floats(0.5, 6))}
    found |= {"eta": draw(st.floats(0.05, 0.95)), "seed": draw(st.integers(0, 99)), "max_train_steps": 9}
    if algorithm not in TREES:
        found["num_generations"] = group = draw(st.integers(2, 6))
        found["share_prefix"] = draw(st.booleans())
        found["gradient_accumulation_steps"] = draw(st.sampled_from([k for k in range(1, 7) if group % k == 0]))
    else:
        found["gradient_accumulation_steps"] = draw(st.integers(1, 40))  # edges
    if ALGORITHMS[algorithm]["requires"]["training_strategy"] == "part" or algorithm == "branch_grpo_mix":
        found["group_size"] = draw(st.integers(1, steps - 2))
        found["iters_per_group"] = draw(st.integers(1, 3))
        found["sample_strategy"] = draw(st.sampled_from(["progressive", "random", "decay", "exp_decay"]))
    if "flash" in algorithm:
        found["dpm_post_compress_ratio"] = draw(st.floats(0.1, 1))
        found["dpm_solver_order"] = draw(st.integers(1, 3))
        found["dpm_solver_type"] = draw(st.sampled_from(["midpoint", "heun"]))
    if algorithm in DRAWN:
        found["draws"] = draw(st.integers(1, 5))
        del found["eta"], found["sde_type"]  # refused: no step is noisy
        found["dpm_algorithm_type"] = draw(st.sampled_from([None, "dpmsolver++"]))
    if algorithm == "flow_grpo":
        found["flow_grpo_fast_steps"] = draw(st.integers(0, steps - 2))
    if algorithm in ("flow_grpo", "dance_grpo", "dance_grpo_lora"):
        found["init_same_noise"] = draw(st.booleans())
        found["drop_last_sample"] = draw(st.booleans())
    if algorithm in MERGES:
        active = draw(st.lists(st.integers(0, steps - 2), min_size=1, max_size=4, unique=True))
        found["eta_step_list"] = sorted(active)
        found["granular_list"] = draw(st.lists(st.integers(1, steps), min_size=1, max_size=3, unique=True))
    if algorithm == "grpo_merge":
        found["eta_step_merge_list"] = [draw(st.integers(1, steps - 1 - e)) for e in found["eta_step_list"]]
    if algorithm in TREES:
        splits = draw(st.lists(st.integers(0, steps - 2), min_size=1, max_size=3, unique=True))
        found |= {"tree_split_points": sorted(splits), "tree_split_children": draw(st.integers(2, 3))}
        most = {"cps": 1 / math.sin(found["eta"] * math.pi / 2), "precise": 1}.get(sde, 5)
        found["tree_split_noise_scale"] = draw(st.floats(0.5, min(most, 5) * 0.999))
        # Depths that never prune the last split's edges, however far the depths move.
        free = [depth for depth in range(1, steps) if depth <= splits[-1] - 1]
        found["depth_pruning"] = sorted(draw(st.lists(st.sampled_from(free), unique=True))) if free else []
        found["depth_pruning_slide_interval"] = draw(st.integers(0, 3))
    return found


def every_algorithm(check):
    return pytest.mark.parametrize("algorithm", ALGORITHMS)(everywhere(given(data=st.data())(check)))


def drawn(data, algorithm: str) -> tuple[GRPOConfig, list]:
    """Random settings and the checked plans of their first iterations."""
    config = GRPOConfig.create(data_json_path="unused", reward_model="shapes", **data.draw(flags(algorithm)))
    return config, [make_plan(config, w, i) for i, w in enumerate(islice(windows(config), 9), start=1)]


@pytest.mark.parametrize("algorithm", ["mix_grpo", "flow_grpo", "branch_grpo_mix"])
@everywhere
@given(data=st.data())
def test_the_plans_of_a_run_are_those_of_its_iterations(algorithm, data):
    config, plans = drawn(data, algorithm)
    assert config.max_train_steps == len(plans)
    assert Counter(plan for plan, number in plans_of_run(config) for _ in range(number)) == Counter(plans)


@every_algorithm
def test_every_picture_comes_down_the_whole_schedule_and_every_trained_step_has_rows_to_compare(algorithm, data):
    config, plans = drawn(data, algorithm)
    schedule = sigma_schedule(config.sampling_steps, config.shift)
    for plan in plans:
        rows = plan.rows
        for step, numbers, count in zip(plan, plan.coefficients, rows, strict=True):
            assert all(map(math.isfinite, (numbers.x, numbers.v, numbers.std, *numbers.history)))
            ends = step.kind in ("cps", "precise") and step.sigma_next == 0  # their noise is a share of σ' = 0
            assert (numbers.std > 0) == (KINDS[step.kind].sde_type is not None and not ends)
            assert not step.train or (count >= 2 and numbers.std > 0)
        for leaf in plan.leaves:
            path, position = [], leaf
            while position >= 0:
                path.insert(0, plan[position])
                position = plan.parents[position]
            sigmas = [1.0, *(step.sigma_next for step in path)]
            assert sigmas == sorted(sigmas, reverse=True) and len(set(sigmas)) == len(sigmas) and sigmas[-1] == 0
            if not any(step.kind == "dpmpp" for step in path):
                assert set(sigmas) <= set(schedule)
        columns = sorted(plan.columns.values(), key=lambda c: c.start)
        assert [c.start for c in columns] == [0, *(c.stop for c in columns[:-1])]
        trained = plan.leaves if algorithm in DRAWN else [leaf for leaf in plan.leaves if plan.trained_path(leaf)]
        assert {rows[leaf] for leaf in trained} == {config.num_generations}
        if algorithm in MERGES:
            assert len(trained) == len(config.eta_step_list) * len(config.granular_list)
        else:
            assert trained == plan.leaves and len(trained) == 1


@every_algorithm
def test_the_sampler_evaluates_what_the_plan_counts(algorithm, data):
    config, plans = drawn(data, algorithm)
    for plan in plans[:2]:
        counted = plan.evaluations
        assert counted <= plan.evaluations_without_sharing
        below = {parent for parent in plan.parents if parent >= 0}
        rows = plan.rows
        assert counted == plan.start + sum(rows[position] for position in below)
    window = next(windows(config))
    plan, result, evaluated = toy(config, window)
    assert evaluated == plan.evaluations
    last = max(c.stop for c in plan.columns.values())
    assert len(result.latents) == 2 * last and result.latents.isfinite().all()


@every_algorithm
def test_the_optimizer_steps_of_an_iteration_train_every_transition_once_with_weights_that_make_means(algorithm, data):
    config, plans = drawn(data, algorithm)
    size, prompts = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    group = config.num_generations
    order = np.stack([np.random.default_rng(p).permutation(group) for p in range(prompts)])
    number_of_steps = set()
    for plan in plans:
        trained = list(range(config.draws)) if algorithm in DRAWN else [i for i, step in enumerate(plan) if step.train]
        rows = dict.fromkeys(trained, group) if algorithm in DRAWN else plan.rows
        everything = np.broadcast_to(trained, (prompts, group, len(trained)))
        found = []
        for samples, positions in plan.updates(group, config.gradient_accumulation_steps):
            advantages = {position: np.ones((prompts, rows[position])) for position in positions}
            transitions = slice_transitions(plan, order[:, samples], everything, advantages)
            rngs = [np.random.default_rng(p) for p in range(prompts)]
            shares = [transitions] if plan.parts is None else split_edges(transitions, plan.parts, rngs)
            for share in shares:
                assert sum(t.weight for t in share) == pytest.approx(1)
                batches = micro_batches(share, size)
                assert [t for batch in batches for t in batch] == share
                assert all(len({(t.position, t.parent) for t in batch}) <= size for batch in batches)
                found += [(t.position, t.child) for t in share]
            if len(transitions) < prompts * len(shares):  # more optimizer steps than edges are left by pruning
                found = sorted(set(found))
        number_of_steps.add(plan.optimizer_steps(group, config.gradient_accumulation_steps))
        shared = [position for position in trained if rows[position] < group]  # positions where samples share a row
        own = [(position, child) for position, child in found if position not in shared]
        assert len(own) == len(set(own)) == sum(prompts * rows[p] for p in trained if p not in shared)
        assert set(found) - set(own) == {(p, child) for p in shared for child in range(prompts * rows[p])}
    assert len(number_of_steps) == 1
    assert f"{counted(number_of_steps.pop(), 'optimizer step')} per iteration" in describe(config, 1)


def test_a_share_that_leaves_a_planner_no_step_to_train_is_refused(monkeypatch):
    def plan_two(config, window, rng):
        return plan_mix(config, range(2), rng)

    monkeypatch.setitem(PLANNERS, "dance_grpo", plan_two)
    given = {"algorithm": "dance_grpo", "data_json_path": "unused", "reward_model": "shapes"}
    assert len(make_plan(GRPOConfig.create(**given, timestep_fraction=0.5), []).trained) == 2
    with pytest.raises(FlagError, match="timestep_fraction 0.4: leaves no step of 2 to train"):
        make_plan(GRPOConfig.create(**given, timestep_fraction=0.4), [])
