"""It learns: scripts/quickstart.sh, as a user starts it, raises held-out scores, and shuffled rewards don't."""

import json
import os
import subprocess
import sys
from pathlib import Path

from fastvideo.eval.report import compare, read_pairs

import pytest

ROOT = Path(__file__).parents[1]
JPEG_FLAGS = "--max_train_steps 60 --lr_scheduler constant --learning_rate 5e-5 --train_batch_size 6".split()
SEEDS = [714, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))]


def quickstart(folder: Path, *flags: str) -> dict[str, dict]:
    """{score: paired change on held-out prompts} of a quickstart with more flags for the trainer."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHON_BIN": sys.executable, "PYTHONPATH": path, "OUTPUT_DIR": str(folder)}
    command = ["bash", str(ROOT / "scripts/quickstart.sh"), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    table = [line for line in done.stdout.splitlines() if line.startswith("ShapesRewardModel ") and "change" in line]
    assert len(table) == 1 and "± " in table[0] and "(768 pairs)" in table[0]
    for shown in ("report/report.html", "run/metrics.jsonl", "run/images"):
        assert str(folder / shown) in done.stdout and (folder / shown).exists()
    return {row["model"]: row for row in compare(read_pairs(folder / "base/scores.json", folder / "tuned/scores.json"))}


def standard_errors(row: dict) -> float:
    change, error = row["change"]
    return change / error


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_quickstart_raises_the_granular_reward_on_held_out_prompts_and_spoils_no_part(seed, tmp_path):
    rows = quickstart(tmp_path / "out", "--seed", str(seed))
    iterations = [json.loads(line) for line in (tmp_path / "out/run/metrics.jsonl").read_text().splitlines()]
    assert len(iterations) == 75
    assert standard_errors(rows["ShapesRewardModel"]) > 5
    for part in ("color", "form", "clean"):  # 2.4: a two-sided 5 % over three parts
        assert standard_errors(rows[f"ShapesRewardModel_{part}"]) > -2.4, part


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_training_on_jpeg_compressibility_raises_it_on_held_out_prompts(seed, tmp_path):
    rows = quickstart(tmp_path / "out", "--seed", str(seed), "--reward_model", "jpeg_compressibility", *JPEG_FLAGS)
    assert standard_errors(rows["JpegCompressibilityRewardModel"]) > 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "raised", "flags"),
    [
        ("shuffled_jpeg", "JpegCompressibilityRewardModel", JPEG_FLAGS),
        pytest.param("shuffled_shapes", "ShapesRewardModel", [], marks=pytest.mark.long),
    ],
)
def test_rewards_shuffled_within_groups_do_not_raise_the_held_out_score(reward, raised, flags, tmp_path):
    rows = quickstart(tmp_path / "out", "--reward_model", f"custom_rewards:{reward}", *flags)
    assert standard_errors(rows[raised]) < 2
