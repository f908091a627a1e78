"""Training learns: after scripts/quickstart.sh more scenes are right; with shuffled rewards fewer are right."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FIRST_LINE = r"right in everything  before 0\.\d\d  after [01]\.\d\d  \(540 pictures, ± 0\.\d\d and ± 0\.\d\d\)"


def quickstart(folder: Path, *flags: str) -> tuple[dict, list[str]]:
    """Runs the quickstart with more trainer flags. Returns report/summary.json and the signs of reward hacking."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHON_BIN": sys.executable, "PYTHONPATH": path, "OUTPUT_DIR": str(folder)}
    command = ["bash", str(ROOT / "scripts/quickstart.sh"), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = done.stdout.split("== 4/4 report")[1].strip().splitlines()
    assert re.fullmatch(FIRST_LINE, report[0]), report[0]
    for shown in ("report/report.html", "report/before_after.png", "report/summary.json", "run/metrics.jsonl"):
        assert str(folder / shown) in done.stdout and (folder / shown).stat().st_size > 0
    summary = json.loads((folder / "report/summary.json").read_text())
    assert f"before {summary['right_before']:.2f}  after {summary['right_after']:.2f}" in report[0]
    return summary, json.loads((folder / "tuned/scores_summary.json").read_text())["signs"]


def change(summary: dict, model: str) -> tuple[float, float]:
    """Paired change of a score on the withheld scenes and its standard error."""
    return next(row["change"] for row in summary["scores"] if row["model"] == model)


@pytest.mark.slow(5)
@pytest.mark.parametrize(
    ("seed", "more", "least"),
    [
        (714, ("--max_train_steps", "12"), 0.52),
        *(pytest.param(seed, (), 0.75, marks=pytest.mark.long) for seed in (714, 1, 2)),
    ],
)
def test_the_quickstart_draws_most_of_the_withheld_scenes_right(seed, more, least, tmp_path):
    """Three quarters with all of its iterations; with fewer, clearly more than before."""
    summary, signs = quickstart(tmp_path / "out", "--seed", str(seed), *more)
    assert summary["pictures"] == 540 and summary["iterations"] <= 75
    assert 0.3 <= summary["right_before"] <= 0.48  # 0.30 to 0.45, plus the error of 540 pictures
    assert summary["right_after"] >= least
    for part in ("binding", "form", "clean"):
        gain, error = change(summary, f"ShapesRewardModel_{part}")
        assert gain > -2.4 * error, part  # 2.4: a two-sided 5 % over three parts
    assert signs == []


@pytest.mark.long
def test_rewards_shuffled_within_groups_draw_no_more_scenes_right(tmp_path):
    summary, _ = quickstart(tmp_path / "out", "--reward_model", "custom_rewards:shuffled_shapes")
    gain, error = change(summary, "ShapesRewardModel_right")
    assert gain < 2 * error


@pytest.mark.long
@pytest.mark.parametrize("seed", [714, 1, 2])
def test_training_on_file_size_alone_spoils_the_pictures_and_is_named(seed, tmp_path):
    summary, signs = quickstart(tmp_path / "out", "--seed", str(seed), "--reward_model", "jpeg_compressibility")
    gain, error = change(summary, "JpegCompressibilityRewardModel")
    assert gain > 5 * error
    assert summary["right_after"] < summary["right_before"] - 0.1
    assert any(sign.startswith("right in everything fell") for sign in signs)
