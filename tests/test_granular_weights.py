import math

from fastvideo.models.reward_model.granular import SCHEDULES, GranularRewardModel, as_scores
from fastvideo.models.reward_model.utils import compute_reward

import numpy as np
import pytest
import torch

START, END = (0.5, 0.3, 0.2), (0.2, 0.5, 0.3)
IMAGES, PROMPTS = [None] * 3, ["a", "b", "c"]


class ThreePart(GranularRewardModel):
    name = "ThreePart"
    component_names = ("blip", "clip", "aesthetic")
    scores = {"blip": [0.1, 0.2, 0.3], "clip": [1.0, 2.0, 3.0], "aesthetic": [5.0, 6.0, 7.0]}

    def score_components(self, images, prompts):
        return {name: np.asarray(values, dtype=float) for name, values in self.scores.items()}


def fraction(schedule, p, gamma=None):
    """Share of the way from start to end at progress p, computed independently."""
    return {
        "linear": p,
        "exponential": p ** (gamma or 2.0),
        "logarithmic": 1 - (1 - p) ** (gamma or 0.5),
        "cosine": (1 - math.cos(math.pi * p)) / 2,
    }[schedule]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("gamma", [None, 0.7, 3.0])
@pytest.mark.parametrize("step", [0, 1, 30, 150, 299, 300])
def test_weights_follow_the_formula(schedule, gamma, step):
    weights = ThreePart(START, END, schedule, gamma).get_dynamic_weights(step, 300)
    f = fraction(schedule, step / 300, gamma)
    np.testing.assert_allclose(weights, [s + (e - s) * f for s, e in zip(START, END, strict=True)], rtol=1e-12)


def test_hand_computed_weights_at_half_time():
    model = ThreePart(START, END)
    np.testing.assert_allclose(model.get_dynamic_weights(5, 10), [0.35, 0.4, 0.25])
    np.testing.assert_allclose(model.get_dynamic_weights(5, 10, "cosine"), [0.35, 0.4, 0.25])
    np.testing.assert_allclose(model.get_dynamic_weights(5, 10, "exponential"), [0.425, 0.35, 0.225])
    slow = 1 - math.sqrt(0.5)
    np.testing.assert_allclose(
        model.get_dynamic_weights(5, 10, "logarithmic"), [0.5 - 0.3 * slow, 0.3 + 0.2 * slow, 0.2 + 0.1 * slow]
    )


def test_a_schedule_can_be_given_as_a_function():
    model = ThreePart(START, END, "linear")
    np.testing.assert_allclose(model.get_dynamic_weights(5, 10, lambda s, e, p: e), END)
    np.testing.assert_allclose(model.get_dynamic_weights(5, 10, lambda s, e, p: 2), [1 / 3] * 3)
    np.testing.assert_allclose(
        model.get_dynamic_weights(5, 10, model._exponential_smooth), model.get_dynamic_weights(5, 10, "exponential")
    )


def test_schedules_are_functions_of_the_class_with_the_documented_gammas():
    slow = 1 - math.sqrt(0.5)
    assert ThreePart._linear_smooth(0.5, 0.2, 0.5) == pytest.approx(0.35)
    assert ThreePart._exponential_smooth(0.5, 0.2, 0.5) == pytest.approx(0.425)
    assert ThreePart._exponential_smooth(0.5, 0.2, 0.5, gamma=1.0) == pytest.approx(0.35)
    assert ThreePart._logarithmic_smooth(0.5, 0.2, 0.5) == pytest.approx(0.5 - 0.3 * slow)
    assert ThreePart._logarithmic_smooth(0.5, 0.2, 0.5, 1.0) == pytest.approx(0.35)
    assert ThreePart._logarithmic_smooth(0.5, 0.2, 0.0) == 0.5


@pytest.mark.parametrize("schedule", ["exponential", "logarithmic"])
def test_a_model_s_gamma_applies_to_its_schedules_in_every_form(schedule):
    function = getattr(ThreePart, f"_{schedule}_smooth")
    expected = ThreePart(START, END, schedule, 3.0).get_dynamic_weights(5, 10)
    model = ThreePart(START, END, "linear", 3.0)
    np.testing.assert_allclose(model.get_dynamic_weights(5, 10, schedule), expected)
    np.testing.assert_allclose(model.get_dynamic_weights(5, 10, function), expected)
    np.testing.assert_allclose(
        ThreePart(START, END).get_dynamic_weights(5, 10, lambda s, e, p: function(s, e, p, gamma=3.0)), expected
    )


def test_weights_at_one_step_are_a_list_of_numbers():
    for step in (5, 5.0, np.int64(5)):
        weights = ThreePart(START, END).get_dynamic_weights(curr_step=step, total_steps=10, smooth_func=None)
        assert type(weights) is list and all(type(weight) is float for weight in weights)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_progress_is_clamped_to_the_endpoints(schedule):
    model = ThreePart(START, END, schedule)
    for step, expected in [(-5, START), (0, START), (300, END), (1000, END)]:
        np.testing.assert_allclose(model.get_dynamic_weights(step, 300), expected, rtol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_are_normalised_after_the_schedule(schedule):
    model = ThreePart((5, 3, 2), (1, 1, 0), schedule)
    for step in (0, 3, 10):
        raw = np.array([5, 3, 2]) + (np.array([1, 1, 0]) - [5, 3, 2]) * fraction(schedule, step / 10)
        weights = model.get_dynamic_weights(step, 10)
        np.testing.assert_allclose(weights, raw / raw.sum(), rtol=1e-12)
        assert sum(weights) == pytest.approx(1, abs=1e-12)


def test_an_array_of_steps_gives_a_row_of_weights_each():
    model = ThreePart(START, END, "exponential")
    steps = np.array([0, 5, 10])
    expected = [model.get_dynamic_weights(step, 10) for step in steps]
    np.testing.assert_array_equal(model.get_dynamic_weights(steps, 10), expected)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (
            ((0.5, 0.5), END),
            r"granular_start_weights 0.5 0.5: expected 3 weights, one for each of blip, clip",
        ),
        ((START, (1, 2, 3, 4)), "granular_end_weights .* expected 3 weights"),
        (((0.5, -0.1, 0.6), END), "granular_start_weights .* finite number >= 0"),
        ((START, (0.5, math.nan, 0.5)), "granular_end_weights .* finite number >= 0"),
        (((math.inf, 1, 1), END), "granular_start_weights .* finite number >= 0"),
        (((0, 0, 0), END), "granular_start_weights .* at least one weight .* above 0"),
        ((("a", 1, 1), END), "granular_start_weights .* expected one number for each"),
        ((START, None), "granular_end_weights None: expected one number for each"),
        ((START, END, "quadratic"), "granular_schedule 'quadratic': choose from linear, exponential, log"),
        ((START, END, "linear", 0), "granular_gamma 0: must be a finite number above 0"),
        ((START, END, "linear", math.nan), "granular_gamma nan"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        ThreePart(*arguments)
    assert "\n" not in str(error.value)


def test_wrong_steps_are_refused():
    model = ThreePart(START, END)
    with pytest.raises(ValueError, match="total_steps 0: must be above 0"):
        model.get_dynamic_weights(1, 0)
    with pytest.raises(ValueError, match="curr_step nan: must be finite"):
        model.get_dynamic_weights(math.nan, 10)
    with pytest.raises(ValueError, match="smooth_func 'log': choose from"):
        model.get_dynamic_weights(1, 10, "log")
    with pytest.raises(ValueError, match="curr_step was given without total_steps"):
        model(IMAGES, PROMPTS, curr_step=1)
    with pytest.raises(ValueError, match="curr_step has 2 entries for 3 images"):
        model(IMAGES, PROMPTS, curr_step=np.array([1, 2]), total_steps=10)


def test_the_reward_is_the_weighted_sum_of_the_components():
    model = ThreePart(START, END)
    blip, clip, aesthetic = (np.array(values) for values in ThreePart.scores.values())
    np.testing.assert_allclose(model(IMAGES, PROMPTS), 0.5 * blip + 0.3 * clip + 0.2 * aesthetic)
    np.testing.assert_allclose(model(IMAGES, PROMPTS, 10, 10), 0.2 * blip + 0.5 * clip + 0.3 * aesthetic)


def test_each_image_can_have_its_own_step():
    model = ThreePart(START, END)
    steps = np.array([0, 5, 10])
    expected = [model(IMAGES, PROMPTS, int(step), 10)[i] for i, step in enumerate(steps)]
    np.testing.assert_allclose(model(IMAGES, PROMPTS, steps, 10), expected)
    weights = model.component_weights(steps, 10, 3)
    np.testing.assert_allclose(weights["ThreePart_blip"], [0.5, 0.35, 0.2])
    np.testing.assert_allclose(sum(weights.values()), 1)


def test_component_weights_without_a_step_are_the_start_weights():
    weights = ThreePart((5, 3, 2), END).component_weights(None, None, 2)
    assert {name: values.tolist() for name, values in weights.items()} == {
        "ThreePart_blip": [0.5, 0.5],
        "ThreePart_clip": [0.3, 0.3],
        "ThreePart_aesthetic": [0.2, 0.2],
    }


def test_a_model_must_score_the_components_it_names():
    class Partial(ThreePart):
        scores = {"blip": [1, 2, 3]}

    with pytest.raises(ValueError, match=r"ThreePart scored \['blip'\], expected"):
        Partial(START, END)(IMAGES, PROMPTS)


class Checked(ThreePart):
    """ThreePart with a check: a yes/no question without a weight."""

    check_names = ("right",)
    scores = {**ThreePart.scores, "right": [1.0, 0.0, math.nan]}


@pytest.mark.parametrize("step", [None, 0, 4, 10, np.array([0, 5, 10])])
def test_a_check_is_reported_and_moves_no_reward(step):
    total = None if step is None else 10
    plain, checked = (
        compute_reward(IMAGES, PROMPTS, {"ThreePart": kind(START, END)}, {"ThreePart": 1.0}, step, total)
        for kind in (ThreePart, Checked)
    )
    np.testing.assert_array_equal(checked[0], plain[0])
    assert checked[1].all()  # a check without an answer fails no sample
    assert list(checked[2]) == [*plain[2], "ThreePart_right"]
    np.testing.assert_array_equal(checked[2]["ThreePart_right"], [1, 0, math.nan])
    assert checked[3]["ThreePart_right"].tolist() == [True, True, False]
    assert "ThreePart_right" not in Checked(START, END).component_weights(step, total, 3)
    assert np.shape(Checked(START, END).get_dynamic_weights(5, 10)) == (3,)


def test_a_model_must_answer_its_checks():
    class Silent(Checked):
        scores = ThreePart.scores

    with pytest.raises(ValueError, match=r"expected \['aesthetic', 'blip', 'clip', 'right'\]"):
        Silent(START, END)(IMAGES, PROMPTS)


def test_compute_reward_logs_components_beside_their_sum():
    granular, plain = ThreePart(START, END), lambda images, prompts: [10, 20, 30]
    rewards, successes, scores, oks = compute_reward(
        IMAGES, PROMPTS, {"ThreePart": granular, "Plain": plain}, {"ThreePart": 3.0, "Plain": 1.0}, 10, 10
    )
    parts = [scores[f"ThreePart_{c}"] for c in granular.component_names]
    np.testing.assert_allclose(scores["ThreePart"], 0.2 * parts[0] + 0.5 * parts[1] + 0.3 * parts[2])
    np.testing.assert_allclose(rewards, 0.75 * scores["ThreePart"] + 0.25 * np.array([10, 20, 30]))
    assert successes.all() and rewards.dtype == np.float64
    assert list(scores) == ["ThreePart", "ThreePart_blip", "ThreePart_clip", "ThreePart_aesthetic", "Plain"]
    assert scores.keys() == oks.keys() and all(ok.dtype == bool and ok.all() for ok in oks.values())


def test_reward_weights_count_relative_to_their_sum():
    models = {"A": lambda images, prompts: [1, 2, 3], "B": lambda images, prompts: [5, 5, 5]}
    small, large = (compute_reward(IMAGES, PROMPTS, models, w)[0] for w in ({"A": 0.1, "B": 0.3}, {"A": 10, "B": 30}))
    np.testing.assert_allclose(small, large)
    np.testing.assert_allclose(small, [4.0, 4.25, 4.5])


@pytest.mark.parametrize("failed", [math.nan, math.inf, -math.inf, None])
def test_a_failed_score_is_never_invented(failed):
    models = {"A": lambda images, prompts: [1, failed, 3], "B": lambda images, prompts: [5, 5, 5]}
    rewards, successes, scores, oks = compute_reward(IMAGES, PROMPTS, models, {"A": 1, "B": 1})
    np.testing.assert_array_equal(rewards, [3, 0, 4])
    np.testing.assert_array_equal(successes, [True, False, True])
    np.testing.assert_array_equal(scores["A"], [1, math.nan, 3])
    np.testing.assert_array_equal(oks["A"], [True, False, True])
    assert oks["B"].all()


def test_models_of_no_weight_are_logged_and_cannot_fail_a_sample():
    models = {"A": lambda images, prompts: [1, 2, 3], "Log": lambda images, prompts: [math.nan, 2, 3]}
    for weights in ({"A": 1.0}, {"A": 1.0, "Log": 0.0}):
        rewards, successes, scores, _ = compute_reward(IMAGES, PROMPTS, models, weights)
        np.testing.assert_array_equal(rewards, [1, 2, 3])
        assert successes.all() and "Log" in scores


def test_a_failed_component_fails_the_sum_only_while_it_has_weight():
    class Failing(ThreePart):
        scores = {**ThreePart.scores, "aesthetic": [5.0, math.nan, 7.0]}

    model = Failing((0.5, 0.5, 0), (0.5, 0.4, 0.1))
    for step, finite in [(0, True), (5, False)]:
        _, successes, scores, oks = compute_reward(IMAGES, PROMPTS, {"M": model}, {"M": 1}, step, 10)
        assert successes.tolist() == [True, finite, True]
        assert oks["M_aesthetic"].tolist() == [True, False, True] and oks["M_blip"].all()
        assert np.isfinite(scores["M"][1]) == finite


def test_a_broken_scorer_is_no_failed_sample():
    def broken(images, prompts):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        compute_reward(IMAGES, PROMPTS, {"A": broken}, {"A": 1})


@pytest.mark.parametrize(
    "models,weights,message",
    [
        ({"A": lambda i, p: [1, 2]}, {"A": 1}, "A returned scores of shape .* for 3 pictures"),
        ({"A": lambda i, p: [1, 2, 3]}, {"B": 1}, r"reward_weights names \['B'\]"),
        ({"A": lambda i, p: [1, 2, 3]}, {"A": -1}, "must be finite, >= 0 and not all 0"),
        ({"A": lambda i, p: [1, 2, 3]}, {"A": 0}, "must be finite, >= 0 and not all 0"),
        ({"A": lambda i, p: [1, 2, 3]}, {"A": math.nan}, "must be finite, >= 0 and not all 0"),
    ],
)
def test_compute_reward_refuses_what_it_cannot_add_up(models, weights, message):
    with pytest.raises(ValueError, match=message):
        compute_reward(IMAGES, PROMPTS, models, weights)


class Named:
    """A model without `name`, as the reference's are: the name is the class's."""

    def __call__(self, images, prompts):
        return [4, 5, 6]


def test_models_can_be_a_list():
    granular = ThreePart(START, END)
    arguments = {"ThreePart": 3.0, "Named": 1.0}, 10, 10
    as_list = compute_reward(IMAGES, PROMPTS, [granular, named := Named()], *arguments)
    as_dict = compute_reward(IMAGES, PROMPTS, {"ThreePart": granular, "Named": named}, *arguments)
    for found, expected in zip(as_list[:2], as_dict[:2], strict=True):
        np.testing.assert_array_equal(found, expected)
    for found, expected in zip(as_list[2:], as_dict[2:], strict=True):
        assert list(found) == list(expected)
        np.testing.assert_array_equal(list(found.values()), list(expected.values()))
    with pytest.raises(ValueError, match="Named, Named are not different names"):
        compute_reward(IMAGES, PROMPTS, [Named(), Named()], {"Named": 1})


def test_one_text_is_the_prompt_of_all_images():
    seen = []

    class Reading(ThreePart):
        def score_components(self, images, prompts):
            seen.append(prompts)
            return super().score_components(images, prompts)

    def reading(images, prompts):
        seen.append(prompts)
        return [1, 2, 3]

    compute_reward(IMAGES, "cat", {"ThreePart": Reading(START, END), "A": reading}, {"A": 1})
    Reading(START, END)(IMAGES, "cat")  # as many letters as images
    assert seen == [["cat"] * 3] * 3


def test_every_image_needs_a_prompt():
    with pytest.raises(ValueError, match="3 images but 2 prompts"):
        compute_reward(IMAGES, PROMPTS[:2], {"A": lambda i, p: [1, 2, 3]}, {"A": 1})


@pytest.mark.parametrize(
    "values",
    [
        [0.5, 1, -2],
        (0.5, True, np.float32(-2)),
        np.array([0.5, 1, -2], np.float16),
        np.array([[0.5], [1], [-2]]),
        torch.tensor([0.5, 1, -2]).bfloat16(),
        torch.tensor([0.5, 1, -2], requires_grad=True),
        torch.tensor([[0.5], [1], [-2]], dtype=torch.float64),
        [torch.tensor(0.5), torch.tensor(1), torch.tensor(-2.0, requires_grad=True)],
    ],
)
def test_scores_are_taken_in_any_number_format_and_as_a_column(values):
    scores = as_scores(values, 3, "A")
    assert scores.dtype == np.float64 and scores.tolist() == [0.5, 1, -2]


@pytest.mark.parametrize(
    "values",
    [
        [1, 2],
        [1, 2, 3, 4],
        torch.zeros(3, 2),
        torch.zeros(()),
        None,
        "abc",
        ["1", "2", "3"],
        {"a": 1},
        [[1], [2, 3], 4],
    ],
)
def test_anything_else_than_a_number_per_picture_is_refused_by_the_model_s_name(values):
    with pytest.raises(ValueError, match="^A returned .* for 3 pictures; expected 3 numbers"):
        as_scores(values, 3, "A")
