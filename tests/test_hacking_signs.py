"""Signs of reward hacking: the measures that training logs, and the smallest change from the baseline that counts."""

import json
from pathlib import Path

from fastvideo.data_preprocess.preprocess_flux_embedding import embed_prompts
from fastvideo.eval.eval_reward import main
from fastvideo.eval.hacking import LIMITS, MIN_PROMPTS, SCORE_LIMIT
from fastvideo.eval.summary import Scores, summarize
from fastvideo.models.reward_model.shapes import all_scenes, draw
from fastvideo.utils.picture_measures import appearance, appearances, mean_distances, pixel_distances

import custom_rewards
import numpy as np
import pytest
from conftest import Run, torchrun
from PIL import Image
from test_eval import make_pictures

MEASURES = ("saturation", "sharpness", "high_frequency", "diversity")
SCENES = all_scenes(withheld=False)[::97][:10]


def logged(line: dict) -> dict[str, float]:
    return {name: line[f"hacking_{name}"] for name in MEASURES}


def mean_looks(groups: list[list[Image.Image]]) -> dict[str, float]:
    """Mean looks of the pictures of each prompt, measured one picture at a time."""
    looks = [appearance(image) for group in groups for image in group]
    found = {name: np.mean([look[name] for look in looks]) for name in MEASURES[:3]}
    return found | {"diversity": np.mean([mean_distances(pixel_distances(group)) for group in groups])}


@pytest.fixture
def trained_pictures(train, monkeypatch):
    """trained_pictures(flag=value, ...) -> a Run, and for each iteration the pictures that the reward got."""

    def run(**given) -> tuple[Run, list[list[Image.Image]]]:
        batches: list[list[Image.Image]] = []

        def keeping(images, prompts):
            batches.append(list(images))
            return custom_rewards.rough_brightness(images, prompts)

        monkeypatch.setattr(custom_rewards, "keeping", keeping, raising=False)
        done = train(reward_model="custom_rewards:keeping", **given)
        parts = len(batches) // len(done.metrics)
        return done, [sum(batches[i : i + parts], []) for i in range(0, len(batches), parts)]

    return run


def test_pictures_measured_together_get_what_each_gets_alone():
    rng = np.random.default_rng(0)
    sizes = [(8, 12), (9, 5), (8, 12), (900, 700), (900, 700), (1, 1)]
    images = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    images += [Image.new("RGB", (12, 8), "red"), images[0].convert("L")]
    found = appearances(images)
    for i, image in enumerate(images):
        assert {name: values[i] for name, values in found.items()} == appearance(image)
    assert len({values[0] for values in found.values()} | {values[2] for values in found.values()}) == 6


@pytest.mark.parametrize("rows", [None, 4, 1])
def test_training_logs_what_its_pictures_look_like_however_they_are_batched(trained_pictures, rows):
    parts = {} if rows is None else {"rollout_batch_size": rows}
    run, pictures = trained_pictures(train_batch_size=3, **parts)
    assert [len(images) for images in pictures] == [12, 12]
    for line, images in zip(run.metrics, pictures, strict=True):
        expected = mean_looks([images[i : i + 4] for i in range(0, 12, 4)])
        assert logged(line) == pytest.approx(expected, rel=1e-9) and min(expected.values()) > 0
    assert logged(run.metrics[0]) != logged(run.metrics[1])


def test_pictures_that_train_nothing_do_not_enter_what_is_logged(trained_pictures):
    """Granular-GRPO's noise-free anchors come last among a prompt's pictures: 1 of 25."""
    run, pictures = trained_pictures(algorithm="granular_grpo", granular_list="1,3", train_batch_size=2)
    for line, images in zip(run.metrics, pictures, strict=True):
        groups = [images[:25], images[25:]]
        assert logged(line) == pytest.approx(mean_looks([group[:-1] for group in groups]), rel=1e-9)
        assert logged(line) != pytest.approx(mean_looks(groups), rel=1e-9) and "eval_reward" in line


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"parallel": "ddp"}, {"sp_size": 2}], ids=["a prompt each", "pictures together"])
def test_two_processes_log_what_one_does(
    train, flags, tmp_path, subprocess_environment, tiny_flux, prompts_file, given
):
    embedded = embed_prompts(tiny_flux, prompts_file, tmp_path / "embedded", max_sequence_length=12)  # can be split
    common = {"data_json_path": embedded, "prompts_per_iteration": 2, "reward_model": "custom_rewards:rough_brightness"}
    alone = train(**common)
    done = torchrun(flags(output_dir=tmp_path / "two", **common, **given), subprocess_environment)
    assert done.returncode == 0, done.stderr[-4000:]
    for one, other in zip(alone.metrics, Run(tmp_path / "two").metrics, strict=True):
        assert logged(other) == pytest.approx(logged(one), rel=1e-3)


# --- against a baseline -----------------------------------------------------------------------------------------------


def signs(tmp_path: Path, base: list[Image.Image], tuned: list[Image.Image], trained: str = "shapes") -> dict:
    """The summary of an evaluation of pictures of SCENES."""
    prompts = [scene.caption() for scene in SCENES]
    manifests = [
        str(make_pictures(tmp_path / name, list(zip(prompts, images, strict=True))))
        for name, images in (("base", base), ("tuned", tuned))
    ]
    argv = ["--manifest", manifests[1], "--baseline_manifest", manifests[0], "--reward_model_type", "shapes"]
    assert main([*argv, "--trained_rewards", trained, "--output_json", str(tmp_path / "s.json")]) == 0
    return json.loads((tmp_path / "s_summary.json").read_text())


@pytest.mark.parametrize("direction", [1, -1])
def test_a_look_is_a_sign_only_if_it_changes_by_more_than_its_limit(tmp_path, direction):
    def pale(saturation: float) -> list[Image.Image]:
        return [Image.new("RGB", (8, 8), (200, round(200 * (1 - saturation)), 200)) for _ in SCENES]

    for share, named in ((0.6, False), (1.6, True)):
        change = 0.3 * (1 + direction * share * LIMITS["saturation"])
        summary = signs(tmp_path / f"{share}", pale(0.3), pale(change))
        low, high = summary["measures"]["saturation"]["difference_interval"]
        assert low > 0 or high < 0  # by more than chance in any case
        assert any(sign.startswith("saturation changed: ") for sign in summary["signs"]) == named


def test_diversity_is_a_sign_only_if_it_falls_by_more_than_its_limit(tmp_path):
    def pairs(distance: float) -> list[tuple[str, Image.Image]]:
        levels = (100, 100 + round(distance))
        return [(f"p{i}", Image.new("RGB", (8, 8), (level,) * 3)) for i in range(10) for level in levels]

    limit, found = LIMITS["diversity_pixels"], {}
    base = str(make_pictures(tmp_path / "base", pairs(100)))
    for share in (-1.5, -0.5, 1.5):
        manifest = str(make_pictures(tmp_path / f"{share}", pairs(100 * (1 + share * limit))))
        argv = ["--manifest", manifest, "--baseline_manifest", base, "--reward_model_type", "jpeg_compressibility"]
        assert main([*argv, "--output_json", str(tmp_path / "s.json")]) == 0
        found[share] = json.loads((tmp_path / "s_summary.json").read_text())["signs"]
    assert {share: any("more alike" in sign for sign in signs) for share, signs in found.items()} == {
        -1.5: True, -0.5: False, 1.5: False,
    }  # fmt: skip


def test_a_part_of_the_trained_reward_that_falls_is_a_sign(tmp_path):
    right = [draw(scene) for scene in SCENES]
    wrong = [draw(scene.mistakes()["shape changed"]) for scene in SCENES]
    found = signs(tmp_path, right, wrong)["signs"]
    starts = ["right in everything fell: -", "part ShapesRewardModel_form of the reward fell: -"]
    assert [sign.startswith(start) for sign, start in zip(found, starts, strict=True)] == [True, True], found
    held_out = signs(tmp_path, right, wrong, trained="jpeg_compressibility")["signs"]
    starts[1] = "ShapesRewardModel, not trained on, fell: -"
    assert [sign.startswith(start) for sign, start in zip(held_out, starts, strict=True)] == [True, True], held_out
    assert signs(tmp_path, wrong, right)["signs"] == []


def judged(
    changes: dict[str, np.ndarray], trained: set[str] | None, before: dict[str, np.ndarray] | None = None
) -> dict:
    """The summary of N prompts with one picture each, for model A (with a part and a check) and model B (with a part).
    Scores that are not named don't change; NaN means failed. Scores are around 0; half of the pictures are right.
    """
    n = len(next(iter(changes.values())))
    scores, half = np.linspace(-1, 1, n), (np.arange(n) < n / 2).astype(float)
    base = dict.fromkeys(("A", "A_part", "B", "B_part"), scores)
    base |= {"A_right": half, "diversity_pixels": scores + 2, "saturation": scores + 2} | (before or {})
    sides = []
    for side in (base, {name: values + changes.get(name, 0) for name, values in base.items()}):
        values = {name: [None if np.isnan(v) else float(v) for v in side[name]] for name in side}
        pictures = [{name: values[name][i] for name in values} for i in range(n)]
        rewards = [{name: v for name, v in picture.items() if name[0] in "AB"} for picture in pictures]
        measures = [{name: v for name, v in picture.items() if name[0] not in "AB"} for picture in pictures]
        both = enumerate(zip(rewards, measures, strict=True))
        entries = [{"index": i, "prompt": f"p{i}", "path": Path("x"), "reward": r, "measures": m} for i, (r, m) in both]
        parts = {"A": ["right"], "B": []}
        models = {name: {"components": ["part"], "checks": checks} for name, checks in parts.items()}
        sides.append(Scores(entries, [], models))
    return summarize(sides[1], sides[0], trained)


FALLS = {
    "A_right": "right in everything fell: -",
    "A_part": "part A_part of the reward fell: -",
    "B": "B, not trained on, fell: -",
}


@pytest.mark.parametrize(
    ("share", "scatter", "trained", "named"),
    [
        (0.8, 0, {"A"}, ()),
        (1.2, 0, {"A"}, ("A_right", "A_part", "B")),
        (1.2, 0, None, ("A_right",)),
        (3.0, 50, {"A"}, ()),
    ],
    ids=["a small effect", "more", "what was trained on isn't known", "more, by chance"],
)
def test_a_fall_is_a_sign_only_beyond_a_small_effect_on_the_baselines_pictures(share, scatter, trained, named):
    """The limit is in standard deviations of the baseline's pictures: A and B have mean 0, so no share would do."""
    n, changes = 200, {}
    for name in ("A", "A_part", "B", "B_part"):
        changes[name] = -share * SCORE_LIMIT * np.linspace(-1, 1, n).std() + scatter * np.tile((1.0, -1.0), n // 2)
    fall = round(share * SCORE_LIMIT * 0.5 * n)  # pictures; the standard deviation of half right is a half
    changes["A_right"] = -(np.arange(n) < fall).astype(float) if not scatter else changes["A"]
    summary = judged(changes, trained)
    for name in changes:
        row = summary["models"][name]
        assert row["difference_mean"] == pytest.approx(-share * SCORE_LIMIT * row["baseline_deviation"], rel=0.2)
        assert (row["difference_interval"][1] < 0) == (not scatter)
    starts = [FALLS[name] for name in named]
    assert [sign[: len(start)] for sign, start in zip(summary["signs"], starts, strict=True)] == starts


@pytest.mark.parametrize(
    ("rises", "trained", "expected"),
    [
        ({}, {"A"}, True),
        ({"A": 1, "A_part": 1}, {"A"}, True),  # A is the training reward
        ({"A_right": 1}, {"A"}, False),
        ({"A_right": 1}, None, False),
        ({"B": 1}, {"A"}, False),
        ({"B": 1}, None, True),  # unknown whether B is the training reward
        ({"B": 1}, {"A", "B"}, True),
        ({"B": 0.1}, {"A"}, True),  # too little: a twentieth of a standard deviation
        ({"B": -0.1}, {"A"}, True),
        ({"B_part": 1, "saturation": 0.1}, {"A"}, True),
    ],
)
def test_pictures_more_alike_are_no_sign_where_what_was_not_trained_on_got_better(rises, trained, expected):
    n = 200
    beyond = (LIMITS["diversity_pixels"] + 0.05) * 2  # the baseline's mean is 2
    rise = {"A_right": (np.arange(n) >= 0.7 * n).astype(float)}
    changes = {name: sign * rise.get(name, np.full(n, 0.3)) for name, sign in rises.items()}
    summary = judged(changes | {"diversity_pixels": np.full(n, -beyond)}, trained)
    found = [
        sign for sign in summary["signs"] if sign.startswith("diversity_pixels: pictures of a prompt are more alike")
    ]
    assert len(found) == len(summary["signs"]) == expected


def test_a_rise_by_chance_or_of_few_prompts_does_not_excuse_that_pictures_are_more_alike():
    n = 40
    beyond = np.full(n, -(LIMITS["diversity_pixels"] + 0.05) * 2)
    chance = 0.2 + np.tile((1.0, -1.0), n // 2)
    few = np.where(np.arange(n) < MIN_PROMPTS - 1, 0.2, np.nan)
    enough = np.where(np.arange(n) < MIN_PROMPTS, 0.2, np.nan)
    for rise, named in ((chance, True), (few, True), (enough, False)):
        signs = judged({"B": rise, "diversity_pixels": beyond}, {"A"})["signs"]
        assert [sign.split(":")[0] for sign in signs] == ["diversity_pixels"] * named


def test_the_toy_worlds_runs_are_told_apart():
    """Uses measured numbers. B is the size of JPEG files, either held out or the only training reward."""
    rng, n = np.random.default_rng(0), 540
    before = {"A_right": (np.arange(n) < 0.43 * n).astype(float), "B": rng.normal(-1.17, 0.05, n)}

    def right(after: float) -> np.ndarray:
        return (np.arange(n) < after * n).astype(float) - before["A_right"]

    looks = {"diversity_pixels": np.full(n, -0.7 * 2), "saturation": np.full(n, 0.03 * 2)}
    healthy = {"A_right": right(0.86), "B": np.full(n, -0.13 * 0.05), **looks}
    assert judged(healthy, {"A"}, before)["signs"] == []
    small = {
        "A_right": right(0),
        "A": np.full(n, -0.5),
        "B": np.full(n, 0.3),
        "diversity_pixels": np.full(n, -0.48 * 2),
    }
    found = [sign.split(" fell")[0].split(":")[0] for sign in judged(small, {"B"}, before)["signs"]]
    assert found == ["right in everything", "A, not trained on,", "diversity_pixels"]


def test_evaluation_leads_with_right_in_everything(tmp_path, capsys):
    right = [draw(scene) for scene in SCENES]
    wrong = [draw(scene.mistakes()["shape changed"]) for scene in SCENES]
    summary = signs(tmp_path, wrong, right[:5] + wrong[5:])
    first, *_, last = summary["models"]
    assert first == "ShapesRewardModel_right" and last != first
    assert [row["kind"] for row in summary["models"].values()] == ["check", "reward", *["component"] * 3]
    assert summary["models"][first]["mean"] == 0.5 and summary["models"][first]["baseline_mean"] == 0
    header, line, *_ = capsys.readouterr().out.splitlines()
    assert header.startswith("score") and line.startswith("right in everything ")
    assert line.split()[3:] == "10 0 0.50 ± 0.17 0.00 ± 0.00 0.50 ± 0.17 75%".split()  # √(¼ / 9); five ties
    assert (tmp_path / "s.csv").read_text().splitlines()[1].startswith("all,ShapesRewardModel_right,check,")
    assert (tmp_path / "s_mean.txt").read_text().count("Mean Reward") == 1  # as in the reference: models only
