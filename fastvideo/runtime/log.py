"""The files that a run writes while it trains: args.json, metrics.jsonl and image grids; and what its trackers get.

args.json holds the settings, and under `reward_names` the names of the scores (see io/scores.py). Trackers get the
metrics under the same names, the grids as `samples`, and the pictures of an evaluation, in the order of the prompts,
as `evaluation_samples`.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import fastvideo.torchvision_repair  # noqa: F401  (before diffusers)
from fastvideo.config import GRPOConfig
from fastvideo.io.files import write_bytes, write_json
from fastvideo.io.pictures import png
from fastvideo.io.scores import evaluation_scores, read_scores
from fastvideo.runtime.tracking import Tracker, close_trackers

from diffusers.utils import make_image_grid


class Log:
    """Writes the files of a run, on the main process."""

    def __init__(self, config: GRPOConfig, run_id: str, done: int, reward_names: dict[str, Any]) -> None:
        """run_id, done: see `Tracker`. reward_names: see `reward_schema`."""
        self.folder = Path(config.output_dir)
        write_json(self.folder / "args.json", config.to_public_dict() | {"reward_names": reward_names})
        write_bytes(self.folder / "config.yaml", config.to_yaml().encode())
        self.trackers = [Tracker(name, config, run_id, done) for name in config.log_with]

    def write(self, metrics: dict) -> None:
        """Appends a line to metrics.jsonl. Numbers that aren't finite become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for tracker in self.trackers:
            tracker.send(tracker.log, finite, metrics["step"])
            if "evaluation_reward" in metrics:
                tracker.send(tracker.show, "evaluation_samples", self._evaluated, metrics["step"])

    def _evaluated(self, step: int) -> list[tuple[str, str]]:
        entries = read_scores(evaluation_scores(self.folder, step), "output_dir")
        return [(str(entry["path"]), entry["prompt"]) for entry in entries]

    def write_images(self, step: int, images: list, prompt: str) -> None:
        """Writes the pictures as one grid, images/iteration_{step}.png, with their prompt in the file."""
        rows = max(n for n in range(1, math.isqrt(len(images)) + 1) if len(images) % n == 0)
        path = self.folder / "images" / f"iteration_{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        write_bytes(path, png(make_image_grid(images, rows, len(images) // rows), {"prompt": prompt}))
        for tracker in self.trackers:
            tracker.send(tracker.show, "samples", lambda step: [(str(path), prompt)], step)

    def close(self) -> None:
        """Ends the run in its trackers."""
        close_trackers(self.trackers)
