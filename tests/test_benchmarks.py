"""Benchmarks at tiny size: that they run, and that their numbers fit together. None of these tests looks at a time."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_an_iteration_is_timed_by_phase_with_and_without_each_optimisation(tmp_path, subprocess_environment):
    command = f"benchmarks/bench_iteration.py --tiny --ablation --save --json_file {tmp_path}/times.json".split()
    command += "--num_generations 2 --gradient_accumulation_steps 2 --train_micro_batch_size 8".split()
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=subprocess_environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" GB: training waits ") == 6
    runs = json.loads((tmp_path / "times.json").read_text())["runs"]
    assert list(runs)[0] == "all on" and "without shared prefix" in runs and len(runs) == 6
    for name, lines in runs.items():
        assert f"\n{name}: " in done.stdout
        assert [line["window"][0] for line in lines] == [0, 10, 19]
        assert all(line["peak_share_rollout"] > 0 and line["peak_share_train"] > 0 for line in lines)
        operations = [line["tflops_rollout"] * line["seconds_rollout"] / line["nfe"] for line in lines]
        assert operations == pytest.approx([operations[0]] * 3)
    shared, alone = ([line["nfe"] for line in runs[name]] for name in ("all on", "without shared prefix"))
    assert alone == [50, 50, 50] and shared == [1 + start + (24 - start) * 2 for start in (0, 10, 19)]
