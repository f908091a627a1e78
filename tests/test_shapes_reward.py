import dataclasses

from fastvideo.models.reward_model.shapes import (
    BACKGROUNDS,
    COLORS,
    JITTER,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    ShapesRewardModel,
    all_scenes,
    color_and_shape_correct,
    draw,
    hard_checks,
    parse_caption,
)

import numpy as np
import pytest
from PIL import Image

SCENES = all_scenes(withheld=False)[::7] + all_scenes(withheld=True)[::5]
CAPTIONS = [scene.caption() for scene in SCENES]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [draw(scene, tuple(rng.uniform(-JITTER, JITTER, 2))) for scene in SCENES]


def score(images: list[Image.Image], captions: list[str]) -> dict[str, np.ndarray]:
    return ShapesRewardModel([1, 1, 1], [1, 1, 1]).score_components(images, captions)


def next_value(scene: Scene, field: str, values: tuple[str, ...]) -> Scene:
    """The scene with one property changed to another value of the world."""
    value = values[(values.index(getattr(scene, field)) + 1) % len(values)]
    changed = dataclasses.replace(scene, **{field: value})
    return changed if changed.color != changed.background else next_value(changed, field, values)


def test_a_drawn_picture_scores_one_on_its_own_caption(pictures):
    for name, values in score(pictures, CAPTIONS).items():
        assert values.min() > 0.94 and values.max() <= 1, name
    assert all(values.all() for values in hard_checks(pictures, CAPTIONS).values())


@pytest.mark.parametrize(
    ("field", "values", "component"),
    [
        ("color", COLORS, "color"),
        ("background", BACKGROUNDS, "color"),
        ("shape", SHAPES, "form"),
        ("size", tuple(SIZES), "form"),
        ("place", tuple(PLACES), "form"),
    ],
)
def test_a_wrong_property_lowers_its_own_component_only(pictures, field, values, component):
    wrong = [next_value(scene, field, values).caption() for scene in SCENES]
    right, now = score(pictures, CAPTIONS), score(pictures, wrong)
    for name in right:
        change = now[name] - right[name]
        if name == component:
            assert change.max() < -0.15 and change.mean() < -0.25
        else:
            assert abs(change).max() < 1e-12
    checks = hard_checks(pictures, wrong)
    assert not checks.pop(field).any() and all(value.all() for value in checks.values())
    assert color_and_shape_correct(pictures, wrong).any() == (field in ("size", "place"))


def test_noise_lowers_clean_by_degrees_and_leaves_the_colours(pictures):
    rng = np.random.default_rng(1)
    means = [score(pictures, CAPTIONS)]
    for strength in (5, 12, 25):
        arrays = (np.asarray(picture) + rng.normal(0, strength, (32, 32, 3)) for picture in pictures)
        noisy = [Image.fromarray(array.clip(0, 255).astype(np.uint8)) for array in arrays]
        means.append(score(noisy, CAPTIONS))
    clean = [scores["clean"].mean() for scores in means]
    assert all(later < earlier - 0.05 for earlier, later in zip(clean, clean[1:], strict=False))
    assert means[-1]["color"].mean() > 0.95


def test_a_second_shape_is_residue():
    picture = draw(Scene("small", "red", "circle", "left", "black"))
    caption = "a small red circle at the left on a black background"
    before = score([picture], [caption])["clean"][0]
    picture.paste((45, 75, 225), (24, 24, 28, 28))
    assert score([picture], [caption])["clean"][0] < before - 0.2


@pytest.mark.parametrize(("field", "size"), [("x", 16.0), ("y", 16.0)])
def test_form_falls_steadily_as_the_shape_leaves_its_place(field, size):
    scene = Scene("small", "yellow", "square", "center", "blue")
    moves = [(d, 0) if field == "x" else (0, d) for d in range(2, 9)]
    values = score([draw(scene, move) for move in moves], [scene.caption()] * len(moves))["form"]
    assert (np.diff(values) < 0).all()


def test_color_rises_steadily_from_the_wrong_to_the_right_colour():
    caption = "a large red square in the center on a black background"
    values = []
    for share in np.linspace(0, 1, 6):
        picture = Image.new("RGB", (32, 32), (25, 25, 25))
        color = (1 - share) * np.array([45, 75, 225]) + share * np.array([225, 45, 45])
        picture.paste(tuple(int(c) for c in color), (10, 10, 22, 22))
        values.append(score([picture], [caption])["color"][0])
    assert (np.diff(values) > 0).all() and values[-1] > 0.99


def test_a_blank_picture_earns_neither_form_nor_clean():
    blank = [Image.new("RGB", (32, 32), (45, 75, 225))]
    caption = ["a small red circle in the center on a blue background"]
    scores = score(blank, caption)
    assert scores["form"][0] == 0 and scores["clean"][0] == 0 and scores["color"][0] <= 0.5
    assert not color_and_shape_correct(blank, caption).any()


def test_a_caption_of_another_world_is_a_failed_sample(pictures):
    captions = ["a photo of a cat", CAPTIONS[1], "", "a small red circle in the center on a red background"]
    for values in score(pictures[:4], captions).values():
        assert np.isnan(values).tolist() == [True, False, True, True]
    assert np.isnan(score(pictures[:1], ["a cat"])["color"]).all()


def test_captions_are_read_back_as_written():
    for scene in all_scenes(withheld=False) + all_scenes(withheld=True):
        assert parse_caption(scene.caption()) == scene
    loose = "  A small red circle, at the left,  on a Blue background. "
    assert parse_caption(loose) == Scene("small", "red", "circle", "left", "blue")
    assert parse_caption("a small red circle on a blue background").place == "center"


def test_pictures_of_other_sizes_score_like_small_ones(pictures):
    large = [picture.resize((128, 128), Image.BICUBIC) for picture in pictures]
    for name, values in score(large, CAPTIONS).items():
        assert abs(values - score(pictures, CAPTIONS)[name]).max() < 0.06, name


def test_scores_do_not_depend_on_the_batch(pictures):
    together = score(pictures[:6], CAPTIONS[:6])
    for n in range(6):
        alone = score(pictures[n : n + 1], CAPTIONS[n : n + 1])
        assert all(alone[name][0] == pytest.approx(together[name][n], abs=1e-12) for name in together)


def test_withheld_combinations_are_disjoint_and_all_words_are_in_training():
    training, withheld = all_scenes(withheld=False), all_scenes(withheld=True)
    assert not {(s.shape, s.color, s.background) for s in training} & {
        (s.shape, s.color, s.background) for s in withheld
    }
    assert 0.1 < len(withheld) / (len(withheld) + len(training)) < 0.15
    for pair in (("shape", "color"), ("shape", "background"), ("color", "background")):
        seen = {tuple(getattr(scene, field) for field in pair) for scene in training}
        assert seen >= {tuple(getattr(scene, field) for field in pair) for scene in withheld}
