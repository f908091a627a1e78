"""Benchmarks at tiny size: that they run, and that their numbers fit together. None of these tests looks at a time."""

import json
import re
import subprocess
import sys

from fastvideo.config import GRPOConfig, parse_dataclass
from fastvideo.rollout_plan import describe

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_an_iteration_is_timed_by_phase_with_and_without_each_optimisation(tmp_path, subprocess_environment):
    command = f"benchmarks/bench_iteration.py --tiny --ablation --save --json_file {tmp_path}/times.json".split()
    command += "--windows 0 5 --sampling_steps 12 --num_generations 2 --gradient_accumulation_steps 2".split()
    command += ["--train_micro_batch_size", "8"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=subprocess_environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" GB: training waits ") == 7
    runs = json.loads((tmp_path / "times.json").read_text())["runs"]
    assert list(runs)[0] == "all on" and "without shared prefix" in runs and len(runs) == 7

    def alone(name: str) -> bool:
        return name in ("without shared prefix", "without all of these")

    for name, lines in runs.items():
        assert f"\n{name}: " in done.stdout
        assert [line["window"][0] for line in lines] == [0, 5]
        assert all(line["peak_share_rollout"] > 0 and line["peak_share_train"] > 0 for line in lines)
        assert ["tflops_prefix" in line for line in lines] == ([False] * 2 if alone(name) else [False, True])
        assert all((line["seconds_prefix"] > 0) == ("tflops_prefix" in line) for line in lines)
        batched = [line["tflops_rollout"] * (line["seconds_rollout"] - line["seconds_prefix"]) for line in lines]
        prefix = [line.get("tflops_prefix", 0) * line["seconds_prefix"] for line in lines]
        operations = [sum(both) / line["nfe"] for *both, line in zip(batched, prefix, lines, strict=True)]
        assert operations == pytest.approx([operations[0]] * 2)
        # The prefix is all that comes before the window, a row a step.
        assert prefix == pytest.approx([0 if alone(name) else s * operations[0] for s in (0, 5)])
    shared, apart = ([line["nfe"] for line in runs[name]] for name in ("all on", "without shared prefix"))
    assert apart == [24, 24] and shared == [1 + start + (11 - start) * 2 for start in (0, 5)]


@pytest.mark.slow
def test_an_iteration_is_timed_at_any_depth_and_width(tmp_path, subprocess_environment):
    command = "benchmarks/bench_iteration.py --double_blocks 1 --single_blocks 2 --attention_heads 2 --windows 0"
    command += f" --json_file {tmp_path}/times.json --h 32 --w 32 --mixed_precision no"
    command += " --sampling_steps 4 --num_generations 2 --group_size 1 --gradient_accumulation_steps 1"
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, env=subprocess_environment, capture_output=True, text=True,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "times.json").read_text())["runs"]["all on"][0]
    width, tokens = 2 * 128, 512 + (32 // 16) ** 2
    row = 3 * (24 * width**2 * tokens + 4 * tokens**2 * width)
    seconds = line["seconds_rollout"] - line["seconds_prefix"]
    assert line["tflops_rollout"] * 1e12 * seconds == pytest.approx(row * line["nfe"])


@pytest.mark.slow
def test_every_reward_is_timed(subprocess_environment):
    command = "benchmarks/bench_rewards.py --device cpu --dtype fp32 --narrow --images 3 --image_size 64 --repeats 1"
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, env=subprocess_environment, capture_output=True, text=True,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "image/s" in line]
    assert [line[:22].strip() for line in lines] == [
        *("hpsv2", "image_reward overall", "image_reward granular", "clip_score", "pick_score", "multi_reward"),
        *("unified_reward", "jpeg_compressibility"),
    ]
    for line in lines:
        rates = [float(rate) for rate in re.findall(r"([\d.]+) image/s", line)]
        assert len(rates) == 2 and min(rates) > 0


def test_every_variant_of_the_iteration_benchmark_can_be_planned(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import bench_iteration

    for flags in (bench_iteration.OFF | bench_iteration.SWEEP).values():
        config = parse_dataclass(GRPOConfig, ["--data_json_path", "unused", "--reward_model", "shapes", *flags])
        assert "steps an iteration" in describe(config, 1)


@pytest.mark.slow
def test_algorithms_are_compared_on_held_out_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import compare_algorithms
    import learning_curves

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join((ROOT / "data/prompts_test.txt").read_text().splitlines(keepends=True)[:8]))
    monkeypatch.setattr(learning_curves, "TEST_PROMPTS", prompts)
    given = "--algorithms mix_grpo_flash --seeds 1 --images 300 --points 1 --images_per_prompt 1"
    monkeypatch.setattr(sys, "argv", ["compare_algorithms.py", "--output_dir", str(tmp_path), *given.split()])
    compare_algorithms.main()
    (seeds,) = json.loads((tmp_path / "comparison.json").read_text()).values()
    assert [[point["images"] for point in points] for points in seeds] == [[288]]
    assert all(point["change"] != 0 and point["optimizer_steps"] == 4 for (point,) in seeds)
    seconds = min(point["seconds_total"] for (point,) in seeds)
    assert f"| 288 | {seeds[0][0]['nfe']} | {seconds:.0f} | 4 |" in capsys.readouterr().out
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


def test_every_compared_algorithm_can_be_planned(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import compare_algorithms

    for name in compare_algorithms.ALGORITHMS:
        flags = compare_algorithms.training_flags(compare_algorithms.ComparisonConfig(), name)
        config = parse_dataclass(GRPOConfig, [*flags, "--data_json_path", "unused"])
        assert config.algorithm.split("_")[0] == name.split("_")[0] and "steps an iteration" in describe(config, 1)
