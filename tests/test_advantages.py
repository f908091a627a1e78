"""Advantages against numbers worked out by hand, and the order of samples over optimizer steps."""

import math

from fastvideo.config import GRPOConfig
from fastvideo.utils.advantages import group_advantages, mix_advantages, sample_order

import numpy as np
import pytest

NAN = math.nan


def config(**given) -> GRPOConfig:
    return GRPOConfig(prompts_file="prompts.txt", reward_model="shapes", **given)


def advantages(scores: list, trimmed_ratio: float = 0.0, **given) -> tuple[list[float], bool]:
    settings = config(trimmed_ratio=trimmed_ratio, **given)
    found, flat = group_advantages(np.array(scores, dtype=float), settings)
    return found.tolist(), flat.tolist()


def test_a_group_is_normalised_with_the_unbiased_deviation():
    # mean 2.5; squared deviations 2.25 + 0.25 + 0.25 + 2.25 = 5; variance 5/3, deviation 1.290994
    found, flat = advantages([1, 2, 3, 4])
    assert found == pytest.approx([-1.5 / 1.290994, -0.5 / 1.290994, 0.5 / 1.290994, 1.5 / 1.290994], rel=1e-6)
    assert not flat


def test_trimming_leaves_the_lowest_out_of_the_statistics_but_not_out_of_the_group():
    # a quarter of 4 is 1: mean and deviation of [2, 3, 4] are 3 and 1
    assert advantages([3, 1, 4, 2], 0.25)[0] == pytest.approx([0, -2, 1, -1], abs=1e-7)
    # a third of 4, rounded down, is 1 too; a fifth of 4 is 0: no trimming
    assert advantages([3, 1, 4, 2], 0.34)[0] == pytest.approx([0, -2, 1, -1], abs=1e-7)
    assert advantages([3, 1, 4, 2], 0.2) == advantages([3, 1, 4, 2])
    # after trimming one score is left, which has no deviation
    assert advantages([3, 1], 0.5) == ([0, 0], True)


def test_a_failed_sample_leaves_the_statistics_and_gets_nothing():
    # mean and deviation of [1, 2, 3] are 2 and 1; a score of 0 for the failed sample would change both
    assert advantages([1, NAN, 2, 3])[0] == pytest.approx([-1, 0, 0, 1], abs=1e-7)
    # trimming counts scores, not failures: 0.3 of 3 scores is 0 (of 4 samples it would be 1)
    assert advantages([1, NAN, 2, 3], 0.3)[0] == pytest.approx([-1, 0, 0, 1], abs=1e-7)
    # a third of [1, 2, 3] is 1, [2, 3] has mean 2.5 and deviation 0.707107
    assert advantages([1, NAN, 2, 3], 1 / 3)[0] == pytest.approx([-1.5 / 0.707107, 0, -0.5 / 0.707107, 0.5 / 0.707107])
    assert advantages([1, NAN, NAN, NAN]) == ([0, 0, 0, 0], True)
    assert advantages([NAN, NAN]) == ([0, 0], True)
    assert advantages([1, math.inf, 2, 3])[0] == advantages([1, NAN, 2, 3])[0]


def test_a_flat_group_teaches_nothing_and_is_counted():
    assert advantages([0.7, 0.7, 0.7]) == ([0, 0, 0], True)
    assert advantages([0.7, 0.7 + 1e-7, 0.7]) == ([0, 0, 0], True)  # rounding is no spread
    assert advantages([1e6, 1e6 + 0.1, 1e6]) == ([0, 0, 0], True)  # relative to the mean
    assert advantages([0.7, 0.7 + 1e-4, 0.7])[1] is False
    assert advantages([0.3, 0.30001, 0.30002, 0.30001]) == ([0, 0, 0, 0], True)
    assert advantages([0.3, 0.30001, 0.30002, 0.30001], flat_group_std=1e-6)[0] == pytest.approx(
        [-1.225, 0, 1.225, 0], abs=2e-3
    )
    found, flat = group_advantages(np.array([[1.0, 2, 3], [5, 5, 5]]), config())
    np.testing.assert_allclose(found, [[-1, 0, 1], [0, 0, 0]], atol=1e-7)
    assert flat.tolist() == [False, True]


def test_the_lp_norm_gives_a_single_hit_less_than_the_deviation_does():
    # mean 1/12: A = 11/12 once and −1/12 eleven times; Σ|A|^0.8 = 0.93276 + 11·0.13698 = 2.43953, ^1.25: 3.04882
    hit = [1] + [0] * 11
    found, flat = advantages(hit, advantage_norm="lp")
    assert found == pytest.approx([0.916667 / 3.04882] + [-0.083333 / 3.04882] * 11, rel=1e-4) and not flat
    assert advantages(hit)[0][0] == pytest.approx(3.1754, rel=1e-4)
    assert advantages([1, 2, 3], advantage_norm="lp", advantage_p=2)[0] == pytest.approx([-(0.5**0.5), 0, 0.5**0.5])
    # trimming leaves the lowest of [1, 2, 4] out of mean and norm: mean 3, Σ|A| = 2
    assert advantages([1, 2, 4], 0.34, advantage_norm="lp", advantage_p=1)[0] == pytest.approx([-1, -0.5, 0.5])


A, B = np.array([[1.0, 2, 3]]), np.array([[0.0, 0, 3]])
WEIGHTS = {"A": 0.25, "B": 0.75}


def mixed(scores: dict, mix: str, use_group: bool = True, weights: dict = WEIGHTS, trim: float = 0.0):
    settings = config(multi_reward_mix=mix, use_group=use_group, trimmed_ratio=trim)
    found, flat = mix_advantages(scores, weights, settings)
    return found.tolist(), flat


def test_advantage_aggr_weights_normalised_advantages():
    # A: (-1, 0, 1). B: mean 1, deviations (-1, -1, 2), variance 6/2 = 3: (-1, -1, 2)/1.7320508
    expected = [-0.25 - 0.75 * 0.5773503, -0.75 * 0.5773503, 0.25 + 0.75 * 1.1547005]
    found, flat = mixed({"A": A, "B": B}, "advantage_aggr")
    assert found[0] == pytest.approx(expected, rel=1e-6) and flat == 0
    # The scale of a reward does not matter here.
    assert mixed({"A": 100 * A, "B": B}, "advantage_aggr")[0][0] == pytest.approx(expected, rel=1e-6)


def test_reward_aggr_weights_rewards_first():
    # 0.25·A + 0.75·B = (0.25, 0.5, 3): mean 1.25, deviations (-1, -0.75, 1.75), variance 4.625/2, deviation 1.5206906
    found, flat = mixed({"A": A, "B": B}, "reward_aggr")
    assert found[0] == pytest.approx([-1 / 1.5206906, -0.75 / 1.5206906, 1.75 / 1.5206906], rel=1e-6) and flat == 0


def test_scores_without_a_weight_never_enter():
    extra = {"A": A, "B": B, "A_part": np.array([[9.0, NAN, -9]])}
    for mix in ("advantage_aggr", "reward_aggr"):
        assert mixed(extra, mix) == mixed({"A": A, "B": B}, mix)


def test_a_failed_score_counts_nothing_for_its_model_or_fails_the_sample():
    failed = {"A": np.array([[NAN, 1.0, 3]]), "B": B}
    # advantage_aggr: A: mean 2, deviation 1.4142136: (0, -0.7071068, 0.7071068), B as ever
    expected = [-0.75 * 0.5773503, -0.25 * 0.7071068 - 0.75 * 0.5773503, 0.25 * 0.7071068 + 0.75 * 1.1547005]
    assert mixed(failed, "advantage_aggr")[0][0] == pytest.approx(expected, rel=1e-6)
    # reward_aggr: (failed, 0.25, 3), two scores are ± 1/√2
    assert mixed(failed, "reward_aggr")[0][0] == pytest.approx([0, -0.7071068, 0.7071068], abs=1e-6)


def test_a_failing_model_of_weight_zero_fails_nothing():
    failed = {"A": A, "B": np.full((1, 3), NAN)}
    weights = {"A": 1.0, "B": 0.0}
    for mix in ("advantage_aggr", "reward_aggr"):
        assert mixed(failed, mix, weights=weights)[0][0] == pytest.approx([-1, 0, 1], abs=1e-7)


def test_trimming_reaches_both_mixes():
    # [2, 3] of A: mean 2.5, deviation 0.7071068
    for mix in ("advantage_aggr", "reward_aggr"):
        found, _ = mixed({"A": A}, mix, weights={"A": 1.0}, trim=0.34)
        assert found[0] == pytest.approx([-1.5 / 0.7071068, -0.5 / 0.7071068, 0.5 / 0.7071068], rel=1e-6)


def test_weights_may_differ_between_samples():
    """The case of --granular_mix advantage with --granular_progress batch_index."""
    weights = {"A": np.array([[1.0, 0.5, 0]]), "B": np.array([[0, 0.5, 1.0]])}
    # A: (-1, 0, 1), B: (-1, -1, 2)/1.7320508
    found, _ = mixed({"A": A, "B": B}, "advantage_aggr", weights=weights)
    assert found[0] == pytest.approx([-1, -0.5 * 0.5773503, 1.1547005], rel=1e-6)


def test_without_groups_all_samples_share_the_statistics():
    # over both prompts as [1, 2, 3, 4]: deviation 1.290994
    found, flat = mixed({"A": np.array([[1.0, 2], [3, 4]])}, "reward_aggr", use_group=False, weights={"A": 1.0})
    assert sum(found, []) == pytest.approx([-1.161895, -0.387298, 0.387298, 1.161895], abs=1e-6) and flat == 0
    # within groups each is ± 1/√2
    found, _ = mixed({"A": np.array([[1.0, 2], [3, 4]])}, "reward_aggr", weights={"A": 1.0})
    assert sum(found, []) == pytest.approx([-0.707107, 0.707107] * 2, abs=1e-6)
    assert mixed({"A": np.ones((2, 2))}, "reward_aggr", use_group=False, weights={"A": 1.0})[1] == 1


def test_flat_groups_are_counted_once_each():
    scores = {"A": np.array([[1.0, 1], [1, 2], [3, 3]]), "B": np.array([[2.0, 2], [5, 5], [1, 2]])}
    assert mixed(scores, "advantage_aggr")[1] == 3  # flat in one model is enough
    assert mixed(scores, "reward_aggr")[1] == 1


# --- order ------------------------------------------------------------------------------------------------------------

VALUES = np.array([0.5, -1.0, 0.0, 2.0, 1.0, -0.3, 0.0, 0.7, 0.1, -0.2])


def orders(strategy: str | None, count: int = 50) -> list[list[int]]:
    return [sample_order(VALUES, strategy, np.random.default_rng(seed)).tolist() for seed in range(count)]


@pytest.mark.parametrize("strategy", [None, "random", "balance"])
def test_every_sample_comes_exactly_once_and_the_seed_decides(strategy):
    found = orders(strategy)
    assert all(sorted(order) == list(range(10)) for order in found)
    assert orders(strategy) == found
    assert (len({tuple(order) for order in found}) > 40) == (strategy is not None)


def test_without_a_strategy_the_order_stays():
    assert orders(None, 1) == [list(range(10))]


def test_random_puts_every_sample_everywhere():
    places = np.array(orders("random", 400)).argsort(1)
    counts = np.array([np.bincount(places[:, sample], minlength=10) for sample in range(10)])
    assert counts.min() > 15 and counts.max() < 75  # 40 each on average


def test_balance_alternates_good_and_bad_then_the_rest_then_zeros():
    for order in orders("balance"):
        signs = np.sign(VALUES[order]).tolist()
        assert signs == [1, -1] * 3 + [1] * 2 + [0] * 2
    assert {order[0] for order in orders("balance")} == {0, 3, 4, 7, 8}  # shuffled within the good
    assert {order[1] for order in orders("balance")} == {1, 5, 9}


@pytest.mark.parametrize("values", [[0.0, 0, 0], [1.0, 2, 3], [-1.0, -2], [1.0, -1]])
def test_balance_of_one_sided_groups(values):
    order = sample_order(np.array(values), "balance", np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(len(values)))
    assert order.dtype.kind == "i"
