"""The line that says where a training is, in a terminal, in a narrow one, and in a file."""

import os
import pty
import re

from fastvideo.io.words import counted, duration
from fastvideo.runtime import progress_line
from fastvideo.runtime.progress_line import ProgressLine

import pytest


def metrics(step: int, **changed) -> dict:
    phases = {f"seconds_{name}": 1.25 for name in ("rollout", "decode", "reward", "train")}
    counts = {"step": step, "window": [2, 3, 4], "reward": 0.5, "images": 8, "failed_rewards": 0, "failed_m": 0}
    return counts | phases | {"seconds_total": 5.5} | changed


def test_a_file_gets_whole_lines_the_first_the_last_and_one_per_interval(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress_line.time, "monotonic", lambda: clock[0])
    with ProgressLine(100, 90, True) as line:
        for step in range(91, 101):
            clock[0] += 12
            line.show(metrics(step, **({"failed_rewards": 2, "failed_m": 2} if step == 91 else {})))
    first, *_, last = lines = capsys.readouterr().err.splitlines()
    assert first == (
        "training 91/100, 1 min 48 s left; reward 0.5000; window 2-4; 25% of the scores failed; "
        "5.5 s: rollout 1.25, decode 1.25, reward 1.25, train 1.25"
    )
    assert [re.search(r"\d+/100", text)[0] for text in lines] == ["91/100", "94/100", "97/100", "100/100"]
    assert "left" not in last


@pytest.mark.parametrize("columns", [200, 40])
def test_a_terminal_gets_one_line_that_never_wraps(monkeypatch, columns):
    main, other = pty.openpty()
    monkeypatch.setenv("COLUMNS", str(columns))
    with os.fdopen(other, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with ProgressLine(300, 0, True) as line:
            line.show(metrics(1, window=[], reward=float("nan")))
            line.show(metrics(2))
        terminal.flush()
        text = ""
        while not text.endswith("\n"):  # a terminal hands over what it has, in any pieces
            text += os.read(main, 10_000).decode()
    os.close(main)
    assert text.count("\n") == 1 and text.endswith("\n")
    shown = text.strip().split("\r")
    assert all(len(part) < columns for part in shown) and shown[-1].startswith("training 2/300, ")
    assert ("train 1.25" in text) == (columns == 200)


def test_other_processes_write_nothing(capsys):
    with ProgressLine(2, 0, False) as line:
        line.show(metrics(1))
    assert capsys.readouterr() == ("", "")


def test_amounts_in_words():
    seconds = (0.2, 59, 61, 3600, 3660, 90_000, 864_000)
    assert [duration(n) for n in seconds] == ["0 s", "59 s", "1 min 1 s", "1 h", "1 h 1 min", "1 d 1 h", "10 d"]
    assert [counted(1, "prompt"), counted(2, "process"), counted(0, "step")] == ["1 prompt", "2 processes", "0 steps"]
