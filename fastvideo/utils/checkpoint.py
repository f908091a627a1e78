"""Checkpoints that are whole or absent, and the way back into a run.

checkpoint-{step}-{epoch}/
    config.json, diffusion_pytorch_model.safetensors   loads with FluxTransformer2DModel.from_pretrained
    training_state.pt                                  optimizer, schedule, iteration; only resuming needs it
    ema/                                               the averaged transformer, with --ema_decay
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from fastvideo.utils.files import write_bytes

import torch
from diffusers import FluxTransformer2DModel

STATE = "training_state.pt"
ONE_FILE = "1TB"  # diffusers would split FLUX.1's weights


def find_checkpoint(value: str, output_dir: Path) -> Path:
    """The folder that `--resume_from_checkpoint` means. Raises ValueError when there is none that can be resumed."""
    if value == "latest":
        found = sorted(
            (path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+-\d+", path.name)),
            key=lambda path: int(path.name.split("-")[1]),
        )
        if not found:
            raise ValueError(f"--resume_from_checkpoint latest: no checkpoint in --output_dir {output_dir}")
        return found[-1]
    path = Path(value)
    for name in (STATE, "config.json", "diffusion_pytorch_model.safetensors"):
        if not (path / name).is_file():
            raise ValueError(
                f"--resume_from_checkpoint {value}: no {name} in it; give a checkpoint folder, or `latest`"
            )
    return path


def save_checkpoint(
    output_dir: Path, step: int, epoch: int, transformer: FluxTransformer2DModel, state: dict[str, Any], ema: Any = None
) -> Path:
    """Writes a checkpoint beside its final place and renames it, so that a kill leaves the old ones and no half one.

    state: tensors, numbers, strings, lists and dicts only, as it is read back with weights_only. ema: an EMAModel.
    """
    final = output_dir / f"checkpoint-{step}-{epoch}"
    part = output_dir / f".{final.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    transformer.save_pretrained(part, max_shard_size=ONE_FILE)
    if ema is not None:
        ema.store(transformer.parameters())
        ema.copy_to(transformer.parameters())
        transformer.save_pretrained(part / "ema", max_shard_size=ONE_FILE)
        ema.restore(transformer.parameters())
        state = {**state, "ema_optimization_step": ema.optimization_step}
    torch.save(state, part / STATE)
    for path in part.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    os.replace(part, final)
    return final


def load_state(checkpoint: Path) -> dict[str, Any]:
    """What `save_checkpoint` was given as `state`, on the CPU."""
    return torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)


def truncate_metrics(path: Path, last_step: int) -> None:
    """Drops the lines of metrics.jsonl after iteration `last_step`, which a resumed run writes again, atomically."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except ValueError:
            break  # a line cut off by a kill
    write_bytes(path, "".join(kept).encode())
