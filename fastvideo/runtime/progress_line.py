"""One line that says where a training is: iteration, time left, reward, window, failed scores, seconds by phase."""

import math
import shutil
import sys
import time
from typing import Any

from fastvideo.io.words import duration

EVERY = 30.0  # seconds between lines where the output is no terminal
PHASES = ("scout", "rollout", "decode", "reward", "train", "evaluation")


def describe_iteration(metrics: dict[str, Any]) -> str:
    """What an iteration did, the most important first: a narrow terminal cuts the end."""
    reward = metrics["reward"]
    parts = [f"reward {reward:.4f}" if math.isfinite(reward) else "no reward"]
    if window := metrics["window"]:
        parts.append(f"window {window[0]}-{window[-1]}")
    if failed := metrics.get("failed_rewards"):
        models = sum(name.startswith("failed_") for name in metrics) - 1  # failed_rewards is their sum
        parts.append(f"{failed / (metrics['images'] * models):.0%} of the scores failed")
    phases = {name: metrics[f"seconds_{name}"] for name in PHASES if f"seconds_{name}" in metrics}
    if phases:
        total = metrics["seconds_total"] + phases.get("evaluation", 0.0)
        parts.append(f"{total:.3g} s: " + ", ".join(f"{name} {seconds:.3g}" for name, seconds in phases.items()))
    return "; ".join(parts)


class ProgressLine:
    """Writes to stderr: in a terminal one line that changes, elsewhere a new line at most every EVERY seconds, and one
    after the last iteration.

    total, done: iterations of the run, and of them those that are done already. shown: whether this process writes.
    """

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self.total, self.first, self.shown = total, done, shown
        self.start = self.written = time.monotonic()
        self.text = ""  # what the terminal shows

    def show(self, metrics: dict[str, Any]) -> None:
        """metrics: of the iteration that has just ended."""
        now, done = time.monotonic(), metrics["step"]
        if not self.shown:
            return
        left = (now - self.start) / max(done - self.first, 1) * (self.total - done)
        place = f"training {done}/{self.total}, {duration(left)} left" if left else f"training {done}/{self.total}"
        line = f"{place}; {describe_iteration(metrics)}"
        if sys.stderr.isatty():
            line = line[: shutil.get_terminal_size().columns - 1]
            sys.stderr.write(f"\r{line:<{len(self.text)}}")
            self.text = line
        elif done in (self.first + 1, self.total) or now - self.written >= EVERY:
            sys.stderr.write(f"{line}\n")
            self.written = now
        sys.stderr.flush()

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the terminal at the start of a new line."""
        if self.text:
            sys.stderr.write("\n")
