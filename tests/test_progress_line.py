"""The line that says where long work is, in a terminal, in a narrow one, and in a file."""

import os
import pty
import re

from fastvideo.io import progress_line
from fastvideo.io.processes import Processes
from fastvideo.io.progress_line import ProgressLine, describe_iteration
from fastvideo.io.resumable import Journal
from fastvideo.io.words import counted, duration

import pytest


def metrics(step: int, **changed) -> dict:
    phases = {f"seconds_{name}": 1.25 for name in ("rollout", "decode", "reward", "train")}
    counts = {"step": step, "window": [2, 3, 4], "reward": 0.5, "images": 8, "failed_rewards": 0, "failed_m": 0}
    return counts | phases | {"seconds_total": 5.5} | changed


def test_a_file_gets_whole_lines_the_first_the_last_and_one_per_interval(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress_line.time, "monotonic", lambda: clock[0])
    with ProgressLine("training", 100, 90, True) as line:
        for step in range(91, 101):
            clock[0] += 12
            changed = {"failed_rewards": 2, "failed_m": 2, "zero_spread_groups": 1} if step == 91 else {}
            line.show(step, describe_iteration(metrics(step, **changed), 0.25))
    first, *_, last = lines = capsys.readouterr().err.splitlines()
    assert first == (
        "training 91/100, 1 min 48 s left; reward 0.5000; evaluation 0.2500; window 2-4; 25% of the scores failed; "
        "1 group without spread; 5.5 s: rollout 1.25, decode 1.25, reward 1.25, train 1.25"
    )
    assert [re.search(r"\d+/100", text)[0] for text in lines] == ["91/100", "94/100", "97/100", "100/100"]
    assert "left" not in last


@pytest.mark.parametrize("columns", [200, 40])
def test_a_terminal_gets_one_line_that_never_wraps(monkeypatch, columns):
    main, other = pty.openpty()
    monkeypatch.setenv("COLUMNS", str(columns))
    with os.fdopen(other, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with ProgressLine("training", 300, 0, True) as line:
            line.show(1, describe_iteration(metrics(1, window=[], reward=float("nan"))))
            line.show(2, describe_iteration(metrics(2)))
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
    with ProgressLine("training", 2, 0, False) as line:
        line.show(1)
    assert capsys.readouterr() == ("", "")


class Kept(Journal[str, int]):
    def key(self, item: str) -> str:
        return item


def test_the_time_left_of_resumed_work_follows_from_what_is_still_made(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress_line.time, "monotonic", lambda: clock[0])

    def make(batch: list[str]) -> list[int]:
        clock[0] += 60 * len(batch)
        return [0] * len(batch)

    journal = Kept(None, "")
    journal.results = dict.fromkeys("abcd", 0)
    assert journal.complete("abcdefgh", 2, make, Processes(0, 1, "cpu"), "sampling pictures") == (4, 4)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["sampling pictures 2/8", "sampling pictures 6/8, 2 min left", "sampling pictures 8/8"]
    journal.complete("ijkl", 2, make, Processes(1, 2, "cpu"), "sampling pictures")
    assert capsys.readouterr().err == ""
    journal.complete("mnop", 2, make, Processes(0, 2, "cpu"), "sampling pictures")
    assert capsys.readouterr().err == "sampling pictures, first of 2 processes: 2/2\n"


def test_amounts_in_words():
    seconds = (0.2, 59, 61, 3600, 3660, 90_000, 864_000)
    assert [duration(n) for n in seconds] == ["0 s", "59 s", "1 min 1 s", "1 h", "1 h 1 min", "1 d 1 h", "10 d"]
    assert [counted(1, "prompt"), counted(2, "process"), counted(0, "step")] == ["1 prompt", "2 processes", "0 steps"]
