"""One line that says where long work is: how much is done, the time left, and for a training what its iterations do."""

import math
import shutil
import sys
import time
from typing import Any

from fastvideo.io.words import counted, duration

EVERY = 30.0  # seconds between lines where the output is no terminal
PHASES = ("scout", "rollout", "decode", "reward", "train", "evaluation")


def describe_iteration(metrics: dict[str, Any], evaluated: float | None = None) -> str:
    """What an iteration did, the most important first: a narrow terminal cuts the end.

    evaluated: reward of the last evaluation. None: there was none.
    """
    reward = metrics["reward"]
    parts = [f"reward {reward:.4f}" if math.isfinite(reward) else "no reward"]
    if evaluated is not None:
        parts.append(f"evaluation {evaluated:.4f}")
    if window := metrics["window"]:
        parts.append(f"window {window[0]}-{window[-1]}")
    if failed := metrics.get("failed_rewards"):
        models = sum(name.startswith("failed_") for name in metrics) - 1  # failed_rewards is their sum
        parts.append(f"{failed / (metrics['images'] * models):.0%} of the scores failed")
    if flat := metrics.get("zero_spread_groups"):
        parts.append(f"{counted(flat, 'group')} without spread")
    phases = {name: metrics[f"seconds_{name}"] for name in PHASES if f"seconds_{name}" in metrics}
    if phases:
        total = metrics["seconds_total"] + phases.get("evaluation", 0.0)
        parts.append(f"{total:.3g} s: " + ", ".join(f"{name} {seconds:.3g}" for name, seconds in phases.items()))
    return "; ".join(parts)


class ProgressLine:
    """Writes to stderr: in a terminal one line that changes, elsewhere a new line at most every EVERY seconds, and one
    after the first and the last part of the work.

    what, total, done: name of the work, number of its parts, and how many of them cost no time: they were done before.
    shown: whether this process writes.
    """

    def __init__(self, what: str, total: int, done: int, shown: bool) -> None:
        self.what, self.total, self.free, self.shown = what, total, done, shown
        self.start = time.monotonic()
        self.written: float | None = None
        self.text = ""  # what the terminal shows

    def show(self, done: int, text: str = "") -> None:
        """done: number of parts, with those that cost no time. text: more about the last one."""
        if not self.shown:
            return
        now = time.monotonic()
        each = (now - self.start) / (done - self.free) if done > self.free else 0.0
        left = each * (self.total - done)
        line = f"{self.what} {done}/{self.total}" + f", {duration(left)} left" * (left > 0) + f"; {text}" * bool(text)
        if sys.stderr.isatty():
            line = line[: shutil.get_terminal_size().columns - 1]
            sys.stderr.write(f"\r{line:<{len(self.text)}}")
            self.text = line
        elif self.written is None or done == self.total or now - self.written >= EVERY:
            sys.stderr.write(f"{line}\n")
            self.written = now
        sys.stderr.flush()

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the terminal at the start of a new line."""
        if self.text:
            sys.stderr.write("\n")
