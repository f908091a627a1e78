"""Evaluation: scores and means in the documented files, errors clustered by prompt, and errors for broken input."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from fastvideo.eval.eval_reward import EvalConfig, evaluate, main
from fastvideo.eval.hacking import clip_distances
from fastvideo.eval.statistics import bootstrap_interval, mean_and_error
from fastvideo.models.reward_model.clip_score import CLIPScoreRewardModel
from fastvideo.models.reward_model.jpeg import jpeg_kilobytes
from fastvideo.models.reward_model.pick_score import PickScoreRewardModel
from fastvideo.models.reward_model.shapes import ShapesRewardModel, all_scenes, draw
from fastvideo.utils.picture_measures import appearance, mean_distances, pixel_distances

import numpy as np
import pytest
from conftest import TIME_LIMIT
from PIL import Image, ImageFilter
from reward_checkpoints import CLIP_SCORE_FOLDER, HPS_FILE, PICK_SCORE_FOLDER
from test_checkpoints import wait_for

ROOT = Path(__file__).parents[1]
SCENES = all_scenes(withheld=False)[::97][:6]
HOSTILE = ['a "quoted" / slashed\\ path', "<script>alert(1)</script> & more", "🙂 ünï\u2028cödé, commas", "x" * 2000]


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
    assert [set(entry) for entry in entries] == [{"index", "image", "prompt", "reward", "measures"}] * 6
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
        low, high = row["interval"]
        assert low < row["mean"] < high or low == row["mean"] == high == 1  # all are right in everything
    assert not list(tmp_path.glob(".*"))  # the files for resuming a killed run are removed


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


def test_bootstrap_intervals_resample_prompts():
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    low, high = bootstrap_interval(values, range(400))
    error = mean_and_error(values, range(400))[1]
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error)
    repeated = bootstrap_interval(np.repeat(values, 3), np.repeat(range(400), 3))  # nothing new is known
    assert repeated == pytest.approx((low, high))
    assert all(map(math.isnan, bootstrap_interval([1.0, 2.0], ["a", "a"])))


def test_paired_differences_against_a_baseline(tmp_path):
    tuned = make_pictures(tmp_path / "tuned", grey(100, 110, 50, 70))
    base = make_pictures(tmp_path / "base", grey(90, 90, 60, 60))
    command = [
        "--manifest",
        str(tuned),
        "--baseline_manifest",
        str(base),
        "--reward_model_type",
        "eval_rewards:brightness",
    ]
    assert main([*command, "--output_json", str(tmp_path / "out" / "s.json")]) == 0
    row = load(tmp_path / "out" / "s_summary.json")["models"]["brightness"]
    assert (row["pairs"], row["mean"], row["baseline_mean"], row["difference_mean"]) == (4, 82.5, 75, 7.5)
    assert row["difference_standard_error"] == 7.5  # the changes of the two prompts are 15 and 0
    assert (row["win_rate"], row["difference_interval"]) == (0.75, [0, 15])
    assert row["baseline_deviation"] == 15  # of 90, 90, 60, 60
    with open(tmp_path / "out" / "s.csv", encoding="utf-8", newline="") as file:
        (line, *measures) = csv.DictReader(file)
    assert (line["style"], line["score"], line["kind"], line["n"], line["failed"]) == (
        "all", "brightness", "reward", "4", "0",
    )  # fmt: skip
    assert [float(line[f"difference_{name}"]) for name in ("mean", "interval_low", "interval_high")] == [
        7.5,
        *row["difference_interval"],
    ]
    assert (float(line["win_rate"]), float(line["standard_error"])) == (0.75, row["standard_error"])
    assert {measure["score"] for measure in measures} == {
        "saturation", "sharpness", "high_frequency", "diversity_pixels",
    }  # fmt: skip
    baseline = load(tmp_path / "out" / "s_baseline.json")
    assert [entry["reward"]["brightness"] for entry in baseline] == [90, 90, 60, 60]
    for file in ("s.json", "s_baseline.json"):
        assert all((tmp_path / "out" / entry["image"]).exists() for entry in load(tmp_path / "out" / file))


def test_a_tie_is_half_a_win(tmp_path):
    manifests = [make_pictures(tmp_path / name, grey(90, 100)) for name in ("tuned", "base")]
    config = EvalConfig(
        manifest=str(manifests[0]), baseline_manifest=str(manifests[1]), reward_model_type="eval_rewards:brightness"
    )
    assert evaluate(config)["models"]["brightness"]["win_rate"] == 0.5


def test_a_baseline_of_other_prompts_is_refused(tmp_path):
    tuned = make_pictures(tmp_path / "tuned", grey(100, 110))
    base = make_pictures(tmp_path / "base", [("other", image) for _, image in grey(100, 110)])
    config = EvalConfig(
        manifest=str(tuned), baseline_manifest=str(base), reward_model_type="hpsv2", hps_path="/nowhere/hps.pt"
    )
    with pytest.raises(ValueError, match="^baseline_manifest: index 0 is 'other' there"):  # before models are sought
        evaluate(config)


def test_broken_pictures_are_named_and_left_out_and_the_exit_status_says_so(tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    manifest = make_pictures(tmp_path, [(f"p{i}", Image.fromarray(noise)) for i in range(5)])
    unreadable = [{"image": name, "prompt": "p", "index": 5 + i} for i, name in enumerate(["x" * 300, "zero\0byte"])]
    manifest.write_text(json.dumps(load(manifest) + unreadable))
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:2000])
    (tmp_path / "3.png").write_text("no picture")
    assert main(["--manifest", str(manifest), "--reward_model_type", "jpeg_compressibility", "--device", "cpu"]) == 1
    assert [entry["index"] for entry in load(tmp_path / "manifest_scores.json")] == [2, 4]
    summary = load(tmp_path / "manifest_scores_summary.json")
    assert (summary["images"], summary["successful"]) == (7, 2)
    names = ["0.png", "1.png", "3.png", "x" * 300, "zero\0byte"]
    assert [Path(skip["image"]).name for skip in summary["skipped"]] == names
    assert summary["skipped"][0]["problem"] == "no such file"
    output = capsys.readouterr().out
    assert "0.png: no such file" in output and "1.png: not a readable picture: " in output
    assert "2 of 7 pictures scored" in output


def test_failed_scores_are_null_counted_and_not_averaged_in(tmp_path):
    manifest = make_pictures(tmp_path, grey(100, 0, 50, 30))
    command = ["--manifest", str(manifest), "--reward_model_type", "eval_rewards:brightness,jpeg_compressibility"]
    assert main(command) == 1
    assert [entry["reward"]["brightness"] for entry in load(tmp_path / "manifest_scores.json")] == [100, None, 50, 30]
    lines = (tmp_path / "manifest_scores_mean.txt").read_text().splitlines()
    assert lines[:2] == ["Total Successful Samples: 3", "brightness Mean Reward: 60.0"]
    row = load(tmp_path / "manifest_scores_summary.json")["models"]["brightness"]
    assert (row["n"], row["failed"]) == (3, 1)


def test_no_score_at_all_is_no_number(tmp_path):
    manifest = make_pictures(tmp_path, grey(0, 0))
    assert main(["--manifest", str(manifest), "--reward_model_type", "eval_rewards:brightness"]) == 1
    assert (tmp_path / "manifest_scores_mean.txt").read_text().endswith("brightness Mean Reward: nan\n")
    assert load(tmp_path / "manifest_scores_summary.json")["models"]["brightness"]["mean"] is None


def test_one_picture_on_the_command_line(tmp_path):
    draw(SCENES[0]).save(tmp_path / "one.png")
    command = ["--image", str(tmp_path / "one.png"), "--prompt", SCENES[0].caption(), "--reward_model_type", "shapes"]
    run = subprocess.run(
        [sys.executable, "-m", "fastvideo.eval.eval_reward", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0
    assert "ShapesRewardModel_binding" in run.stdout and "right in everything" in run.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]


def test_all_reward_models_on_hostile_prompts_and_what_was_held_out(tmp_path, narrow_rewards):
    """Uses the reference's flags. PickScore has the papers' scale; diversity uses CLIPScore's features."""
    noise = np.random.default_rng(0).integers(0, 255, (8, 40, 60, 3), dtype=np.uint8)
    images = [Image.fromarray(picture) for picture in noise]
    prompts = [prompt for prompt in HOSTILE for _ in range(2)]
    manifest = make_pictures(tmp_path, list(zip(prompts, images, strict=True)))
    clip, pick = str(narrow_rewards / CLIP_SCORE_FOLDER), str(narrow_rewards / PICK_SCORE_FOLDER)
    folder = narrow_rewards / "image_reward_ckpt"
    files = {"hps_path": narrow_rewards / "hps_ckpt" / HPS_FILE, "clip_score_path": clip, "pick_score_path": pick}
    files |= {"image_reward_path": folder / "ImageReward.pt", "image_reward_med_config": folder / "med_config.json"}
    files["image_reward_score_dir"] = folder  # the folder of ImageReward's tokenizer
    argv = [str(token) for name, value in files.items() for token in (f"--{name}", value)]
    argv += ["--prompt_file", str(manifest), "--batch_size", "3", "--reward_model", "all", "--device", "cpu"]
    assert main([*argv, "--trained_rewards", "hpsv2:2,pick_score:0", "--output_json", str(tmp_path / "s.json")]) == 0
    entries, summary = load(tmp_path / "s.json"), load(tmp_path / "s_summary.json")
    assert [entry["prompt"] for entry in entries] == prompts
    held_out = {name: row["held_out"] for name, row in summary["models"].items()}
    assert held_out == {
        "HPSClipRewardModel": False,
        "ImageRewardModel": True,
        "CLIPScoreRewardModel": True,
        "PickScoreRewardModel": True,
    }
    training = PickScoreRewardModel(pick)(images, prompts)
    found = [entry["reward"]["PickScoreRewardModel"] for entry in entries]
    np.testing.assert_allclose(found, (8 * training + 18) / 100, atol=1e-5)
    model = CLIPScoreRewardModel(clip)
    expected = np.concatenate([mean_distances(clip_distances(images[i : i + 2], model)) for i in range(0, 8, 2)])
    np.testing.assert_allclose([entry["measures"]["diversity_clip"] for entry in entries], expected, atol=1e-6)


def test_measures_of_appearance_and_diversity():
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    plain = Image.fromarray(noise)
    soft, grey_noise = plain.filter(ImageFilter.GaussianBlur(3)), plain.convert("L")
    found = {name: appearance(image) for name, image in (("plain", plain), ("soft", soft), ("grey", grey_noise))}
    assert found["soft"]["sharpness"] < found["plain"]["sharpness"] / 10
    assert (
        found["soft"]["high_frequency"] < 0.05 < 0.7 < found["plain"]["high_frequency"] < 0.9
    )  # of white noise 1-π/16
    assert found["grey"]["saturation"] == 0 < found["soft"]["saturation"] < found["plain"]["saturation"]
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    assert appearance(Image.fromarray(stripes))["high_frequency"] > 0.999
    red = appearance(Image.new("RGB", (9, 7), (200, 0, 0)))
    assert red == {"saturation": 1.0, "sharpness": 0.0, "high_frequency": 0.0}
    images = [Image.new("RGB", (80, 40), (level, 0, 0)) for level in (0, 255, 255)]
    far = math.sqrt(1 / 3)
    assert mean_distances(pixel_distances(images)) == pytest.approx([far, far / 2, far / 2])


def test_signs_of_reward_hacking_are_named(tmp_path, capsys):
    """The tuned pictures gain one reward, lose another, look all alike, and have glaring colours."""
    rng = np.random.default_rng(0)

    def noisy(level: int) -> Image.Image:
        return Image.fromarray((rng.integers(0, 60, (32, 32, 3)) + level).astype(np.uint8))

    prompts = [f"prompt {i // 4}" for i in range(40)]
    base = make_pictures(tmp_path / "base", [(p, noisy(int(rng.integers(0, 150)))) for p in prompts])
    tuned = make_pictures(tmp_path / "tuned", [(p, Image.new("RGB", (32, 32), (255, 0, 120))) for p in prompts])
    argv = ["--manifest", str(tuned), "--baseline_manifest", str(base), "--trained_rewards", "jpeg_compressibility"]
    argv += ["--reward_model_type", "jpeg_compressibility,jpeg_incompressibility"]
    assert main([*argv, "--output_json", str(tmp_path / "s.json")]) == 0
    signs = load(tmp_path / "s_summary.json")["signs"]
    expected = [
        "JpegIncompressibilityRewardModel, not trained on, fell",
        "saturation changed: +",
        "sharpness changed: -",
    ]
    expected += ["high_frequency changed: -", "diversity_pixels: pictures of a prompt are more alike: -"]
    assert [sign.startswith(start) for sign, start in zip(signs, expected, strict=True)] == [True] * 5, signs
    output = capsys.readouterr().out
    assert all(f"against the baseline, {sign}" in output for sign in signs)
    assert "JpegIncompressibilityRewardModel (held out)" in output
    argv[argv.index(str(tuned))] = str(base)
    main([*argv, "--output_json", str(tmp_path / "s.json")])
    assert load(tmp_path / "s_summary.json")["signs"] == []


def test_a_sign_of_reward_hacking_needs_pairs_of_eight_prompts(tmp_path, capsys):
    """With two prompts the bootstrap only finds that both changed in one direction: half of all pairs do by chance."""
    pictures = [(str(i), Image.new("RGB", (8, 8), (level, 0, 0))) for i, level in enumerate(range(9, 17))]
    greyish = [(prompt, image.convert("L")) for prompt, image in pictures]
    for count in (7, 8):
        tuned, base = (
            make_pictures(tmp_path / f"{name}{count}", some[:count])
            for name, some in (("tuned", pictures), ("base", greyish))
        )
        main(
            ["--manifest", str(tuned), "--baseline_manifest", str(base), "--reward_model_type", "jpeg_compressibility"]
        )
        summary, output = load(tuned.with_name("manifest_scores_summary.json")), capsys.readouterr().out
        assert summary["measures"]["saturation"]["difference_interval"] == [1, 1]
        assert any(sign.startswith("saturation changed") for sign in summary["signs"]) == (count == 8)
        assert ("saturation" in summary["too_few_prompts_for_signs"]) == (count == 7)
        assert ("no sign is looked for with pairs of fewer than 8 prompts: Jpeg" in output) == (count == 7)


def test_an_evaluation_leaves_what_a_rival_keeps_and_refuses_one_of_other_pictures_or_flags(
    tmp_path, subprocess_environment, monkeypatch, refused
):
    manifest, calls, log = make_pictures(tmp_path, grey(*range(1, 9))), tmp_path / "calls", tmp_path / "log"
    monkeypatch.setenv("CALLS", str(calls))
    argv = ["--manifest", str(manifest), "--reward_batch_size", "1", "--device", "cpu"]
    flags, others = (["--reward_model_type", f"eval_rewards:{name}"] for name in ("slow_brightness", "brightness"))
    with open(log, "w") as file:
        rival = subprocess.Popen(
            [sys.executable, "-m", "fastvideo.eval.eval_reward", *argv, *flags],
            cwd=ROOT,
            env={**subprocess_environment, "CALLS": str(calls)},
            stdout=file,
            stderr=file,
        )
    wait_for(lambda: calls.exists() and calls.read_text(), rival, log)
    os.kill(rival.pid, signal.SIGSTOP)
    try:
        (part,) = tmp_path.glob(".*.part")
        with refused("--output_json .*_scores.json: an evaluation of other pictures or"):
            main([*argv, *others])
        assert main([*argv, *flags]) == 0
        assert list(tmp_path.glob(".*")) == [part] and load(tmp_path / "manifest_scores.json")
    finally:
        os.kill(rival.pid, signal.SIGKILL)
        rival.wait()
    assert main([*argv, *others]) == 0
    assert not list(tmp_path.glob(".*"))


def test_scores_of_an_earlier_baseline_do_not_stay_beside_new_ones(tmp_path):
    manifests = [str(make_pictures(tmp_path / name, grey(90, 100))) for name in ("tuned", "base")]
    command = ["--reward_model_type", "eval_rewards:brightness", "--manifest", manifests[0]]
    main([*command, "--baseline_manifest", manifests[1]])
    assert (tmp_path / "tuned/manifest_scores_baseline.json").exists()
    main(command)
    assert not (tmp_path / "tuned/manifest_scores_baseline.json").exists()


def test_the_benchmark_layout_is_scored_by_style(tmp_path):
    prompts, images = tmp_path / "prompts", tmp_path / "images"
    prompts.mkdir()
    levels = {"anime": (10, 30), "concept-art": (50, 70), "paintings": (90, 110), "photo": (130, 150)}
    for style, greys in levels.items():
        (prompts / f"{style}.json").write_text(json.dumps([f"{style} 🙂", "b"]))
        (images / style).mkdir(parents=True)
        for i, level in enumerate(greys):
            Image.new("RGB", (8, 8), (level,) * 3).save(images / style / f"{i:05d}.{'png' if i else 'jpg'}")
    argv = ["--manifest", str(images), "--benchmark_prompts", str(prompts)]
    assert main([*argv, "--reward_model_type", "eval_rewards:brightness"]) == 0
    styles = load(images / "scores_summary.json")["styles"]
    found = {style: part["models"]["brightness"]["mean"] for style, part in styles.items()}
    assert found == {style: np.mean(greys) for style, greys in levels.items()}
    with open(images / "scores.csv", newline="") as file:
        rows = {row["style"]: row["mean"] for row in csv.DictReader(file) if row["score"] == "brightness"}
    assert {style: float(mean) for style, mean in rows.items()} == {"all": 80, **found}
    assert load(images / "scores.json")[-1]["image"] == "photo/00001.png"
    (images / "photo/00001.png").unlink()
    assert main([*argv, "--reward_model_type", "eval_rewards:brightness"]) == 1
    assert load(images / "scores_summary.json")["skipped"][0]["image"].endswith("photo/00001.jpg")


def test_a_manifest_with_paths_from_the_working_directory_is_read(tmp_path, monkeypatch):
    """The reference's sampler writes such a manifest."""
    manifest = make_pictures(tmp_path / "pictures", grey(10, 20))
    entries = [{"image": f"pictures/{i}.png", "prompt": "p"} for i in range(2)]
    (manifest.parent / "m.json").write_text(json.dumps(entries))
    monkeypatch.chdir(tmp_path)
    assert main(["--manifest", "pictures/m.json", "--reward_model_type", "eval_rewards:brightness"]) == 0


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_two_at_once_write_what_one_does(tmp_path, subprocess_environment, monkeypatch):
    """One process is killed. In the same folder, the recipe on two processes and this process continue."""
    levels = range(1, 25)
    tuned, base = (make_pictures(tmp_path / name, grey(*levels[::step])) for name, step in (("tuned", 1), ("base", -1)))
    folder, calls, log = tmp_path / "out", tmp_path / "calls", tmp_path / "log"
    monkeypatch.setenv("CALLS", str(calls))
    environment = {**subprocess_environment, "CALLS": str(calls), "PYTHON_BIN": sys.executable}
    argv = ["--manifest", str(tuned), "--baseline_manifest", str(base), "--reward_batch_size", "2", "--device", "cpu"]
    argv += ["--reward_model_type", "eval_rewards:slow_brightness", "--output_json"]

    def start(*command: str, **more: str) -> subprocess.Popen:
        with open(log, "a") as file:
            command = [*command, *argv, str(folder / "s.json")]
            return subprocess.Popen(command, cwd=ROOT, env={**environment, **more}, stdout=file, stderr=file)

    def kept() -> int:
        return sum(path.read_bytes().count(b"found") for path in folder.glob(".*.part"))

    killed = start(sys.executable, "-m", "fastvideo.eval.eval_reward")
    wait_for(lambda: kept() >= 4, killed, log)  # of 24 batches, 12 per manifest
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (folder / "s.json").exists()
    (part,) = folder.glob(".*.part")
    whole = kept() - 1
    part.write_bytes(part.read_bytes()[:-20])  # a kill in the middle of a write
    resumed = shutil.copytree(folder, tmp_path / "resumed")
    calls.write_text("")
    assert main([*argv, str(resumed / "s.json")]) == 0
    assert calls.read_text().count("x") == 24 - whole

    recipe = start("bash", "scripts/evaluate/eval_reward.sh", NPROC_PER_NODE="2")
    wait_for(lambda: len(list(folder.glob(".*.part"))) > 1 or (folder / "s.json").exists(), recipe, log)
    assert main([*argv, str(folder / "s.json")]) == 0
    assert recipe.wait(TIME_LIMIT) == 0, log.read_text()[-3000:]
    assert main([*argv, str(tmp_path / "uninterrupted/s.json")]) == 0
    folders = (tmp_path / "uninterrupted", resumed, folder)
    expected, *found = ({path.name: path.read_bytes() for path in f.iterdir()} for f in folders)
    assert expected.keys() == {f"s{end}" for end in (".json", "_mean.txt", ".csv", "_summary.json", "_baseline.json")}
    assert found == [expected] * 2


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
def test_a_bad_manifest_gives_one_line(tmp_path, content, message, refused):
    path = tmp_path / "m.json"
    if content is not None:
        path.write_text(content)
    with refused(f"--manifest.*{message}"):
        main(["--manifest", str(path), "--reward_model_type", "jpeg_compressibility"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "--manifest: give either --manifest or --image"),
        (["--image", "a.png"], "--image a.png: --image and --prompt go together"),
        (
            ["--manifest", "m", "--reward_model_type", "beauty"],
            "--reward_model_type 'beauty': unknown reward; choose from hpsv2",
        ),
        (["--manifest", "m", "--reward_batch_size", "0"], "--reward_batch_size 0: must be at least 1"),
        (["--manifest", "m", "--trained_rewards", "beauty"], "--trained_rewards 'beauty': unknown reward; choose from"),
        (["--single_img", "a.png"], "--image a.png: --image and --prompt go together"),
        (["--image", "a", "--prompt", "b", "--benchmark_prompts", "c"], "--benchmark_prompts c: needs --manifest"),
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


def test_all_that_scoring_lacks_is_named_at_once(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--manifest", str(tmp_path / "none.json"), "--reward_model_type", "hpsv2", "--hps_path", "/nowhere/h.pt"])
    named = [line.partition("--")[2].split()[0] for line in capsys.readouterr().err.splitlines()]
    assert named == ["manifest", "hps_path"]


def test_missing_reward_files_are_found_before_scoring(tmp_path, refused):
    manifest = make_pictures(tmp_path, grey(1, 2))
    with refused("--hps_path /nowhere/hps.pt: no such file"):
        main(["--manifest", str(manifest), "--reward_model_type", "hpsv2", "--hps_path", "/nowhere/hps.pt"])
