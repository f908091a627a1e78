"""What keeps the clip honest: GRPO-Guard, Flow-DPPO, weights of steps, Precise SDE, and what the metrics show of it."""

import math
from dataclasses import replace

from fastvideo.config import GRPOConfig
from fastvideo.rollout_plan import make_plan, merged_steps
from fastvideo.utils.plan import Plan
from fastvideo.utils.sampling_utils import gaussian_kl, log_prob, normalised_log_ratio, transition_mean
from fastvideo.utils.steps import KINDS, SDE_KINDS, STEP_WEIGHTS, Step, sigma_schedule

import numpy as np
import pytest
import torch
from conftest import assert_same_update, relative_difference

SIGMAS = sigma_schedule(10, 3.0)


def config(**given) -> GRPOConfig:
    return GRPOConfig.create(prompts_file="prompts.txt", reward_model="shapes", **given)


def step(kind: str, first: int, last: int, eta: float = 0.7) -> Step:
    return Step(first, SIGMAS[first], SIGMAS[last], SIGMAS[1], kind, eta, train=True)


# --- GRPO-Guard and Flow-DPPO -----------------------------------------------------------------------------------------


@pytest.fixture
def moved():
    """Transitions of a policy that has moved: x', μ, μ_old [4, 6, 8] and s [4, 1, 1], in double precision."""
    generator = torch.Generator().manual_seed(0)
    old, change, noise = (torch.randn(4, 6, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    std = torch.tensor([0.05, 0.3, 1.0, 2.0], dtype=torch.float64)[:, None, None]
    return old + std * noise, old + 0.1 * change, old, std


def test_the_normalised_log_ratio_is_the_papers_formula(moved):
    sample, mean, old_mean, std = moved
    log_ratio = log_prob(sample, mean, std) - log_prob(sample, old_mean, std)
    expected = std.flatten() * (log_ratio + gaussian_kl(mean, old_mean, std))
    torch.testing.assert_close(normalised_log_ratio(sample, mean, old_mean, std), expected)
    assert normalised_log_ratio(sample, old_mean, old_mean, std).tolist() == [0, 0, 0, 0]


def test_the_mean_of_the_normalised_log_ratio_is_zero_and_its_spread_does_not_depend_on_the_step(moved):
    _, mean, old_mean, std = moved
    noise = torch.randn(4000, *old_mean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain, normalised = (
        torch.stack([f(old_mean + std * eps) for eps in noise])
        for f in (
            lambda x: log_prob(x, mean, std) - log_prob(x, old_mean, std),
            lambda x: normalised_log_ratio(x, mean, old_mean, std),
        )
    )
    expected = gaussian_kl(mean, old_mean, std)
    error = plain.std(0) / math.sqrt(len(plain))
    assert ((plain.mean(0) + expected).abs() < 4 * error).all() and (expected > 10 * error)[0]  # the known fault
    error = normalised.std(0) / math.sqrt(len(normalised))
    assert (normalised.mean(0).abs() < 4 * error).all()
    assert plain.std(0).max() > 10 * plain.std(0).min() and normalised.std(0).max() < 1.5 * normalised.std(0).min()


@pytest.mark.parametrize("given", [{"ratio_norm": True}, {"trust_region": "divergence"}], ids=["guard", "dppo"])
@pytest.mark.parametrize("sde_type", SDE_KINDS)
def test_the_first_ratio_is_one_and_micro_batches_change_nothing(train, given, sde_type):
    settings = {"sde_type": sde_type, "clip_range": 1e-5, "step_weights": "velocity", "learning_rate": 1e-5, **given}
    settings |= {"reward_model": "custom_rewards:rough_brightness", "max_train_steps": 1, "train_batch_size": 2}
    run = train(**settings, train_micro_batch_size=100)
    assert_same_update(train(**settings, train_micro_batch_size=1), run)
    assert run.metrics[0]["ratio_first_deviation"] <= 1e-6


def test_old_means_are_computed_again_with_the_old_log_probabilities(train, velocity_calls):
    """A rollout whose velocities are all wrong by 1 % is made right before training."""
    velocity_calls(lambda velocity, sampling: velocity * (1.01 if sampling else 1))
    settings = {"ratio_norm": True, "clip_range": 1e-5, "max_train_steps": 1}
    (wrong,), (right,) = train(**settings).metrics, train(**settings, recompute_old_log_prob=True).metrics
    assert wrong["ratio_first_deviation"] > 1e-6 and right["ratio_first_deviation"] == 0


def test_a_divergence_limit_near_zero_stops_what_would_go_on_and_a_large_one_nothing(train):
    settings = {"trust_region": "divergence", "gradient_accumulation_steps": 1, "max_train_steps": 1}
    settings |= {"learning_rate": 1e-4, "clip_range": 1e-9}
    strict, free = (train(divergence_limit=limit, **settings).metrics[0] for limit in (1e-30, 1e30))
    assert strict["clip_frac"] > 0 == free["clip_frac"]
    assert free["ratio_max_deviation"] > 1e-9


# --- weights of steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sde_type", SDE_KINDS)
def test_step_weights_are_the_papers_and_their_mean_is_one(sde_type):
    plan = make_plan(config(sde_type=sde_type, sampling_steps=10), [0, 3, 6])
    assert set(plan.step_weights("equal").values()) == {1.0}
    # How far the mean moves with the velocity, by a finite difference.
    moves, noises = [], []
    for position in plan.trained:
        numbers = plan.coefficients[position]
        x, v = torch.tensor(0.3), torch.tensor(0.2)
        low, high = (transition_mean(x, v + change, numbers.x, numbers.v) for change in (-0.5, 0.5))
        moves.append(1 / abs(float(high - low)))
        noises.append(numbers.std)
    for name, expected in (("velocity", moves), ("noise", noises)):
        weights = plan.step_weights(name)
        assert list(weights) == plan.trained
        assert list(weights.values()) == pytest.approx(np.array(expected) / np.mean(expected), rel=1e-4)
    assert set(STEP_WEIGHTS) == {"equal", "velocity", "noise"}


def test_a_steps_weight_multiplies_its_gradient(train):
    """Three weightings of the gradients g0, g1 of two steps: two of them give the third."""
    settings = {"max_train_steps": 1, "gradient_accumulation_steps": 4, "group_size": 2, "max_grad_norm": 1e9}
    plan = make_plan(config(sampling_steps=6, group_size=2), [0, 1])
    (v0, v1), (n0, n1) = (plan.step_weights(name).values() for name in ("velocity", "noise"))
    equal, velocity, noise = (
        train(**settings, step_weights=name).gradient() for name in ("equal", "velocity", "noise")
    )
    g1 = 2 * (velocity - v0 * equal) / (v1 - v0)  # equal = (g0 + g1)/2, velocity = (v0·g0 + v1·g1)/2
    g0 = 2 * equal - g1
    assert relative_difference((n0 * g0 + n1 * g1) / 2, noise) < 1e-3
    assert relative_difference(equal, noise) > 1e-2


# --- Precise SDE ------------------------------------------------------------------------------------------------------


def test_precise_keeps_the_noise_level_and_has_the_papers_noise():
    for first, last in ((1, 2), (4, 5), (8, 9), (2, 6)):
        now, then = SIGMAS[first], SIGMAS[last]
        numbers = KINDS["precise"].coefficients(step("precise", first, last, eta=1.5), [])
        rho = then * (1 - now) / (now * (1 - then))
        assert numbers.std == pytest.approx(then * math.sqrt(1 - rho**2.25))
        # With x = (1 − σ)·x0 + σ·n and v = n − x0 the mean is (1 − σ')·x0 + √(σ'² − s²)·n.
        kept = math.sqrt(then**2 - numbers.std**2)
        for x0, noise in ((1.0, 0.0), (0.0, 1.0), (0.4, -1.3)):
            mean = numbers.x * ((1 - now) * x0 + now * noise) + numbers.v * (noise - x0)
            assert mean == pytest.approx((1 - then) * x0 + kept * noise)


def test_precise_at_both_ends():
    first = KINDS["precise"].coefficients(step("precise", 0, 1), [])
    assert first.std == SIGMAS[1]  # all noise is new
    near = replace(step("precise", 0, 1), sigma=1 - 1e-9)
    assert KINDS["precise"].coefficients(near, []).std == pytest.approx(SIGMAS[1], rel=1e-3)
    last = KINDS["precise"].coefficients(step("precise", 9, 10), [])
    assert last.std == 0 and last.x == 1 and last.v == pytest.approx(-SIGMAS[9])  # x0
    with pytest.raises(ValueError, match="no noise"):
        Plan((step("precise", 0, 9), step("precise", 9, 10))).check()


def test_e_grpo_merges_precise_steps_because_longer_ones_have_more_noise():
    stds = [KINDS["precise"].coefficients(step("precise", 5, last, 0.3), []).std for last in (6, 7, 8)]
    relative = [std / SIGMAS[last] for std, last in zip(stds, (6, 7, 8), strict=True)]
    assert relative == sorted(relative) and len(set(relative)) == 3
    steps = merged_steps(config(algorithm="grpo_merge", sde_type="precise", eta=0.5, entropy_threshold=1.2))
    assert max(s.span for s in steps) > 1 and all(s.kind == "precise" for s in steps)


def test_noise_beyond_the_noise_level_is_refused(refused):
    from fastvideo.cli import parse_dataclass

    tree = (
        "--algorithm branch_grpo --sde_type precise --tree_split_noise_scale 2 --prompts_file p --reward_model shapes"
    )
    with refused("--tree_split_noise_scale 2.0: at most 1 with --sde_type precise"):
        parse_dataclass(GRPOConfig, tree.split())
    make_plan(config(algorithm="branch_grpo", sde_type="precise"), [0, 1, 2, 3])


# --- what the metrics show --------------------------------------------------------------------------------------------


def test_clipping_is_logged_by_side_and_by_step(train):
    settings = {"gradient_accumulation_steps": 1, "learning_rate": 1e-4, "train_batch_size": 2, "max_train_steps": 1}
    (line,) = train(**settings).metrics
    assert line["clip_frac"] == pytest.approx(line["clip_high"] + line["clip_low"]) and line["clip_frac"] > 0.1
    for side in ("clip_high", "clip_low"):
        assert np.mean([line[f"{side}/step_{i}"] for i in (0, 1)]) == pytest.approx(line[side], abs=1e-6)
    for i in (0, 1):
        mean, spread = line[f"log_ratio_mean/step_{i}"], line[f"log_ratio_std/step_{i}"]
        assert math.hypot(mean, spread) <= line["ratio_max_deviation"] * 1.01 and spread > 0
    assert "clip_high/step_2" not in line


def test_statistics_of_steps_do_not_depend_on_micro_batches_or_their_filling(train):
    """Samples draw their own steps, so that optimizer steps differ in transitions."""
    settings = {"algorithm": "dance_grpo", "sampling_steps": 6, "timestep_fraction": 0.4, "learning_rate": 1e-5}
    settings |= {"gradient_accumulation_steps": 2, "max_train_steps": 1, "reward_model": "custom_rewards:brightness"}
    one, other = (train(**settings, train_micro_batch_size=size).metrics[0] for size in (1, 100))
    names = [name for name in one if "/step_" in name]
    assert names == [name for name in other if "/step_" in name] and len(names) >= 8
    for name in names:
        assert one[name] == pytest.approx(other[name], abs=1e-6), name
