"""E-GRPO, Granular-GRPO, BranchGRPO, Flow-GRPO-Fast: their plans, samples, advantages, updates and flags."""

import itertools
import json
import math
import re
from dataclasses import replace
from itertools import islice

from fastvideo import train_grpo_flux
from fastvideo.cli import parse_dataclass
from fastvideo.config import ALGORITHMS, DRAWN, MERGES, GRPOConfig
from fastvideo.models.family import LatentShape
from fastvideo.rollout_plan import describe, make_plan, merged_steps, optimizer_steps, pruned_depths
from fastvideo.train_grpo_flux import Rollout, rollout
from fastvideo.utils import advantages as advantage_maths
from fastvideo.utils import transitions as transition_maths
from fastvideo.utils.advantages import fuse, kept_pictures, plan_advantages
from fastvideo.utils.grpo_states import windows
from fastvideo.utils.plan import Plan
from fastvideo.utils.sampling_utils import Noise
from fastvideo.utils.steps import SDE_KINDS, Step, entropy, sigma_schedule
from fastvideo.utils.transitions import Transition, deal_out, split_edges

import numpy as np
import pytest
import torch
from conftest import ROOT, relative_difference
from PIL import Image
from test_config import RECIPES, recipe_command, recipe_name
from test_train import assert_same_update, base_weights, same_weights, torchrun

SHAPE = LatentShape(6, 8, 4, 6)
NAN = math.nan


def config(**given) -> GRPOConfig:
    return GRPOConfig.create(data_json_path="unused", reward_model="shapes", **given)


def toy(settings: GRPOConfig, window=(0,), prompts: int = 2) -> tuple[Plan, Rollout, int]:
    """A rollout of a small velocity field, and the number of evaluated rows per prompt."""
    plan, evaluated = make_plan(settings, list(window)), []

    def velocity(x, sigma, prompt_index):
        evaluated.append(len(x))
        return field(x, sigma[:, None, None], prompt_index[:, None, None])

    start = noise(0, 1, prompts).repeat_interleave(plan.start, 0)
    result = rollout(plan, start, prompts, velocity, lambda stream, rows: noise(stream, rows, prompts))
    return plan, result, sum(evaluated) / prompts


def noise(stream: int, rows: int, prompts: int) -> torch.Tensor:
    return Noise(0, 1, range(prompts), SHAPE)(stream, rows)


MATRIX = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))


def field(x: torch.Tensor, sigma, prompt) -> torch.Tensor:
    return torch.tanh(x @ MATRIX) * (1 + sigma) + 0.3 * prompt


# --- E-GRPO's plan ----------------------------------------------------------------------------------------------------


def test_merges_at_the_defaults_of_e_grpo():
    settings = config(algorithm="grpo_merge")
    assert (settings.sampling_steps, settings.shift, settings.eta, settings.num_generations) == (16, 3.0, 0.7, 12)
    assert settings.learning_rate == 2e-6 and settings.granular_list == [1]
    assert [(s.index, s.span) for s in merged_steps(settings)] == list(enumerate([1, 1, 2, 2, 2, 3, 3, 3]))
    plan = make_plan(settings, [0])
    assert plan.evaluations == 1012
    assert min(plan.entropies) > 2.2


def test_entropy_is_that_of_a_gaussian_per_dimension():
    for std in (0.1, 0.7, 2.0):
        gaussian = torch.distributions.Normal(0.0, std)
        assert entropy(std) == pytest.approx(math.exp(gaussian.entropy()))


@pytest.mark.parametrize("threshold", [0.5, 1.5, 2.2, 2.5, 3.0])
@pytest.mark.parametrize("sde_type", ["flow", "dance", "cps"])  # the formulas are below
def test_a_merge_is_the_shortest_that_passes_the_threshold(threshold, sde_type):
    """Compares with a direct search over the formulas of docs/algorithms.md."""

    def std(first: int, last: int) -> float:
        sigma, target = sigmas[first], sigmas[last]
        if sde_type == "cps":
            return target * math.sin(0.7 * math.pi / 2)
        if sde_type == "dance":
            return 0.7 * math.sqrt(sigma - target)
        return 0.7 * math.sqrt(sigma / (1 - (sigmas[1] if first == 0 else sigma))) * math.sqrt(sigma - target)

    for steps, shift in itertools.product((5, 16, 25), (1.0, 3.0)):
        sigmas = sigma_schedule(steps, shift)
        expected = []
        for first in range(steps // 2):
            passing = [last for last in range(first + 1, steps) if entropy(std(first, last)) > threshold]
            expected += [(first, passing[0] - first)] if passing else []
        given = {"sampling_steps": steps, "shift": shift, "entropy_threshold": threshold, "sde_type": sde_type}
        settings = config(algorithm="grpo_merge", **given)
        if expected:
            assert [(s.index, s.span) for s in merged_steps(settings)] == expected
        else:
            with pytest.raises(ValueError, match=r"entropy_threshold .*: no step"):
                merged_steps(settings)


def test_explicit_lists_override_the_entropy():
    listed = config(algorithm="grpo_merge", eta_step_list=[1, 2, 5], eta_step_merge_list=[1, 3, 2])
    assert [(s.index, s.span) for s in merged_steps(listed)] == [(1, 1), (2, 3), (5, 2)]
    chosen = config(algorithm="grpo_merge", eta_step_list=[0, 5])
    assert [(s.index, s.span) for s in merged_steps(chosen)] == [(0, 1), (5, 3)]
    granular = config(algorithm="granular_grpo", eta_step_list=[0, 5, 9])
    assert [(s.index, s.span) for s in merged_steps(granular)] == [(0, 1), (5, 1), (9, 1)]


def merge_settings():
    for steps, group, strides in itertools.product((4, 9, 16), (2, 5), ([1], [2], [1, 3], [4, 1, 2])):
        for active in ([0], [1, 2], list(range(steps // 2)), [steps - 2]):
            for merge in (1, 2):
                if active[-1] + merge < steps:
                    given = {"eta_step_list": active, "eta_step_merge_list": [merge] * len(active)}
                    yield {"sampling_steps": steps, "num_generations": group, "granular_list": strides, **given}


@pytest.mark.parametrize("share", [True, False])
def test_every_plan_of_e_grpo_is_anchor_groups_and_tails(share):
    for given in merge_settings():
        settings = config(algorithm="grpo_merge", share_prefix=share, **given)
        steps, group, strides = settings.sampling_steps, settings.num_generations, settings.granular_list
        plan = make_plan(settings, [0])
        rows, start = plan.rows, plan.start
        trained = [i for i, step in enumerate(plan) if step.train]
        assert [plan[i].index for i in trained] == settings.eta_step_list
        assert [plan[i].span for i in trained] == settings.eta_step_merge_list
        assert all(rows[i] == group for i in trained)
        sigmas = sigma_schedule(steps, settings.shift)
        *groups, anchor = plan.leaves
        assert plan.trained_path(anchor) == [] and rows[anchor] == start
        assert len(groups) == len(trained) * len(strides)
        for number, leaf in enumerate(groups):
            root, stride = trained[number // len(strides)], strides[number % len(strides)]
            assert plan.trained_path(leaf) == [root]
            path = [leaf]
            while path[0] != root:
                path.insert(0, plan.parents[path[0]])
            ends = [plan[i].sigma_next for i in path]
            first = plan[root].index + plan[root].span
            assert ends == [*(sigmas[i] for i in range(first, steps, stride)), 0]
        assert plan.updates(group, settings.gradient_accumulation_steps) == [(slice(0, group), [i]) for i in trained]


def test_evaluations_of_e_grpo_are_the_formula_and_what_the_sampler_does():
    """T for the anchor, and G per step of every tail. Further strides share the first stride's first evaluation."""
    for given in merge_settings():
        settings = config(algorithm="grpo_merge", **given)
        steps, group, strides = settings.sampling_steps, settings.num_generations, settings.granular_list
        formula = steps
        for e, m in zip(settings.eta_step_list, settings.eta_step_merge_list, strict=True):
            formula += sum(math.ceil((steps - e - m) / g) for g in strides) * group - (len(strides) - 1) * group
        plan, _, evaluated = toy(settings)
        assert plan.evaluations == formula == evaluated


@pytest.mark.parametrize("share", [True, False])
def test_e_grpo_samples_are_what_the_formulas_give_one_at_a_time(share):
    """Each sample is the ODE to e, one noisy step e → e + m, and the ODE from e + m in strides; anchors are the ODE."""
    given = {"eta_step_list": [0, 2, 3], "eta_step_merge_list": [2, 1, 3], "granular_list": [1, 2]}
    settings = config(algorithm="grpo_merge", sampling_steps=8, num_generations=3, share_prefix=share, eta=0.6, **given)
    plan, result, _ = toy(settings)
    sigmas = sigma_schedule(8, 3.0)
    pictures = result.latents.unflatten(0, (2, -1))

    def ode(x, first, last, stride, prompt):
        for i in range(first, last, stride):
            j = min(i + stride, last)
            x = x + (sigmas[j] - sigmas[i]) * field(x, sigmas[i], prompt)
        return x

    found = 0
    for prompt in range(2):
        start = noise(0, 1, 2)[prompt]
        columns = iter(range(pictures.shape[1]))
        for e, m in zip(settings.eta_step_list, settings.eta_step_merge_list, strict=True):
            (position,) = (i for i, step in enumerate(plan) if step.train and step.index == e)
            x, sigma, delta = ode(start, 0, e, 1, prompt), sigmas[e], sigmas[e] - sigmas[e + m]
            a = 0.6 * math.sqrt(sigma / (1 - (sigmas[1] if e == 0 else sigma)))
            v = field(x, sigma, prompt)
            mean = x * (1 - a * a * delta / (2 * sigma)) - v * delta * (1 + a * a * (1 - sigma) / (2 * sigma))
            drawn = noise(position + 1, 3, 2).unflatten(0, (2, 3))[prompt]
            after = mean + a * math.sqrt(delta) * drawn
            torch.testing.assert_close(result.after[position].unflatten(0, (2, 3))[prompt], after, rtol=0, atol=1e-5)
            for stride, sample in itertools.product((1, 2), range(3)):
                expected = ode(after[sample], e + m, 8, stride, prompt)
                torch.testing.assert_close(pictures[prompt, next(columns)], expected, rtol=0, atol=1e-4)
                found += 1
        for column in columns:
            torch.testing.assert_close(pictures[prompt, column], ode(start, 0, 8, 1, prompt), rtol=0, atol=1e-5)
    assert found == 2 * 3 * 2 * 3 and pictures.shape[1] == 18 + (1 if share else 3)


def test_a_merged_cps_step_keeps_the_noise_level_of_where_it_ends():
    settings = config(
        algorithm="grpo_merge", sde_type="cps", eta_step_list=[2], eta_step_merge_list=[4], num_generations=2
    )
    plan = make_plan(settings, [0])
    (merged,) = (step for step in plan if step.train)
    sigmas = sigma_schedule(16, 3.0)
    assert (merged.sigma, merged.sigma_next) == (sigmas[2], sigmas[6])
    assert plan.entropies == [pytest.approx(entropy(sigmas[6] * math.sin(0.35 * math.pi)))]


# --- BranchGRPO's plan ------------------------------------------------------------------------------------------------


def test_branch_grpo_at_its_defaults():
    settings = config(algorithm="branch_grpo")
    plan = make_plan(settings, [0])
    assert plan.evaluations == 203 and plan.evaluations_without_sharing == 320
    assert settings.num_generations == 16 and settings.clip_range == 1e-3
    assert [s.index for s in plan if s.branch > 1] == [0, 3, 6, 9]
    assert [s.noise_scale for s in plan] == [4 if s.index in (0, 3, 6, 9) else 1 for s in plan]
    assert {s.kind for s in plan[:-1]} == {"dance_sde"} and [s.train for s in plan] == [True] * 19 + [False]
    assert plan.updates(16, 12) == [(slice(0, 16), list(range(19)))]
    assert settings.gradient_accumulation_steps == 12 and plan.optimizer_steps(16, 12) == 17  # 202 edges
    assert "17 optimizer steps per iteration, each on at most about 12 edges per prompt" in describe(settings, 1)


def test_the_edges_of_a_tree_are_split_at_random_and_every_edge_is_trained_once():
    settings = config(algorithm="branch_grpo", train_micro_batch_size=4)
    plan = make_plan(settings, [0])
    advantages = {p: np.random.default_rng(p).normal(size=(2, plan.rows[p])) for p in plan.trained}

    def dealt(number: int, slots: range, **given) -> list[list[Transition]]:
        work = deal_out(replace(settings, **given), plan, number, slots, advantages)
        return [list(itertools.chain(*batches)) for batches in work]

    steps = dealt(1, range(2))
    for prompt in range(2):
        own = [[(t.position, t.child) for t in step if t.prompt == prompt] for step in steps]
        assert {len(part) for part in own} == {11, 12} and len(own) == 17
        everything = [(p, prompt * plan.rows[p] + row) for p in plan.trained for row in range(plan.rows[p])]
        assert sorted(itertools.chain(*own)) == everything
        assert all(len({position for position, _ in part}) > 4 for part in own)  # early and late steps mixed
    assert all(sum(t.weight for t in step) == pytest.approx(1) for step in steps)
    assert dealt(1, range(2), train_micro_batch_size=1) == steps
    for alone, step in zip(dealt(1, range(1)), steps, strict=True):  # another layout on processes
        first = [(t.position, t.child, t.advantage) for t in step if t.prompt == 0]
        assert [(t.position, t.child, t.advantage) for t in alone] == first
    assert dealt(2, range(2)) != steps


def test_a_tree_with_fewer_edges_than_optimizer_steps_repeats_edges():
    edges = [Transition(0, 0, child, 0, 1.0) for child in range(3)]
    parts = split_edges(edges, 5, [np.random.default_rng(0)])
    assert [len(part) for part in parts] == [1] * 5 and {t.child for t in itertools.chain(*parts)} == {0, 1, 2}
    assert all(t.weight == 1 for t in itertools.chain(*parts))


@pytest.mark.parametrize("algorithm", ["branch_grpo", "branch_grpo_mix"])
def test_a_tree_takes_the_same_number_of_optimizer_steps_in_every_iteration(algorithm):
    """However many edges the window and pruning leave, because the learning rate's schedule needs the total."""
    pruning = {"depth_pruning": [16, 17, 18], "depth_pruning_slide_interval": 1, "tree_width_prune": 1}
    settings = config(algorithm=algorithm, iters_per_group=1, **pruning)
    plans = [make_plan(settings, window, i) for i, window in enumerate(islice(windows(settings), 25), start=1)]
    assert len({sum(plan.rows[p] for p in plan.trained) for plan in plans}) > 1
    assert {plan.optimizer_steps(16, 12) for plan in plans} == {optimizer_steps(settings)}


def tree_settings():
    for steps, children in itertools.product((5, 8, 12), (2, 3)):
        for splits in ([0], [0, 1], [1, 3], [0, 2, 3]):
            yield {"sampling_steps": steps, "tree_split_children": children, "tree_split_points": splits}


@pytest.mark.parametrize("algorithm", ["branch_grpo", "branch_grpo_mix"])
def test_evaluations_of_a_tree_are_its_inner_nodes(algorithm):
    for given in tree_settings():
        settings = config(algorithm=algorithm, group_size=2, **given)
        plan, result, evaluated = toy(settings)
        splits, children = settings.tree_split_points, settings.tree_split_children
        nodes = [children ** sum(split < depth for split in splits) for depth in range(settings.sampling_steps + 1)]
        assert plan.evaluations == sum(nodes[:-1]) == evaluated
        assert len(result.latents) == 2 * nodes[-1] == 2 * settings.num_generations
        assert plan.rows == nodes[1:]


def test_the_mixed_variant_makes_noise_at_splits_and_in_the_moving_window_alone():
    settings = config(algorithm="branch_grpo_mix", sampling_steps=10, tree_split_points=[0, 4], iters_per_group=1)
    for window in islice(windows(settings), 12):
        plan = make_plan(settings, window)
        noisy = sorted({0, 4, *window})
        assert [s.index for s in plan if s.kind == "dance_sde"] == [s.index for s in plan if s.train] == noisy
        assert {s.kind for s in plan if s.index not in noisy} == {"ode"}


def test_a_tree_gives_each_leaf_what_its_own_path_gives():
    given = {"tree_split_points": [0, 2, 3], "sampling_steps": 6, "tree_split_noise_scale": 3.0, "eta": 0.4}
    plan, result, _ = toy(config(algorithm="branch_grpo", **given))
    sigmas, rows = sigma_schedule(6, 3.0), [2, 2, 4, 8, 8]
    pictures = result.latents.unflatten(0, (2, 8))
    for prompt, leaf in itertools.product(range(2), range(8)):
        x = noise(0, 1, 2)[prompt]
        for i in range(5):
            sigma, delta = sigmas[i], sigmas[i] - sigmas[i + 1]
            v = field(x, sigma, prompt)
            score = -(x - (1 - sigma) * (x - sigma * v)) / sigma**2
            mean = x - delta * v + 0.5 * 0.4**2 * delta * score
            std = 0.4 * math.sqrt(delta) * (3 if i in (0, 2, 3) else 1)
            node = leaf * rows[i] // 8
            x = mean + std * noise(i + 1, rows[i], 2).unflatten(0, (2, rows[i]))[prompt, node]
            density = torch.distributions.Normal(mean, std).log_prob(x).mean()
            stored = result.log_probs[i].unflatten(0, (2, rows[i]))[prompt, node]
            assert stored.item() == pytest.approx(density.item(), abs=1e-4)
        x = x - sigmas[5] * field(x, sigmas[5], prompt)
        torch.testing.assert_close(pictures[prompt, leaf], x, rtol=0, atol=1e-4)


def test_depth_pruning_slides_towards_the_root_and_stops():
    settings = config(
        algorithm="branch_grpo", depth_pruning=[16, 17, 18], depth_pruning_slide_interval=3, depth_pruning_stop_depth=14
    )
    shifts = [min(pruned_depths(settings, number)) for number in range(1, 13)]
    assert shifts == [16] * 3 + [15] * 3 + [14] * 6
    plan = make_plan(settings, [0], 5)  # depths 15, 16 and 17 are the children of steps 14, 15 and 16
    assert [s.index for s in plan if not s.train] == [14, 15, 16, 19]
    still = replace(settings, depth_pruning_slide_interval=0)
    assert pruned_depths(still, 1) == pruned_depths(still, 1000) == {16, 17, 18}
    beyond = replace(settings, depth_pruning_stop_depth=17)  # depth 16 starts below the stop depth already
    assert pruned_depths(beyond, 1000) == {16, 17, 18}


def test_a_plan_check_refuses_steps_that_start_from_elsewhere():
    sigmas = sigma_schedule(4, 3.0)
    chain = [Step(i, sigmas[i], sigmas[i + 1], sigmas[1], "dance_sde", 0.3, train=i == 0) for i in range(4)]
    assert Plan(tuple(chain)).check()
    for parent in (2, 3, -2):
        with pytest.raises(ValueError, match="which comes later"):
            Plan((*chain[:2], replace(chain[2], parent=parent), chain[3])).check()
    with pytest.raises(ValueError, match="step 0 ends at sigma"):
        Plan((*chain, replace(chain[2], parent=0))).check()
    with pytest.raises(ValueError, match="from sigma 1 to 0, this one to"):
        Plan((*chain, replace(chain[1], parent=0))).check()
    with pytest.raises(ValueError, match="from sigma 1 to 0, this one from"):
        Plan((*chain, replace(chain[1], parent=-1))).check()


@pytest.mark.parametrize(
    "algorithm,documented",
    [
        ("mix_grpo", "168 to 289"),
        ("mix_grpo_flash", "74 to 123"),
        ("mix_grpo_flash_star", "73"),
        ("flow_grpo", "289"),
        ("dance_grpo", "181"),
        ("dance_grpo_lora", "133"),
        ("grpo_merge", "1012"),
        ("granular_grpo", "1900"),
        ("branch_grpo", "203"),
        ("branch_grpo_mix", "203"),
    ],
)
def test_evaluations_at_the_defaults_are_those_of_the_documentation(algorithm, documented):
    settings = config(algorithm=algorithm)
    found = [make_plan(settings, w).evaluations for w in islice(windows(settings), settings.max_train_steps)]
    assert " to ".join(map(str, sorted({min(found), max(found)}))) == documented
    table = (ROOT / "docs/algorithms.md").read_text().partition("## Cost")[2].partition("\n## ")[0]
    (row,) = (
        line for line in table.splitlines() if line.startswith("|") and f"`{algorithm.replace('_star', '')}`" in line
    )
    assert documented in row


# --- advantages of trees ----------------------------------------------------------------------------------------------


def brute_force(scores, split_log_probs, splits, steps, children, temperature) -> dict[tuple[int, int], float]:
    """Advantage of every node (depth, number), by recursion from the root, with Python lists."""
    values: dict[tuple[int, int], float] = {}

    def value(depth: int, number: int) -> float:
        if depth == steps:
            found = scores[number]
        elif depth not in splits:
            found = value(depth + 1, number)
        else:
            numbers = [number * children + i for i in range(children)]
            below = [value(depth + 1, n) for n in numbers]
            weights = [math.exp(split_log_probs[depth][n] / temperature) if temperature else 1.0 for n in numbers]
            found = sum(w * b for w, b in zip(weights, below, strict=True)) / sum(weights)
        values[depth, number] = found
        return found

    value(0, 0)
    advantages = {}
    for depth in range(1, steps + 1):
        level = {key: v for key, v in values.items() if key[0] == depth}
        mean = sum(level.values()) / len(level)
        std = math.sqrt(sum((v - mean) ** 2 for v in level.values()) / (len(level) - 1))
        advantages |= {key: (v - mean) / (std + 1e-8) for key, v in level.items()}
    return advantages


@pytest.mark.parametrize("fusion,temperature", [("mean", 0), ("probability", 1.0), ("probability", 0.05)])
def test_advantages_of_a_tree_are_those_of_a_recursion(train, monkeypatch, fusion, temperature):
    seen, advantages_of, collect = [], train_grpo_flux.plan_advantages, train_grpo_flux.Trainer.collect

    def sampling(trainer, *given):
        found = collect(trainer, *given)
        seen.append(found[0])
        return found

    def recording(config, plan, scores, *rest):
        found = advantages_of(config, plan, scores, *rest)
        seen.append((plan, scores, found[0]))
        return found

    monkeypatch.setattr(train_grpo_flux.Trainer, "collect", sampling)
    monkeypatch.setattr(train_grpo_flux, "plan_advantages", recording)
    train(
        algorithm="branch_grpo", num_generations=8, tree_split_points=[0, 2, 3], sampling_steps=6, train_batch_size=2,
        tree_fusion=fusion, tree_fusion_temperature=temperature or 1.0, max_train_steps=1,
    )  # fmt: skip
    sampled, (plan, scores, advantages) = seen
    rows = plan.rows
    assert sorted(advantages) == [0, 1, 2, 3, 4]
    for prompt in range(2):
        log_probs = {split: sampled.log_probs[split].unflatten(0, (2, -1))[prompt].tolist() for split in (0, 2, 3)}
        expected = brute_force(scores["ShapesRewardModel"][prompt], log_probs, (0, 2, 3), 6, 2, temperature)
        for position, found in advantages.items():
            level = [expected[position + 1, number] for number in range(rows[position])]
            assert found[prompt].tolist() == pytest.approx(level, abs=1e-5)


def test_fusing_leaves_failed_pictures_out():
    scores = np.array([[1.0, 3, NAN, 5, NAN, NAN, 7, 8]])
    np.testing.assert_allclose(fuse(scores, 8, {}), scores)
    np.testing.assert_allclose(fuse(scores, 4, {}), [[2, 5, NAN, 7.5]])
    np.testing.assert_allclose(fuse(scores, 2, {}), [[3, 7.5]])


def test_fusing_by_probability():
    """Two splits into 2. The log-probabilities 0 and log 3 give the weights 1 and 3."""
    three = math.log(3)
    log_probs = {1: np.array([[0, three]]), 2: np.array([[0, 0, three, 0]])}
    scores = np.array([[1.0, 2, 4, 8]])
    np.testing.assert_allclose(fuse(scores, 4, log_probs), scores)
    np.testing.assert_allclose(fuse(scores, 2, log_probs), [[1.5, 5]])
    np.testing.assert_allclose(fuse(scores, 1, log_probs), [[1.5 / 4 + 5 * 3 / 4]])
    np.testing.assert_allclose(fuse(scores, 1, log_probs, 1e6), [[3.75]], atol=1e-4)
    np.testing.assert_allclose(fuse(scores, 1, log_probs, 1e-3), [[4]], atol=1e-9)
    # The sibling of a failed picture gives their branch's score; weights of upper branches stay the same.
    np.testing.assert_allclose(fuse(np.array([[1.0, 2, NAN, 8]]), 1, log_probs), [[1.5 / 4 + 8 * 3 / 4]])
    np.testing.assert_allclose(fuse(np.array([[NAN, NAN, 4.0, 8]]), 1, log_probs), [[5]])


def tree_advantages(scores: dict, weights: dict, **given) -> dict[int, np.ndarray]:
    """The advantages of a tree with splits at 0 and 1 and four pictures."""
    settings = config(algorithm="branch_grpo", sampling_steps=4, tree_split_points=[0, 1], **given)
    weights = {name: np.full(4, weight) for name, weight in weights.items()}
    scores = {name: np.array([values]) for name, values in scores.items()}
    return plan_advantages(settings, make_plan(settings, [0]), scores, weights, {})[0]


def test_a_picture_that_one_model_could_not_score_counts_for_no_branch_under_reward_aggr():
    scores = {"a": [NAN, 0.0, 4.0, 6.0], "b": [100.0, 0.0, 2.0, 4.0]}
    found = tree_advantages(scores, {"a": 0.5, "b": 0.5}, multi_reward_mix="reward_aggr")
    np.testing.assert_allclose(found[0], [[-1 / math.sqrt(2), 1 / math.sqrt(2)]])  # branches score 0 and 4
    assert found[1][0, 0] == 0 and found[1][0, 1] < found[1][0, 2] < found[1][0, 3]


def test_width_pruning_never_keeps_a_failed_picture_instead_of_one_that_scores():
    last = tree_advantages({"a": [NAN, -1.0, 2, 3]}, {"a": 1}, tree_width_prune=1)[2]
    assert np.isnan(last).tolist() == [[True, False, True, False]]


def test_width_pruning_by_hand():
    advantages = np.array([[0.1, 0.9, -0.5, 0.3, -2, 1.5, 0.2, -0.1]])
    #                       0    1    2     3    4   5    6    7

    def kept(siblings: int, mode: int, share: float) -> list[int]:
        return np.flatnonzero(kept_pictures(advantages, siblings, mode, share)).tolist()

    assert kept(2, 1, 0.5) == [1, 3, 5, 6]  # the better of each pair
    assert kept(4, 1, 0.25) == [1, 5]
    assert kept(4, 1, 0.3) == [1, 3, 5, 6]  # ⌈1.2⌉ of each four
    assert kept(2, 2, 0.5) == [1, 2, 4, 5]  # the two best and the two worst
    assert kept(2, 2, 0.375) == [1, 4, 5]  # two best, one worst
    assert kept(2, 2, 0.01) == [5] and kept(2, 2, 1.0) == kept(2, 1, 1.0) == list(range(8))
    advantages = np.array([[NAN, 0.9, NAN, NAN, -2, 1.5, 0.2, NAN]])
    assert kept(2, 1, 0.5) == [1, 2, 5, 6]  # where both failed, any
    assert kept(2, 2, 0.5) == [4, 5]  # half of four
    ties = kept_pictures(np.zeros((3, 8)), 2, 2, 0.5)
    assert ties.sum(1).tolist() == [4, 4, 4]


def test_steps_before_the_first_split_are_not_trained():
    """Before the first split all samples of a prompt are one row, so there is nothing to compare."""
    for algorithm in ("branch_grpo", "branch_grpo_mix"):
        settings = config(algorithm=algorithm, sampling_steps=10, tree_split_points=[3, 5], group_size=3)
        plan = make_plan(settings, [0, 1, 2])
        assert [s.kind for s in plan[:3]] == ["dance_sde"] * 3
        trained = [s.index for s in plan if s.train]
        assert trained == ([3, 4, 5, 6, 7, 8] if algorithm == "branch_grpo" else [3, 5])


def test_a_split_with_cps_keeps_the_noise_level():
    """The predicted noise in the mean and the fresh noise have the total variance σ'², for every noise scale."""
    given = {"algorithm": "branch_grpo", "sde_type": "cps", "eta": 0.5, "tree_split_points": [2]}
    assert config(**given).tree_split_noise_scale == 1
    for scale in (1.0, 1.4):
        plan = make_plan(config(**given, tree_split_noise_scale=scale), [0])
        step, numbers = plan[2], plan.coefficients[2]
        kept = numbers.x - (1 - step.sigma_next)  # of x = (1 − σ)·x0 + σ·noise: mean = (1 − σ')·x0 + kept·noise
        assert numbers.std == pytest.approx(step.sigma_next * math.sin(0.25 * math.pi) * scale)
        assert kept**2 + numbers.std**2 == pytest.approx(step.sigma_next**2)
    with pytest.raises(ValueError, match="tree_split_noise_scale 1.5: at most 1.41 with --sde_type cps --eta 0.5"):
        config(**given, tree_split_noise_scale=1.5)


# --- training ---------------------------------------------------------------------------------------------------------

SPLITS = {"branch_grpo": {"tree_split_points": [0, 2]}, "branch_grpo_mix": {"tree_split_points": [0, 2]}}
SMALL = {  # name -> flags; with T 6, G 4 and k 2: trained steps, NFE, pictures, optimizer steps
    "grpo_merge": ({}, [0, 1, 2], 6 + 4 * (5 + 4 + 3), 13, 3),
    "grpo_merge, cps, strides": (
        {"algorithm": "grpo_merge", "sde_type": "cps", "eta_step_list": [1, 3], "eta_step_merge_list": [2, 1],
         "granular_list": [1, 2]}, [1, 3], 6 + 4 * (3 + 2 - 1) + 4 * (2 + 1 - 1), 17, 2),
    "grpo_merge, dance": (
        {"algorithm": "grpo_merge", "sde_type": "dance", "entropy_threshold": 1.0},  # merged in twos
        [0, 1, 2], 6 + 4 * (4 + 3 + 2), 13, 3),
    "granular_grpo": ({"granular_list": "1,3"}, [0, 1, 2], 6 + 4 * (5 + 2 - 1 + 4 + 2 - 1 + 3 + 1 - 1), 25, 3),
    "branch_grpo": ({"tree_split_points": [0, 2]}, [0, 1, 2, 3, 4], 1 + 2 + 2 + 4 * 3, 4, 8),
    "branch_grpo, flow": (
        {"algorithm": "branch_grpo", "sde_type": "flow", "tree_split_points": [1, 2], "tree_fusion": "probability"},
        [1, 2, 3, 4], 1 + 1 + 2 + 4 * 3, 4, 7),
    "branch_grpo, pruned": (
        {"algorithm": "branch_grpo", "tree_split_points": [0, 2], "tree_width_prune": 2, "depth_pruning": [4, 5],
         "depth_pruning_slide_interval": 1}, [0, 1, 2], 1 + 2 + 2 + 4 * 3, 4, 8),
    "branch_grpo_mix": ({"tree_split_points": [0, 3]}, [0, 1, 3], 1 + 2 * 3 + 4 * 2, 4, 3),
    "branch_grpo_mix, cps": (
        {"algorithm": "branch_grpo_mix", "sde_type": "cps", "tree_split_points": [0, 3], "eta": 0.5,
         "tree_split_noise_scale": 1.3}, [0, 1, 3], 1 + 2 * 3 + 4 * 2, 4, 3),
    "flow_grpo, cps": ({"algorithm": "flow_grpo", "sde_type": "cps"}, [0, 1, 2, 3, 4], 1 + 5 * 4, 4, 2),
    "dance_grpo, cps": (
        {"algorithm": "dance_grpo", "sde_type": "cps", "timestep_fraction": 1}, [0, 1, 2, 3, 4], 1 + 5 * 4, 4, 2),
}  # fmt: skip


@pytest.mark.parametrize("sde_type", SDE_KINDS)
@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name not in DRAWN])
def test_every_kind_of_stochastic_step_goes_with_every_algorithm(train, monkeypatch, algorithm, sde_type):
    kinds, real = set(), train_grpo_flux.make_plan
    monkeypatch.setattr(
        train_grpo_flux, "make_plan", lambda *a: [kinds.add(s.kind) for s in real(*a) if s.train] and real(*a)
    )
    given = {"eta_step_list": [1, 2]} if algorithm in MERGES else SPLITS.get(algorithm, {})
    if algorithm == "grpo_merge":
        given = {**given, "eta_step_merge_list": [2, 1]}
    run = train(
        algorithm=algorithm,
        sde_type=sde_type,
        max_train_steps=1,
        rollout_batch_size=1,
        train_micro_batch_size=1,
        **given,
    )
    assert kinds == {SDE_KINDS[sde_type]}
    assert run.metrics[0]["ratio_first_deviation"] == 0 and run.metrics[0]["grad_norm"] > 0


@pytest.mark.parametrize("name", SMALL)
def test_every_algorithm_trains_and_starts_with_a_ratio_of_exactly_one(train, tiny_flux, name):
    given, window, evaluations, pictures, steps = SMALL[name]
    given = {"algorithm": name, "learning_rate": 1e-4, **given}
    run = train(rollout_batch_size=1, train_micro_batch_size=1, **given)
    assert run.metrics[0]["window"] == window
    for line in run.metrics:
        assert (line["nfe"], line["images"], line["optimizer_steps"]) == (evaluations, pictures, steps)
        assert line["grad_norm"] > 0 and line["ratio_first_deviation"] == 0
        assert len(line["entropies"]) == len(line["merges"]) == len(line["window"])
        assert ("eval_reward" in line) == ("merge" in name or "granular" in name)
    assert json.loads((run.folder / "args.json").read_text())["algorithm"] == given["algorithm"]
    assert not same_weights(run.weights(), base_weights(tiny_flux))


def test_one_split_at_the_first_step_is_flat_grpo(train):
    flat = train(algorithm="dance_grpo", gradient_accumulation_steps=4, timestep_fraction=1.0, image_log_steps=1)
    tree = train(
        algorithm="branch_grpo", tree_split_points=[0], tree_split_children=4, tree_split_noise_scale=1,
        clip_range=1e-4, gradient_accumulation_steps=100, image_log_steps=1,
    )  # fmt: skip
    assert flat.numbers() == tree.numbers()
    assert same_weights(flat.weights(), tree.weights())


@pytest.mark.parametrize("algorithm", ["grpo_merge", "granular_grpo"])
def test_sharing_on_or_off_gives_the_same_pictures_and_gradients(train, algorithm):
    given = {"algorithm": algorithm, "max_train_steps": 1, "train_batch_size": 2, "image_log_steps": 1}
    shared, alone = train(**given), train(share_prefix=False, **given)
    pictures = [
        np.asarray(Image.open(run.folder / "images/iteration_000001.png")).astype(int) for run in (shared, alone)
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert relative_difference(shared.gradient(), alone.gradient()) < 5e-4
    (one,), (other,) = shared.metrics, alone.metrics
    for name in ("reward", "eval_reward", "grad_norm"):
        assert one[name] == pytest.approx(other[name], rel=1e-3)
    assert one["nfe"] < other["nfe"]


def test_e_grpo_evaluates_the_gradient_once_a_group(train, velocity_calls):
    rows = {True: 0, False: 0}  # evaluated in the rollout and in training

    def counting(velocity, sampling):
        rows[sampling] += len(velocity)
        return velocity

    velocity_calls(counting)
    run = train(algorithm="grpo_merge", train_batch_size=2, max_train_steps=1)
    assert rows == {True: run.metrics[0]["nfe"], False: 2 * 3}


def test_strides_add_their_advantages(train, monkeypatch):
    calls, totals = [], []
    mix, advantages = advantage_maths.mix_advantages, train_grpo_flux.plan_advantages
    monkeypatch.setattr(advantage_maths, "mix_advantages", lambda *a: calls.append(mix(*a)) or calls[-1])
    monkeypatch.setattr(train_grpo_flux, "plan_advantages", lambda *a: totals.append(advantages(*a)) or totals[-1])
    train(algorithm="granular_grpo", granular_list=[1, 2, 3], eta_step_list=[0, 2], max_train_steps=1)
    ((total, _),) = totals
    assert len(calls) == 2 * 3
    for number, found in enumerate(total.values()):
        parts = [part for part, _ in calls[3 * number : 3 * number + 3]]
        np.testing.assert_allclose(found, sum(parts))
        assert all(np.abs(part).max() > 0.1 for part in parts)


def test_pruned_edges_are_not_trained(train, monkeypatch):
    seen, real = [], transition_maths.slice_transitions
    monkeypatch.setattr(transition_maths, "slice_transitions", lambda *a: seen.append(real(*a)) or seen[-1])
    train(
        algorithm="branch_grpo", num_generations=8, tree_split_points=[0, 2, 3], tree_width_prune=1, depth_pruning=[2],
        train_batch_size=2, max_train_steps=1,
    )  # fmt: skip
    (transitions,) = seen
    counts = {position: [t.prompt for t in transitions if t.position == position] for position in range(5)}
    # rows 2, 2 (depth 2, pruned), 4, 8, 8: of the last two the better half
    assert {p: len(found) for p, found in counts.items()} == {0: 4, 1: 0, 2: 8, 3: 8, 4: 8}
    assert all(found.count(0) == found.count(1) for found in counts.values())
    assert sum(t.weight for t in transitions) == pytest.approx(1)
    assert {t.child // 2 for t in transitions if t.position == 3} == set(range(8))  # one of each pair


def test_all_rows_are_trained_where_only_steps_before_the_last_split_are(train, monkeypatch):
    seen, real = [], transition_maths.slice_transitions
    monkeypatch.setattr(transition_maths, "slice_transitions", lambda *a: seen.append(real(*a)) or seen[-1])
    train(algorithm="branch_grpo", tree_split_points=[0, 2], depth_pruning=[3, 4, 5], max_train_steps=1)
    (transitions,) = seen
    assert [(t.position, t.child) for t in transitions] == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("algorithm", ["branch_grpo", "branch_grpo_mix", "grpo_merge"])
def test_micro_batches_and_prompts_a_process_change_nothing_but_speed(train, algorithm):
    given = {
        "algorithm": algorithm, "learning_rate": 1e-6, **SPLITS.get(algorithm, {}),
        "tree_width_prune": 0 if algorithm == "grpo_merge" else 2, "reward_model": "custom_rewards:rough_brightness",
    }  # fmt: skip
    run = train(train_batch_size=2, train_micro_batch_size=2, **given)
    for micro, rows in ((1, 3), (100, None)):
        other = train(train_batch_size=2, train_micro_batch_size=micro, rollout_batch_size=rows, **given)
        assert_same_update(other, run)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo_merge", "branch_grpo"])
def test_the_update_does_not_depend_on_how_prompts_lie_on_processes(
    train, flags, run_at, tmp_path, subprocess_environment, algorithm
):
    given = {"algorithm": algorithm, "learning_rate": 1e-6, "prompts_per_iteration": 4}
    given["reward_model"] = "custom_rewards:rough_brightness"
    if algorithm == "branch_grpo":  # of the split's two edges in a tree, one or two are trained: rows differ
        pruning = {"tree_width_prune": 2, "tree_width_prune_share": 0.5, "tree_fusion": "probability"}
        given |= {"tree_split_points": [0, 1, 2], "num_generations": 8, **pruning}
    run = train(**given)
    done = torchrun(flags(output_dir=tmp_path / "two", **given), subprocess_environment)
    assert done.returncode == 0, done.stderr
    assert_same_update(run_at("two"), run)


@pytest.mark.parametrize("algorithm", ["grpo_merge", "branch_grpo_mix", "flow_grpo"])
def test_a_resumed_run_equals_an_uninterrupted_one(train, algorithm):
    given = {"algorithm": algorithm, "max_train_steps": 4, "checkpointing_steps": 2, "lr_scheduler": "linear"}
    if algorithm == "branch_grpo_mix":
        given |= {"tree_split_points": [0, 3], "iters_per_group": 1, "depth_pruning": [5]}
        given |= {"depth_pruning_slide_interval": 2, "tree_width_prune": 1}
    if algorithm == "flow_grpo":
        given["flow_grpo_fast_steps"] = 2
    whole = train("whole", **given)
    rest = train("rest", **given, resume_from_checkpoint=whole.checkpoints[0])
    assert rest.numbers() == whole.numbers()[2:]
    assert same_weights(rest.weights(), whole.weights())


# --- ratio drift ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["mix_grpo", "grpo_merge", "branch_grpo"])
def test_recomputed_old_log_probabilities_make_the_first_ratio_exactly_one(train, velocity_calls, algorithm, warned):
    """Here sampling rounds differently from training, like graphs of different shapes."""
    velocity_calls(lambda velocity, sampling: velocity * (1 + 1e-3 * sampling))
    given = {"algorithm": algorithm, **SPLITS.get(algorithm, {}), "train_batch_size": 2, "clip_range": 1e-6}
    given |= {"train_micro_batch_size": 3, "max_train_steps": 1, "mixed_precision": "bf16"}
    with warned("deviates from 1 .* --recompute_old_log_prob"):
        (line,) = train(**given).metrics
    (recomputed,) = train(recompute_old_log_prob=True, **given).metrics
    assert line["ratio_first_deviation"] > 1e-7 and recomputed["ratio_first_deviation"] == 0
    assert line["reward"] == recomputed["reward"]


@pytest.mark.parametrize("algorithm", ["mix_grpo", "grpo_merge", "branch_grpo"])
def test_the_first_ratio_stays_well_inside_the_clip_range_in_bf16(train, algorithm):
    given = {"algorithm": algorithm, **SPLITS.get(algorithm, {}), "mixed_precision": "bf16", "max_train_steps": 1}
    (line,) = train(rollout_batch_size=2, train_micro_batch_size=2, clip_range=1e-4, **given).metrics
    assert line["ratio_first_deviation"] < 1e-5


# --- Flow-GRPO-Fast ---------------------------------------------------------------------------------------------------


def test_a_frozen_start_trains_the_first_steps():
    for algorithm in ("dance_grpo", "flow_grpo"):
        plan = make_plan(config(algorithm=algorithm, frozen_init_timesteps=3), [0])
        assert [step.index for step in plan if step.train] == [0, 1, 2]


def test_flow_grpo_fast_draws_a_few_consecutive_steps_per_iteration(train):
    settings = config(algorithm="flow_grpo", flow_grpo_fast_steps=2, sampling_steps=10)
    plans = [make_plan(settings, [0], number) for number in range(1, 101)]
    drawn = [plan.trained for plan in plans]
    assert {w[0] for w in drawn} == set(range(7)) and all(w == [w[0], w[0] + 1] for w in drawn)
    assert all([s.index for s in plan if s.kind == "flow_sde"] == plan.trained for plan in plans)
    run = train(algorithm="flow_grpo", flow_grpo_fast_steps=2, max_train_steps=4)
    starts = [line["window"][0] for line in run.metrics]
    assert len(set(starts)) > 1
    assert [line["nfe"] for line in run.metrics] == [1 + start + (5 - start) * 4 for start in starts]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv,named",
    [
        ("grpo_merge --eta_step_list 1,2 --eta_step_merge_list 1", ("--eta_step_merge_list 1", "list has 2")),
        ("grpo_merge --eta_step_merge_list 1,1", ("--eta_step_merge_list 1 1", "--eta_step_list has 0")),
        ("grpo_merge --eta_step_list 15", ("--eta_step_list 15", "0 to 14")),
        ("grpo_merge --eta_step_list=-1", ("--eta_step_list -1", "0 to 14")),
        ("grpo_merge --eta_step_list 2 1", ("--eta_step_list 2 1", "ascend")),
        ("grpo_merge --eta_step_list 1 1", ("--eta_step_list 1 1", "once")),
        ("mix_grpo --granular_list 1,2", ("--granular_list 1 2", "grpo_merge or granular_grpo")),
        ("granular_grpo --entropy_threshold 2", ("--entropy_threshold 2.0", "--algorithm grpo_merge")),
        ("dance_grpo --tree_fusion probability", ("--tree_fusion probability", "branch_grpo or branch_grpo_mix")),
        ("flow_grpo --flow_grpo_fast_steps 4 --frozen_init_timesteps 2", ("--frozen_init_timesteps 2", "fast_steps")),
        ("grpo_merge --eta_step_list one", ("--eta_step_list: one", "int")),
        ("grpo_merge --eta_step_list 10 --eta_step_merge_list 6", ("--eta_step_merge_list 6", "step 10", "1 to 5")),
        ("grpo_merge --eta_step_list 10 --eta_step_merge_list 0", ("--eta_step_merge_list 0", "1 to 5")),
        ("grpo_merge --granular_list None", ("--granular_list ",)),
        ("grpo_merge --granular_list 0,1", ("--granular_list 0 1", "at least 1")),
        ("grpo_merge --granular_list 2,2", ("--granular_list 2 2", "once")),
        ("grpo_merge --entropy_threshold 0", ("--entropy_threshold 0",)),
        ("grpo_merge --no_init_same_noise", ("grpo_merge", "--no_init_same_noise")),
        ("grpo_merge --training_strategy part", ("grpo_merge", "--training_strategy part")),
        ("grpo_merge --frozen_init_timesteps 2", ("--frozen_init_timesteps 2", "grpo_merge")),
        ("granular_grpo --eta_step_list 1 --eta_step_merge_list 1", ("--eta_step_merge_list 1", "grpo_merge")),
        ("mix_grpo --eta_step_list 1", ("--eta_step_list 1", "grpo_merge or granular_grpo")),
        ("mix_grpo --flow_grpo_fast_steps 2", ("--flow_grpo_fast_steps 2", "flow_grpo")),
        ("flow_grpo --flow_grpo_fast_steps 24", ("--flow_grpo_fast_steps 24", "23")),
        ("flow_grpo --flow_grpo_fast_steps 2 --timestep_fraction 0.4", ("--timestep_fraction 0.4",)),
        ("branch_grpo --tree_split_points 0 19", ("--tree_split_points 0 19", "0 to 18")),
        ("branch_grpo --tree_split_points 3 0", ("--tree_split_points 3 0", "ascend")),
        ("branch_grpo --tree_split_points None", ("--tree_split_points ",)),
        ("branch_grpo --tree_split_children 1", ("--tree_split_children 1", "at least 2")),
        ("branch_grpo --num_generations 12", ("--num_generations 12", "2^4 = 16")),
        ("branch_grpo --no_share_prefix", ("--no_share_prefix", "branch_grpo")),
        ("branch_grpo --no_init_same_noise", ("branch_grpo", "--no_init_same_noise")),
        ("branch_grpo --timestep_fraction 0.5", ("--timestep_fraction 0.5", "branch_grpo")),
        ("branch_grpo --tree_split_noise_scale 0", ("--tree_split_noise_scale 0",)),
        ("branch_grpo --tree_fusion sum", ("--tree_fusion", "sum", "probability")),
        ("branch_grpo --tree_fusion_temperature 0", ("--tree_fusion_temperature 0",)),
        ("branch_grpo --tree_width_prune 3", ("--tree_width_prune", "3")),
        ("branch_grpo --tree_width_prune_share 0", ("--tree_width_prune_share 0",)),
        ("branch_grpo --depth_pruning 0", ("--depth_pruning 0", "1 and 19")),
        ("branch_grpo --depth_pruning_stop_depth 0", ("--depth_pruning_stop_depth 0",)),
        ("branch_grpo_mix --group_size 19", ("--group_size 19", "18")),
        ("dance_grpo --depth_pruning 3", ("--depth_pruning 3", "branch_grpo")),
        ("dance_grpo --tree_width_prune 1", ("--tree_width_prune 1", "branch_grpo")),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(capsys, argv, named):
    with pytest.raises(SystemExit) as stop:
        train_grpo_flux.main(["--data_json_path", "unused", "--reward_model", "shapes", "--algorithm", *argv.split()])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ": error: " in line and all(text in line for text in named), line


TO_PLAN = ["--pretrained_model_name_or_path", str(ROOT / "data/tiny_flux"), "--reward_model", "shapes"]
TO_PLAN += ["--prompts_file", str(ROOT / "data/tiny_prompts.txt")]


@pytest.mark.parametrize(
    "argv,named",
    [
        ("grpo_merge --entropy_threshold 30", "--entropy_threshold 30.0: no step and no merge"),
        ("branch_grpo --sampling_steps 4 --tree_split_points 0 --depth_pruning 1 2 3", "trains no step"),
    ],
)
def test_a_plan_that_trains_nothing_is_refused_before_anything_is_loaded(capsys, argv, named):
    flags = [*TO_PLAN, "--dry_run", "--algorithm", *argv.split()]
    with pytest.raises(SystemExit) as stop:
        train_grpo_flux.main(flags)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


def test_a_tree_of_one_late_split_trains_that_split_alone(capsys):
    """Other steps can't be trained: before the split all samples are one row, and the last step of cps has no noise."""
    flags = [*TO_PLAN, "--dry_run", "--algorithm", "branch_grpo"]
    flags += "--sde_type cps --eta 0.5 --no_drop_last_sample --sampling_steps 3 --tree_split_points 1".split()
    train_grpo_flux.main(flags)
    plan = [line for line in capsys.readouterr().out.splitlines() if " -> " in line]
    assert ["trained" in line for line in plan] == [False, True, False]


def test_a_dry_run_shows_merges_entropies_and_inactive_steps(capsys):
    flags = [*TO_PLAN, "--dry_run", "--algorithm", "grpo_merge"]
    train_grpo_flux.main(flags)
    text = capsys.readouterr().out
    assert "1 prompt x 97 samples = 97 images" in text and "8 optimizer steps per iteration" in text
    assert "per prompt and iteration: 1012 (without sharing" in text
    trained = [line for line in text.splitlines() if line.endswith(")") and "trained" in line]
    assert [("covers" in line, "e^h" in line) for line in trained] == [(False, True)] * 2 + [(True, True)] * 6
    train_grpo_flux.main([*flags, "--sde_type", "dance", "--eta", "0.65"])
    text = capsys.readouterr().out
    assert "step 7 is inactive: no merge brings its e^h above --entropy_threshold 2.2" in text


def test_the_documentation_s_flags_for_published_recipes_can_be_used():
    names = {"DanceGRPO": "dance_grpo", "Flow-GRPO": "flow_grpo", "E-GRPO": "grpo_merge"}
    names |= {"Granular-GRPO": "granular_grpo", "BranchGRPO": "branch_grpo"}
    table = (ROOT / "docs/algorithms.md").read_text().partition("### Published recipes")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 7
    for name, _, _, given in rows:
        flags = " ".join(re.findall(r"`(--[^`]+)`", given)).split()
        algorithm = names[name.partition(",")[0]] + ("_lora" if "LoRA" in name else "")
        parsed = parse_dataclass(GRPOConfig, ["--algorithm", algorithm, "--data_json_path", "unused", *flags])
        assert flags and parsed != GRPOConfig.create(algorithm=algorithm, data_json_path="unused")


# --- recipes ----------------------------------------------------------------------------------------------------------


def recipes() -> list:
    """Recipes, by name. Those that differ from another one by a name or a planner's numbers only run with --long."""
    names = {recipe_name(path): path for path in RECIPES}
    alike = ("AWM", "FastGRPO", "Granular_GRPO", "flux2_klein_MixGRPO", "flux2_klein_MixGRPO_Flash")
    return [pytest.param(p, id=name, marks=[pytest.mark.long] * (name in alike)) for name, p in names.items()]


@pytest.mark.slow
@pytest.mark.parametrize("script", recipes())
def test_a_recipe_trains_the_tiny_model_and_saves(script, run_at, tiny_flux, embedded_prompts, tmp_path):
    """Runs the recipe's own command line, with its own numbers of steps and samples, in this process."""
    small = "--h 32 --w 32 --reward_model shapes --mixed_precision no --no_gradient_checkpointing --no_use_wandb"
    where = ["--pretrained_model_name_or_path", tiny_flux, "--data_json_path", str(embedded_prompts)]
    where += ["--output_dir", str(tmp_path / "run"), "--max_train_steps", "2", "--train_micro_batch_size", "8"]
    given = [*where, *small.split(), "--dataloader_num_workers", "0"]
    program, *argv = recipe_command(script, tmp_path, *given)
    assert program == "fastvideo/train_grpo_flux.py"
    train_grpo_flux.main(argv)
    run = run_at("run")
    assert [line["step"] for line in run.metrics] == [1, 2]
    assert all(line["grad_norm"] > 0 for line in run.metrics)
    if "lora" in script.stem:
        assert (run.checkpoints[-1] / "pytorch_lora_weights.safetensors").is_file()
    else:
        assert not same_weights(run.weights(), base_weights(tiny_flux))
