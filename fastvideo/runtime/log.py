"""The files that a run writes while it trains: args.json, metrics.jsonl, image grids, and wandb's files on request.

args.json holds the settings, and under `reward_names` the names of the scores (see io/scores.py). wandb gets the
metrics under the same names, the grids as `samples`, and the pictures of an evaluation, in the order of the prompts,
as `evaluation_samples`. wandb.json says where wandb's files are and how to upload them later.
"""

import io
import json
import math
import os
import shlex
from pathlib import Path
from typing import Any

import fastvideo.torchvision_repair  # noqa: F401  (before diffusers)
from fastvideo.config import GRPOConfig
from fastvideo.io.files import write_bytes, write_json
from fastvideo.io.scores import evaluation_scores, read_scores

from diffusers.utils import make_image_grid


class Log:
    """Writes the files of a run, on the main process."""

    def __init__(self, config: GRPOConfig, wandb_id: str, reward_names: dict[str, Any]) -> None:
        """wandb_id: the run's id in wandb; a resumed run keeps the id. reward_names: see `reward_schema`."""
        self.folder, self.run = Path(config.output_dir), None
        write_json(self.folder / "args.json", config.to_public_dict() | {"reward_names": reward_names})
        if config.use_wandb:
            import wandb

            mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
            self.run = wandb.init(
                project=config.wandb_project,
                name=config.experiment_name,
                dir=config.output_dir,
                config=config.to_public_dict(),
                mode=mode,
                id=wandb_id,
                resume="allow",
            )
            # A resumed run adds a folder with the same id; --append uploads it as a continuation.
            folders = sorted(map(str, (self.folder / "wandb").glob(f"*run-*-{wandb_id}")))
            sync = shlex.join(["wandb", "sync", "--append", *folders]) if self.run.offline else None
            record = {"id": wandb_id, "project": config.wandb_project, "folders": folders, "sync": sync}
            write_json(self.folder / "wandb.json", record)
            if sync:
                print(f"wandb is offline; to upload this run later: {sync}")

    def write(self, metrics: dict) -> None:
        """Appends a line to metrics.jsonl. Numbers that aren't finite become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self.run is not None:
            self.run.log(finite, step=metrics["step"])
            if "evaluation_reward" in metrics:
                self._log_evaluation(metrics["step"])

    def _log_evaluation(self, step: int) -> None:
        import wandb

        entries = read_scores(evaluation_scores(self.folder, step), "output_dir")
        pictures = [wandb.Image(str(entry["path"]), caption=entry["prompt"]) for entry in entries]
        self.run.log({"evaluation_samples": pictures}, step=step)

    def write_images(self, step: int, images: list) -> None:
        """Writes the pictures as one grid, images/iteration_{step}.png."""
        rows = max(n for n in range(1, math.isqrt(len(images)) + 1) if len(images) % n == 0)
        path = self.folder / "images" / f"iteration_{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        grid = make_image_grid(images, rows=rows, cols=len(images) // rows)
        data = io.BytesIO()
        grid.save(data, "PNG")
        write_bytes(path, data.getvalue())
        if self.run is not None:
            import wandb

            self.run.log({"samples": wandb.Image(grid)}, step=step)

    def close(self) -> None:
        """Ends the run in wandb."""
        if self.run is not None:
            self.run.finish()
