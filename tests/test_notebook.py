"""notebooks/first_run.ipynb: its cells run in order, and it is stored without outputs."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, TIME_LIMIT

NOTEBOOK = ROOT / "notebooks/first_run.ipynb"
SHORT = {"FIRST_RUN_ITERATIONS": "1", "FIRST_RUN_SCENES": "2", "MPLBACKEND": "agg"}


def test_the_notebook_is_stored_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.slow
def test_the_cells_train_sample_score_and_draw(tmp_path, subprocess_environment):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    script = tmp_path / "cells.py"
    script.write_text("\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"), encoding="utf-8")
    environment = {**subprocess_environment, **SHORT, "FIRST_RUN_OUTPUT": str(tmp_path / "out")}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT / "notebooks", env=environment, timeout=TIME_LIMIT, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mix_grpo_flash: 24 prompts x 12 samples" in done.stdout and "training 1/1" in done.stderr
    assert (tmp_path / "out/report/before_after.png").stat().st_size > 1000


@pytest.mark.long
def test_nbconvert_runs_the_notebook_and_shows_plots(tmp_path, subprocess_environment):
    pytest.importorskip("nbconvert", reason="pip install -e '.[notebook]'")
    environment = {**subprocess_environment, **SHORT, "FIRST_RUN_OUTPUT": str(tmp_path / "out")}
    del environment["MPLBACKEND"]  # the kernel's own shows figures below their cells
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", str(NOTEBOOK)]
    subprocess.run([*command, "--output-dir", str(tmp_path)], cwd=ROOT, env=environment, timeout=TIME_LIMIT, check=True)
    cells = json.loads((tmp_path / NOTEBOOK.name).read_text(encoding="utf-8"))["cells"]
    shown = [output["data"].keys() for cell in cells for output in cell.get("outputs", ()) if "data" in output]
    assert sum("image/png" in kinds for kinds in shown) == 3
