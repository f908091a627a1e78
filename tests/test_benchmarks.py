"""Benchmarks at tiny size: they run, and their numbers are consistent. No test checks times."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

from fastvideo import train_grpo_flux
from fastvideo.cli import parse_dataclass
from fastvideo.config import GRPOConfig
from fastvideo.rollout_plan import describe

import pytest
from conftest import PROMPTS, ROOT, TIME_LIMIT


@pytest.mark.long
def test_an_iteration_is_timed_by_phase_with_and_without_each_optimisation(tmp_path, subprocess_environment):
    command = f"benchmarks/bench_iteration.py --tiny --ablation --fp8 --save --json_file {tmp_path}/times.json".split()
    command += "--windows 0 5 --sampling_steps 12 --num_generations 2 --gradient_accumulation_steps 2".split()
    command += ["--train_micro_batch_size", "8"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=subprocess_environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" GB: training waits ") == 8
    runs = json.loads((tmp_path / "times.json").read_text())["runs"]
    assert list(runs)[0] == "all on" and "without shared prefix" in runs and len(runs) == 8
    assert re.search(r"FP8 moves the velocity of 2 rows by 0\.\d+% at 0.99, .* copies take [\d.]+ ms\n", done.stdout)
    assert all(0 < line["rollout_drift_latents"] < 0.1 for line in runs["with fp8"])
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0][2:] for line in table] == ["seconds per iteration", *runs]

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
        # The prefix is all steps before the window, one row per step.
        assert prefix == pytest.approx([0 if alone(name) else s * operations[0] for s in (0, 5)])
    shared, apart = ([line["nfe"] for line in runs[name]] for name in ("all on", "without shared prefix"))
    assert apart == [24, 24] and shared == [1 + start + (11 - start) * 2 for start in (0, 5)]


@pytest.mark.long
def test_an_iteration_is_timed_at_any_depth_and_width(tmp_path, subprocess_environment):
    command = "benchmarks/bench_iteration.py --double_blocks 1 --single_blocks 2 --attention_heads 2 --windows 0"
    command += f" --json_file {tmp_path}/times.json --h 32 --w 32 --mixed_precision no"
    command += " --sampling_steps 4 --num_generations 2 --group_size 1 --gradient_accumulation_steps 1"
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, env=subprocess_environment, capture_output=True, text=True,
        timeout=TIME_LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = json.loads((tmp_path / "times.json").read_text())["runs"]["all on"][0]
    width, tokens = 2 * 128, 512 + (32 // 16) ** 2
    row = 3 * (24 * width**2 * tokens + 4 * tokens**2 * width)
    seconds = line["seconds_rollout"] - line["seconds_prefix"]
    assert line["tflops_rollout"] * 1e12 * seconds == pytest.approx(row * line["nfe"])


@pytest.mark.long
def test_flux_2_is_timed_as_its_recipes_train_it(tmp_path, subprocess_environment):
    command = f"benchmarks/bench_iteration.py --tiny --family flux2 --recipes --json_file {tmp_path}/times.json"
    command += " --windows 0 --sampling_steps 4 --num_generations 2 --group_size 1 --gradient_accumulation_steps 1"
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, env=subprocess_environment, capture_output=True, text=True,
        timeout=TIME_LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = {name: lines[0] for name, lines in json.loads((tmp_path / "times.json").read_text())["runs"].items()}
    work = {
        name: line["tflops_rollout"] * (line["seconds_rollout"] - line["seconds_prefix"]) for name, line in runs.items()
    }
    half, larger = work["guidance 1"], work["48x48"]  # one pass instead of two
    expected = {"all on": 2 * half, "48x48": larger, "guidance 1": half}
    expected |= {"LoRA": 2 * half, "LoRA, 48x48": larger, "LoRA, guidance 1": half}
    assert work == pytest.approx(expected) and larger > 2.6 * half


@pytest.mark.long
def test_every_reward_is_timed(subprocess_environment):
    command = "benchmarks/bench_rewards.py --device cpu --dtype fp32 --narrow --images 3 --image_size 64 --repeats 1"
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, env=subprocess_environment, capture_output=True, text=True,
        timeout=TIME_LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "image/s" in line]
    assert [line[:22].strip() for line in lines] == [
        *("hpsv2", "hpsv3", "image_reward overall", "image_reward granular", "clip_score", "pick_score"),
        *("multi_reward", "unified_reward", "vlm_judge", "pairwise", "vlm_questions", "ocr", "geneval"),
        "jpeg_compressibility",
    ]
    for line in lines:
        rates = [float(rate) for rate in re.findall(r"([\d.]+) image/s", line)]
        assert len(rates) == 2 and min(rates) > 0


def test_every_variant_of_the_iteration_benchmark_can_be_planned(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from bench_iteration import FP8, OFF, SCOUTING, SWEEP, recipes

    for flags in (OFF | FP8 | SCOUTING | SWEEP | recipes(tiny=False)).values():
        config = parse_dataclass(GRPOConfig, ["--data_json_path", "unused", "--reward_model", "shapes", *flags])
        assert "steps per iteration" in describe(config, 1)


@pytest.mark.parametrize(("family", "blocks", "billions"), [("flux1", (19, 38), 11.90), ("flux2", (None, None), 3.88)])
def test_the_benchmark_s_models_have_the_published_sizes(monkeypatch, family, blocks, billions):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from bench_iteration import BenchmarkConfig, full_size

    model = full_size(BenchmarkConfig(family=family, double_blocks=blocks[0], single_blocks=blocks[1]))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)


def check_comparison(folder: Path, table: str, images: int) -> None:
    """Checks that the table's row is the run whose learning rate is best on training prompts."""
    runs = [json.loads(path.read_text()) for path in folder.glob("mix_grpo_flash-*.json")]
    assert [[point["images"] for point in run["points"]] for run in runs] == [[images]] * 4  # four learning rates
    best = max(runs, key=lambda run: run["training"]["right"])
    rate, point = float(re.search(r"-lr(\S+)-s", best["name"])[1]), best["points"][-1]
    (row,) = (line for line in table.splitlines() if line.startswith("| mix_grpo_flash |"))
    steps = point["optimizer_steps"]
    assert row.startswith(
        f"| mix_grpo_flash | {point['right']:.3f} | {rate:g} | {images} | {point['nfe']:,} | {steps} |"
    )
    assert len({run["points"][-1]["binding"] for run in runs}) == 4  # the rates trained different models
    assert (folder / "algorithms.png").stat().st_size > 10_000


COMPARISON = "--studies algorithms --algorithms mix_grpo_flash --seeds 1 --points 1".split()


def test_algorithms_are_compared_on_withheld_scenes_at_the_rate_that_training_prompts_choose(
    tmp_path, embedded_prompts, monkeypatch, capsys
):
    """Runs one short iteration per learning rate in this process, and measures few scenes."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import compare_algorithms
    import tiny_world

    scenes = tiny_world.lines(tiny_world.TEST_PROMPTS)[:8]
    for name, prompts in (("PROMPTS", PROMPTS), ("TEST_PROMPTS", scenes)):
        (tmp_path / name).write_text("\n".join(prompts), encoding="utf-8")
        monkeypatch.setattr(tiny_world, name, tmp_path / name)
    (tmp_path / "embeddings").symlink_to(embedded_prompts.parent)
    monkeypatch.setitem(compare_algorithms.ALGORITHMS, "mix_grpo_flash", "--train_batch_size 2 --num_generations 6")
    monkeypatch.setattr(train_grpo_flux, "windows", train_grpo_flux.windows)  # restored after the run changes it
    monkeypatch.setattr(
        compare_algorithms,
        "run_all",
        lambda runs, output, jobs: {run.name: tiny_world.train_and_measure(run, output) for run in runs},
    )
    argv = ["compare_algorithms.py", "--output_dir", str(tmp_path), *COMPARISON, "--images", "12"]
    monkeypatch.setattr(sys, "argv", argv)
    compare_algorithms.main()
    check_comparison(tmp_path, capsys.readouterr().out, images=12)


def test_scouting_is_compared_at_equal_cost_with_differences_paired_by_seed(monkeypatch, capsys, tmp_path):
    """The results are made up: candidates add 0.1, extremes another 0.1, and the runs of a seed share its noise."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import scouting

    planned = []

    def results(runs, output, jobs):
        planned.extend(runs)
        found = {}
        for run in runs:
            seed = float(run.flags[-1])
            right = 0.5 + 0.1 * seed + 0.1 * ("--scouts" in run.flags) + 0.1 * ("extremes" in run.flags)
            right -= 0.05 * ("0.0002" in run.flags)  # the worse learning rate
            point = {"iteration": run.iterations, "right": right, "seconds_total": 9.0}
            curve = [{"scout_rank_correlation": value} for value in (0.5, 0.7, None)]
            found[run.name] = {"points": [point], "training": {"right": right}, "curve": curve}
        return found

    monkeypatch.setattr(scouting, "run_all", results)
    monkeypatch.setattr(scouting, "base", lambda output: {"right": 0.4, "right_error": 0.02})
    argv = ["scouting.py", "--output_dir", str(tmp_path), "--seeds", "0", "1", "2", "--learning_rates", "1e-4", "2e-4"]
    monkeypatch.setattr(sys, "argv", argv)
    scouting.main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert [len(rows), len(planned)] == [3 + 6 + 5 + 5, 6 * 16]  # three headings
    row = next(row for row in rows if row[0] == "24 candidates, extremes")
    assert row[1:5] == ["0.800 ± 0.100", "+0.200 ± 0.000", "+0.100 ± 0.000", "0.0001"] and row[8] == "0.600"
    spent = [int(row[6].replace(",", "")) for row in rows if row[0] != "variant"]
    # T·G + 3, 4 or 5 · trained rows + G
    for cost, off in ((spent[:6], 30 * 276), (spent[6:11], 40 * 324), (spent[11:], 40 * 372)):
        assert max(cost) < 1.03 * min(cost) and off in cost
    assert (tmp_path / "scouting.png").stat().st_size > 10_000


@pytest.mark.long
def test_the_command_that_compares_algorithms_trains_in_processes_side_by_side(tmp_path, subprocess_environment):
    command = [sys.executable, "benchmarks/compare_algorithms.py", "--output_dir", str(tmp_path), *COMPARISON]
    command += ["--jobs", "2", "--images", "300"]
    done = subprocess.run(
        command, cwd=ROOT, env=subprocess_environment, capture_output=True, text=True, timeout=TIME_LIMIT
    )
    assert done.returncode == 0, done.stderr
    check_comparison(tmp_path, done.stdout, images=288)


def flat(runs: object) -> list:
    """The runs in nested containers."""
    if isinstance(runs, dict):
        runs = list(runs.values())
    return [run for part in runs for run in flat(part)] if isinstance(runs, list | tuple) else [runs]


@pytest.mark.parametrize(
    ("benchmark", "settings"),
    [
        ("compare_algorithms", "ComparisonConfig"),
        ("moving_weights", "WeightsConfig"),
        ("reward_hacking", "HackingConfig"),
        ("learning_curves", "CurvesConfig"),
        ("scouting", "ScoutingConfig"),
    ],
)
def test_every_compared_run_can_be_planned_and_has_a_name_of_its_own(benchmark, settings, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module, world = importlib.import_module(benchmark), importlib.import_module("tiny_world")
    every_study = {"studies": list(module.STUDIES)} if hasattr(module, "STUDIES") else {}
    planned = module.plan_runs(getattr(module, settings)(**every_study))
    runs = {run for run in flat(planned) if isinstance(run, world.Run)}
    assert len({run.name for run in runs}) == len(runs) > 3  # the name is a file's
    for run in {run.flags[:-1]: run for run in runs}.values():  # the last flag is the seed
        given = ["--data_json_path", "unused", "--max_train_steps", str(run.iterations)]
        config = parse_dataclass(GRPOConfig, [*world.COMMON, *run.flags, *given])
        assert "per iteration" in describe(config, 1) and config.h == 32
        assert run.measure_every <= run.iterations


@pytest.mark.parametrize(
    "script", ["learning_curves", "compare_algorithms", "moving_weights", "reward_hacking", "scouting"]
)
def test_a_comparison_refuses_a_place_that_cannot_be_written_before_anything_slow(
    script, monkeypatch, capsys, tmp_path
):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tiny_world

    benchmark = importlib.import_module(script)
    monkeypatch.setattr(tiny_world, "base_pipeline", None)
    (tmp_path / "file").write_text("")
    for flags in (["--output_dir", str(tmp_path / "file/x")], ["--jobs", "0"]):
        monkeypatch.setattr(sys, "argv", [script, *flags])
        with pytest.raises(SystemExit) as stop:
            benchmark.main()
        (line,) = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and f"error: {flags[0]} {flags[1]}: " in line
