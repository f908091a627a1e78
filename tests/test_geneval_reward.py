"""GenEval: the published rules on made boxes, the detector's outlines, colours, and runs with random weights."""

import json

from fastvideo import train_grpo_flux
from fastvideo.eval import eval_reward
from fastvideo.io.prompts import read_prompts
from fastvideo.models.reward_model.geneval import Detector, GenEvalRewardModel
from fastvideo.models.reward_model.geneval_rules import CLASSES, COLORS, Found, check_wants, judge, relations
from fastvideo.models.reward_model.utils import build_reward_models, compute_reward

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw
from test_reward_registry import config
from test_reward_server import connect, no_proxy_and_short_waits, serve  # noqa: F401  (fixtures)

CASES = json.loads((ROOT / "tests/golden/geneval.json").read_text())
DOG = {"include": [{"class": "dog", "count": 1}]}


def verdict(case: dict) -> tuple[bool, float]:
    colors, objects = {}, {}
    for name, box, confidence, color in case["objects"]:
        found = Found(tuple(box), confidence)
        objects.setdefault(name, []).append(found)
        colors[found] = color
    return judge(objects, case["metadata"], lambda name, found: [colors[each] for each in found])


def test_verdicts_on_made_boxes_are_the_published_ones():
    assert len(CASES) == 240 and 60 < sum(case["right"] for case in CASES) < 180
    for case in CASES:
        check_wants(case["metadata"])
        right, share = verdict(case)
        assert right == case["right"] == (share == 1), case["metadata"]


@pytest.mark.parametrize(
    "x,y,expected",
    [
        (4.1, 0, {"right of"}),  # beyond a tenth of both widths are 2.1, more than half of 4.1
        (3.9, 0, set()),
        (-4.1, 0.1, {"left of"}),
        (0, 4.1, {"below"}),
        (0, -4.1, {"above"}),
        (6, 6, set()),
        (10, -10, {"right of", "above"}),
        (0, 0, set()),
    ],
)
def test_an_object_has_a_place_beyond_a_tenth_of_both_sizes(x, y, expected):
    """Values of the published formula, which agrees on 20,000 random pairs of boxes too."""
    assert relations(Found((x, y, x + 10, y + 10), 0.9), Found((0, 0, 10, 10), 0.9)) == expected


def test_at_most_16_objects_of_a_class_are_counted():
    dogs = [["dog", [0, 0, 9, 9], 0.95, "brown"]] * 20
    for count in (16, 17):
        wants = {"include": [{"class": "dog", "count": count}]}
        assert verdict({"objects": dogs, "metadata": wants})[0] == (count == 16)


def test_what_is_right_in_part_gives_part_of_the_score():
    cup = {"class": "cup", "count": 2, "color": "red", "position": ["left of", 0]}
    wants = {"include": [{"class": "dog", "count": 1}, cup], "exclude": [{"class": "dog", "count": 2}]}
    dog, left, right = ("dog", [50, 0, 60, 10], 0.9, "brown"), [0, 0, 10, 10], [90, 0, 99, 9]

    def score(*objects):
        return verdict({"objects": objects, "metadata": wants})[1]

    red, other = ("cup", left, 0.9, "red"), ("cup", left, 0.8, "blue")
    assert score(dog, red, red) == 1  # the dog, the number of cups, their colour, their place, no second dog
    assert score(dog, red, other) == pytest.approx((1 + 1 + 0.5 + 0 + 1) / 5)
    assert score(dog, red, ("cup", right, 0.8, "red")) == pytest.approx(4 / 5)
    assert score(dog, red) == pytest.approx((1 + 0.5 + 0.5 + 0 + 1) / 5)
    assert score(red, red) == pytest.approx((0 + 1 + 1 + 0 + 1) / 5)  # left of no dog
    assert score(dog, dog, red, red) == pytest.approx(4 / 5)
    assert score(("dog", left, 0.3, "brown")) == pytest.approx(1 / 5)  # confidences up to 0.3 don't count


@pytest.mark.parametrize(
    "entry,problem",
    [
        ({"class": "dgo", "count": 1}, "no class 'dgo'; choose from person, .*computer mouse.*mean dog\\?"),
        ({"class": "dog"}, "count None is no whole number"),
        ({"class": "dog", "count": 1, "color": "teal"}, "no color 'teal'; choose from red"),
        ({"class": "dog", "count": 1, "position": ["left", 0]}, "position .* is no .relation, place"),
        ({"class": "dog", "count": 1, "position": ["above", 1]}, "position .* place of an earlier entry"),
        ("dog", "no class None"),
    ],
)
def test_malformed_wants_are_refused_before_anything_loads(entry, problem, flags, refused, tmp_path):
    wants = {"prompt": "a photo of dogs", **DOG, "tag": "counting"}
    wants["include"] = [*wants["include"], entry]
    (tmp_path / "p.jsonl").write_text(json.dumps(wants))
    files = {"geneval_clip_path": __file__, "geneval_detector_path": "nobody/nothing"}
    with refused(f".*--prompts_file .*p.jsonl: 'a photo of dogs': include, entry 1: {problem}"):
        train_grpo_flux.main(flags(reward_model="geneval", prompts_file=tmp_path / "p.jsonl", **files))


@pytest.fixture(scope="module")
def model(narrow_geneval) -> GenEvalRewardModel:
    return GenEvalRewardModel(narrow_geneval["geneval_detector_path"], narrow_geneval["geneval_clip_path"])


def noise(seed: int, *size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def test_boxes_and_confidences_are_those_of_masks_and_classes(model):
    logits, masks = torch.full((4, 81), -20.0), torch.full((4, 20, 40), -30.0)
    for query, (label, value) in enumerate([("dog", 30.0), ("tv remote", 30.0), ("cat", 30.0), ("cup", -30.0)]):
        logits[query, CLASSES.index(label)] = value
    masks[0, 4:8, 10:20] = 30.0
    masks[1] = -0.5
    masks[1, 5:20, 3:40] = 0.5  # its mean probability is 0.62
    logits[2, -1] = 31.0  # more likely nothing than a cat
    found = model.detector._objects(logits, masks, (40, 80), (20, 40))
    assert set(found) == {"dog", "tv remote"}
    (dog,), (remote,) = found["dog"], found["tv remote"]
    assert dog.box == (10, 4, 20, 8) and dog.confidence == pytest.approx(1, abs=0.05)
    assert dog.mask.shape == (20, 40) and dog.mask.sum() == 40 and dog.mask[4:8, 10:20].all()
    assert remote.box == (3, 5, 40, 20) and remote.confidence == pytest.approx(0.62, abs=0.02)


def test_a_score_depends_on_neither_batch_nor_order_nor_the_other_pictures_size(model):
    images = [noise(0, 40, 40), noise(1, 30, 60), noise(2, 40, 40), noise(3, 1, 400), noise(4, 1, 200)]
    wants = [{"include": [{"class": "cow", "count": 1, "color": "red"}]}, DOG, {}, DOG, DOG]
    shares, details = model.score(images, ["a"] * 5, metadata=wants)
    assert np.isnan([*shares[2:4], *details["right"][2:4]]).all()  # without wants, and too elongated
    assert shares[1] == details["right"][1] == 1 and np.isfinite(shares[4])
    model.batch_size = 1
    again, _ = model.score(images[::-1], ["a"] * 5, metadata=wants[::-1])
    np.testing.assert_array_equal(again[::-1], shares)
    assert np.isnan(model(images[:1], ["a photo of a dog"])).all()  # without metadata


def test_a_colour_is_that_of_the_object_not_of_what_is_around_it(model):
    mask = np.zeros((32, 32), dtype=bool)
    mask[8:20, 10:24] = True
    found = [Found((10, 8, 24, 20), 0.9, mask)]
    seen = []
    for around in ("blue", "yellow"):
        picture = Image.new("RGB", (32, 32), around)
        ImageDraw.Draw(picture).rectangle((10, 8, 23, 19), "red")
        seen.append(model.colors(picture, "cup", found))
    assert seen[0] == seen[1] and seen[0][0] in COLORS
    directions = model._colors("cup")
    assert directions.shape == (10, 768) and torch.allclose(directions.norm(dim=-1), torch.ones(10))


def test_a_detector_of_other_labels_is_refused(narrow_geneval, tmp_path):
    for file in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / file).symlink_to(f"{narrow_geneval['geneval_detector_path']}/{file}")
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["id2label"]["16"] = "wolf"
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="geneval_detector_path .*: its labels have no dog; a model for COCO"):
        Detector(str(tmp_path), "cpu", "fp32")


def test_a_run_trains_on_metadata_and_an_evaluation_has_a_row_per_tag(train, narrow_geneval, tmp_path, capfd):
    wants = [{"prompt": "two dogs", "tag": "counting", "include": [{"class": "dog", "count": 2}]}, {"prompt": "a cat"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, wants)))
    files = {"prompts_file": tmp_path / "p.jsonl", **narrow_geneval}
    run = train(
        reward_model="geneval,shapes:0,jpeg_compressibility", prompts_per_iteration=2, max_train_steps=1, **files
    )
    (line,) = run.metrics
    assert line["failed_GenEvalRewardModel"] == 4 and line["failed_JpegCompressibilityRewardModel"] == 0
    assert line["reward_GenEvalRewardModel"] == line["reward_GenEvalRewardModel_right"] == 0  # 0.75 is below 0.9
    assert line["grad_norm"] > 0
    assert "1 of 2 prompts lack metadata in GenEval's format, such as 'a cat'" in capfd.readouterr().err

    noise(0, 32, 32).save(tmp_path / "noise.png")
    entry = {"image": "noise.png", "prompt": "a dog", "metadata": {"tag": "single_object", **DOG}}
    entries = [entry, entry | {"index": 1, "metadata": wants[0]}]
    (tmp_path / "manifest.json").write_text(json.dumps(entries))
    command = ["--manifest", tmp_path / "manifest.json", "--reward_model_type", "geneval", "--device", "cpu"]
    command += [word for name, value in narrow_geneval.items() for word in (f"--{name}", value)]
    assert eval_reward.main(list(map(str, command))) == 0
    styles = json.loads((tmp_path / "manifest_scores_summary.json").read_text())["styles"]
    assert set(styles) == {"single_object", "counting"}
    scores = json.loads((tmp_path / "manifest_scores.json").read_text())
    assert [entry["reward"]["GenEvalRewardModel_right"] for entry in scores] == [1, 0]


def test_checks_details_and_metadata_travel_from_and_to_a_reward_server(serve, narrow_geneval, narrow_hpsv3):  # noqa: F811
    given = {**narrow_geneval, **narrow_hpsv3, "reward_model": "geneval,hpsv3"}
    here, weights = build_reward_models(config(**given), "cpu")
    there, _ = connect(serve(given.pop("reward_model"), models=here, **given), **given, reward_model="geneval,hpsv3")
    images, prompts, metadata = [noise(0, 40, 40), noise(1, 40, 40)], ["a dog", "a cat"], [DOG, {}]
    wanted, found = (compute_reward(images, prompts, m, weights, metadata=metadata)[2] for m in (here, there))
    assert {"GenEvalRewardModel_right", "HPSv3RewardModel_uncertainty"} < wanted.keys() == found.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values)
    assert wanted["GenEvalRewardModel_right"][0] == 1 and np.isnan(wanted["GenEvalRewardModel"][1])


def test_our_prompts_have_wants_of_all_kinds_and_no_test_prompt_trains():
    files = [
        read_prompts(ROOT / "data" / name, "x") for name in ("geneval_prompts.jsonl", "geneval_prompts_test.jsonl")
    ]
    assert [len(file.prompts) for file in files] == [120, 30]
    assert not set(files[0].prompts) & set(files[1].prompts)
    for file in files:
        assert len({metadata["tag"] for metadata in file.metadata}) == 6
        assert all(check_wants(metadata) is None and metadata["include"] for metadata in file.metadata)
