"""Evaluation: scores and means in the promised files, errors clustered by prompt, and broken input not overlooked."""

import json
import math
import subprocess
import sys
from pathlib import Path

from fastvideo.eval.eval_reward import EvalConfig, evaluate, main
from fastvideo.eval.statistics import mean_and_error
from fastvideo.models.reward_model.jpeg import jpeg_kilobytes
from fastvideo.models.reward_model.shapes import ShapesRewardModel, all_scenes, draw

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SCENES = all_scenes(withheld=False)[::97][:6]


def brightness(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """A custom reward, `test_eval:brightness`: it fails on pictures that are black."""
    means = [float(np.asarray(image).mean()) for image in images]
    return [mean if mean > 0 else math.nan for mean in means]


def make_pictures(folder: Path, pictures: list[tuple[str, Image.Image]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for index, (prompt, image) in enumerate(pictures):
        image.save(folder / f"{index}.png")
        entries.append({"image": f"{index}.png", "prompt": prompt, "seed": 1, "index": index})
    path = folder / "manifest.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def grey(*levels: int) -> list[tuple[str, Image.Image]]:
    return [(f'prompt "{i // 2}" / 🙂 <b>', Image.new("RGB", (8, 8), (level,) * 3)) for i, level in enumerate(levels)]


def load(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def test_scores_means_and_components_are_those_of_the_models(tmp_path):
    manifest = make_pictures(tmp_path, [(scene.caption(), draw(scene)) for scene in SCENES])
    command = ["--manifest", str(manifest), "--reward-model-type", "shapes,jpeg_compressibility", "--device", "cpu"]
    assert main([*command, "--reward_batch_size", "4"]) == 0
    entries = load(tmp_path / "manifest_scores.json")
    images = [Image.open(tmp_path / entry["image"]) for entry in entries]
    captions = [scene.caption() for scene in SCENES]
    model = ShapesRewardModel([0.5, 0.3, 0.2], [0.5, 0.3, 0.2])
    expected = {"ShapesRewardModel": model(images, captions)}
    expected |= {f"ShapesRewardModel_{key}": list(v) for key, v in model.score_components(images, captions).items()}
    expected["JpegCompressibilityRewardModel"] = [-jpeg_kilobytes(image) for image in images]
    assert [set(entry) for entry in entries] == [{"index", "image", "prompt", "reward"}] * 6
    assert [(entry["index"], entry["prompt"]) for entry in entries] == list(enumerate(captions))
    for key, values in expected.items():
        assert [entry["reward"][key] for entry in entries] == pytest.approx(values)

    means = {key: float(np.mean(values)) for key, values in expected.items()}
    lines = (tmp_path / "manifest_scores_mean.txt").read_text().splitlines()
    assert lines[0] == "Total Successful Samples: 6"
    assert [line.split(" Mean Reward: ")[0] for line in lines[1:]] == [
        "ShapesRewardModel",
        "JpegCompressibilityRewardModel",
    ]
    for line in lines[1:]:
        name, value = line.split(" Mean Reward: ")
        assert float(value) == pytest.approx(means[name])

    summary = load(tmp_path / "manifest_scores_summary.json")
    assert (summary["images"], summary["successful"], summary["skipped"]) == (6, 6, [])
    for key, values in expected.items():
        row = summary["models"][key]
        assert row["mean"] == pytest.approx(means[key])
        assert row["standard_error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(6))


def test_standard_errors_are_clustered_by_prompt():
    rng = np.random.default_rng(0)
    prompts = [str(i // 4) for i in range(40)]
    constant_in_prompt = np.repeat(rng.normal(size=10), 4)
    mean, error = mean_and_error(constant_in_prompt, prompts)
    assert mean == pytest.approx(constant_in_prompt.mean())
    assert error == pytest.approx(np.std(constant_in_prompt[::4], ddof=1) / math.sqrt(10))  # 10 observations, not 40
    values = rng.normal(size=40)
    assert mean_and_error(values, range(40))[1] == pytest.approx(np.std(values, ddof=1) / math.sqrt(40))
    assert math.isnan(mean_and_error([1.0, 2.0], ["a", "a"])[1])
    assert all(map(math.isnan, mean_and_error([], [])))


def test_paired_differences_against_a_baseline(tmp_path):
    tuned = make_pictures(tmp_path / "tuned", grey(100, 110, 50, 70))
    base = make_pictures(tmp_path / "base", grey(90, 90, 60, 60))
    command = [
        "--manifest",
        str(tuned),
        "--baseline_manifest",
        str(base),
        "--reward_model_type",
        "test_eval:brightness",
    ]
    assert main([*command, "--output_json", str(tmp_path / "out" / "s.json")]) == 0
    row = load(tmp_path / "out" / "s_summary.json")["models"]["brightness"]
    change = [10, 20, -10, 10]
    assert (row["pairs"], row["mean"], row["baseline_mean"], row["difference_mean"]) == (4, 82.5, 75, 7.5)
    assert row["difference_standard_error"] == pytest.approx(mean_and_error(change, ["a", "a", "b", "b"])[1])
    assert row["win_rate"] == 0.75
    baseline = load(tmp_path / "out" / "s_baseline.json")
    assert [entry["reward"]["brightness"] for entry in baseline] == [90, 90, 60, 60]
    for file in ("s.json", "s_baseline.json"):
        assert all((tmp_path / "out" / entry["image"]).exists() for entry in load(tmp_path / "out" / file))


def test_a_baseline_of_other_prompts_is_refused(tmp_path):
    tuned = make_pictures(tmp_path / "tuned", grey(100, 110))
    base = make_pictures(tmp_path / "base", [("other", image) for _, image in grey(100, 110)])
    config = EvalConfig(
        manifest=str(tuned), baseline_manifest=str(base), reward_model_type="jpeg_compressibility", device="cpu"
    )
    with pytest.raises(ValueError, match="--baseline_manifest: index 0 is 'other' there"):
        evaluate(config)


def test_broken_pictures_are_named_and_left_out_and_the_exit_status_says_so(tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    manifest = make_pictures(tmp_path, [(f"p{i}", Image.fromarray(noise)) for i in range(5)])
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:2000])
    (tmp_path / "3.png").write_text("no picture")
    assert main(["--manifest", str(manifest), "--reward_model_type", "jpeg_compressibility", "--device", "cpu"]) == 1
    assert [entry["index"] for entry in load(tmp_path / "manifest_scores.json")] == [2, 4]
    summary = load(tmp_path / "manifest_scores_summary.json")
    assert (summary["images"], summary["successful"]) == (5, 2)
    assert [Path(skip["image"]).name for skip in summary["skipped"]] == ["0.png", "1.png", "3.png"]
    assert summary["skipped"][0]["problem"] == "no such file"
    output = capsys.readouterr().out
    assert "0.png: no such file" in output and "1.png: not a readable picture: " in output
    assert "2 of 5 pictures scored" in output


def test_failed_scores_are_null_counted_and_not_averaged_in(tmp_path):
    manifest = make_pictures(tmp_path, grey(100, 0, 50, 30))
    command = ["--manifest", str(manifest), "--reward_model_type", "test_eval:brightness,jpeg_compressibility"]
    assert main(command) == 1
    assert [entry["reward"]["brightness"] for entry in load(tmp_path / "manifest_scores.json")] == [100, None, 50, 30]
    lines = (tmp_path / "manifest_scores_mean.txt").read_text().splitlines()
    assert lines[:2] == ["Total Successful Samples: 3", "brightness Mean Reward: 60.0"]
    row = load(tmp_path / "manifest_scores_summary.json")["models"]["brightness"]
    assert (row["n"], row["failed"]) == (3, 1)


def test_no_score_at_all_is_no_number(tmp_path):
    manifest = make_pictures(tmp_path, grey(0, 0))
    assert main(["--manifest", str(manifest), "--reward_model_type", "test_eval:brightness"]) == 1
    assert (tmp_path / "manifest_scores_mean.txt").read_text().endswith("brightness Mean Reward: nan\n")
    assert load(tmp_path / "manifest_scores_summary.json")["models"]["brightness"]["mean"] is None


def test_one_picture_on_the_command_line(tmp_path):
    draw(SCENES[0]).save(tmp_path / "one.png")
    command = ["--image", str(tmp_path / "one.png"), "--prompt", SCENES[0].caption(), "--reward_model_type", "shapes"]
    run = subprocess.run(
        [sys.executable, "-m", "fastvideo.eval.eval_reward", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0 and "ShapesRewardModel_color" in run.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("[]", "expected a list with at least one entry"),
        ("{", "not a JSON file"),
        ('[{"image": "a.png"}]', 'entry 0 has no text under "image" and "prompt"'),
        ('[{"image": "a.png", "prompt": "a", "index": "x"}]', "entry 0 has the index 'x'"),
        (
            '[{"image": "a.png", "prompt": "a", "index": 1}, {"image": "b.png", "prompt": "b", "index": 1}]',
            "index comes twice",
        ),
        ('[{"image": "a.png", "prompt": "a"}]', "not one picture could be read"),
    ],
)
def test_a_bad_manifest_gives_one_line(tmp_path, content, message):
    path = tmp_path / "m.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"^--manifest.*{message}"):
        main(["--manifest", str(path), "--reward_model_type", "jpeg_compressibility"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "--manifest, --image: give one of them"),
        (["--image", "a.png"], "--image, --prompt: they go together"),
        (
            ["--manifest", "m", "--reward_model_type", "beauty"],
            "--reward_model_type 'beauty': unknown reward; choose from hpsv2",
        ),
        (["--manifest", "m", "--reward_batch_size", "0"], "--reward_batch_size 0: must be at least 1"),
    ],
)
def test_bad_flags_end_with_one_line_and_status_2(command, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_bad_input_on_the_command_line_ends_with_one_line_and_status_2(tmp_path):
    command = ["--manifest", str(tmp_path / "none.json"), "--reward_model_type", "shapes"]
    run = subprocess.run(
        [sys.executable, "-m", "fastvideo.eval.eval_reward", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 2
    assert run.stderr.strip().endswith("none.json: No such file or directory") and run.stderr.count("\n") == 1


def test_missing_reward_files_are_found_before_scoring(tmp_path):
    manifest = make_pictures(tmp_path, grey(1, 2))
    with pytest.raises(ValueError, match="--hps_path /nowhere/hps.pt: no such file"):
        main(["--manifest", str(manifest), "--reward_model_type", "hpsv2", "--hps_path", "/nowhere/hps.pt"])
