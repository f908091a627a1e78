"""Resumes a run: finds a checkpoint, checks that it is complete and fits the run, and loads its state."""

import json
import os
import shutil
import sys
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvideo.cli import FlagError
from fastvideo.config import PLACES, GRPOConfig
from fastvideo.io.files import write_bytes
from fastvideo.io.fingerprint import sample_file
from fastvideo.models.flux import add_lora, load_transformer
from fastvideo.models.flux_speed import enable_gradient_checkpointing
from fastvideo.models.int8 import quantize_blocks
from fastvideo.models.lora import LORA_FILE, read_trained_lora
from fastvideo.runtime.checkpoint import (
    FORMAT,
    RECORD,
    base_model_hash,
    checkpoints,
    is_checkpoint,
    point_to,
    read_record,
    run_settings,
    swap_in,
    versions,
)
from fastvideo.runtime.engines import Engine, choose_engine

import torch
from diffusers import FluxTransformer2DModel
from diffusers.training_utils import EMAModel

# Keys that resuming needs in RECORD, and in its settings.
NEEDED = ("iteration", "epoch", "optimizer_steps", "ema_optimization_step", "wandb_id", "settings", "base_model_hash")
NEEDED += ("files",)
NEEDED_SETTINGS = ("use_lora", "lora_rank", "lora_alpha", "lora_target_modules", "pretrained_model_name_or_path")
NEEDED_SETTINGS += ("engine", "processes", "zero_stage")


@dataclass
class Progress:
    """The progress of a run. A checkpoint stores all fields except the last two.

    Attributes:
        iteration: iterations done. optimizer_steps: optimizer steps taken, without skipped ones.
        prompts: prompts that the run used before this process started. None: unknown (new run, or an old checkpoint).
        wandb_id: id of the run in wandb. best: iteration, value and `measure` of the best evaluation so far.
        skipped_in_a_row: optimizer steps skipped since the last one that was taken.
        too_many_failures: whether the last iteration had more failed scores than --max_reward_failures allows.
    """

    iteration: int = 0
    optimizer_steps: int = 0
    prompts: int | None = None
    wandb_id: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    best: dict[str, Any] | None = None
    skipped_in_a_row: int = 0
    too_many_failures: bool = False

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> "Progress":
        record = read_record(checkpoint)
        names = ("iteration", "optimizer_steps", "wandb_id")
        return cls(**{n: record[n] for n in names}, prompts=record.get("prompts"), best=record.get("best"))

    def record(self, epoch: int, prompts: int) -> dict[str, Any]:
        """The entries of checkpoint.json. prompts: number of prompts of the training stream used so far."""
        found = {"iteration": self.iteration, "epoch": epoch, "optimizer_steps": self.optimizer_steps}
        return found | {"prompts": prompts, "wandb_id": self.wandb_id, "best": self.best}


def find_checkpoint(value: str, output_dir: Path) -> Path:
    """The checkpoint folder of `--resume_from_checkpoint`; `latest` means the highest iteration in output_dir.

    Raises:
        FlagError: there is no checkpoint, or it is damaged, or another program wrote it.
    """
    if value == "latest":
        found = checkpoints(output_dir)
        if not found:
            raise FlagError("resume_from_checkpoint", "latest", f"no checkpoint in --output_dir {output_dir}")
        path = found[-1]
    else:
        path = Path(value)
    if not (path / RECORD).is_file():
        problem = f"no {RECORD} in it; give a checkpoint folder, or `latest`"
        raise FlagError("resume_from_checkpoint", path, problem)
    problem = _damage(path)
    if problem:
        raise FlagError("resume_from_checkpoint", path, f"damaged: {problem}; resume from an earlier checkpoint")
    return path


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if nothing is."""
    try:
        record = read_record(path)
        if record["format"] != FORMAT:
            return f"{RECORD} has format {record['format']}, this version reads {FORMAT}"
        missing = [name for name in NEEDED if name not in record]
        settings = record.get("settings", NEEDED_SETTINGS)
        missing += [f"settings.{name}" for name in NEEDED_SETTINGS if name not in settings]
        if missing:
            return f"{RECORD} lacks {', '.join(missing)}"
        for name in ("iteration", "epoch", "optimizer_steps"):
            if not isinstance(record[name], int):
                return f"{name} in {RECORD} is {record[name]!r}"
        own = f"checkpoint-{record['iteration']}-{record['epoch']}"
        if is_checkpoint(path.resolve()) and path.resolve().name != own:
            return f"{RECORD} belongs to {own}"
        for name, expected in record["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            found = sample_file(path / name)
            if found["bytes"] != expected["bytes"]:
                return f"{name} has {found['bytes']} bytes instead of {expected['bytes']}"
            if found != expected:
                return f"the content of {name} has changed"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{RECORD} can't be read: {error!r}"
    return None


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The trained parameters in a checkpoint or its ema/, named as in the transformer."""
    adapters = folder / LORA_FILE
    return read_trained_lora(adapters) if adapters.is_file() else load_transformer(str(folder)).state_dict()


def load_trained(config: GRPOConfig, engine: Engine, checkpoint: Path | None) -> FluxTransformer2DModel:
    """The model to train, full or with adapters, with the weights of the base model or of a checkpoint."""
    base = config.pretrained_model_name_or_path
    source = base if config.use_lora or checkpoint is None else str(checkpoint)
    master = torch.bfloat16 if config.master_weight_type == "bf16" else torch.float32
    dtype = engine.frozen_dtype if config.use_lora else master
    transformer = engine.load(source, dtype)
    if checkpoint is not None:
        check_base_model(checkpoint, config.pretrained_model_name_or_path)  # it may have been downloaded just now
    if config.quantize_base:
        quantize_blocks(transformer, engine.accelerator.device)
    if config.use_lora:
        add_lora(transformer, config.lora_rank, config.lora_alpha, config.lora_target_modules, config.seed)
        if checkpoint is not None:
            transformer.load_state_dict(read_weights(checkpoint), strict=False)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(transformer, config.selective_checkpointing)
    return transformer.train()


def load_ema(checkpoint: Path, engine: Engine, ema: EMAModel) -> None:
    """Loads the averaged weights of a checkpoint, if any, into `ema`, which is sharded like the parameters."""
    if not engine.any_process(engine.accelerator.is_main_process and (checkpoint / "ema").is_dir()):
        return
    weights = read_weights(checkpoint / "ema") if engine.accelerator.is_main_process else {}
    swap_in(ema, engine.trained_parameters())
    engine.set_trained_weights(weights)
    swap_in(ema, engine.trained_parameters())
    ema.optimization_step = read_record(checkpoint)["ema_optimization_step"]


def changed_settings(record: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """One `name: old -> new` per setting that a resumed run changes."""
    then = record["settings"]
    names = sorted((then.keys() | settings.keys()) - set(PLACES))
    return [f"{n}: {then.get(n)} -> {settings.get(n)}" for n in names if then.get(n) != settings.get(n)]


def set_aside_later(checkpoint: Path, output_dir: Path) -> list[Path]:
    """Moves later checkpoints into superseded/, so that `latest` means the resumed run. Returns their new paths."""
    later = [p for p in checkpoints(output_dir) if int(p.name.split("-")[1]) > read_record(checkpoint)["iteration"]]
    moved = []
    for path in later:
        attempt = 0
        while (target := output_dir / "superseded" / f"{path.name}.{attempt}").exists():
            attempt += 1
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
        moved.append(target)
    return moved


def remove_leftovers(output_dir: Path) -> None:
    """Deletes incomplete checkpoints of a killed run."""
    for path in output_dir.glob(".checkpoint-*.part"):
        shutil.rmtree(path)


def open_output(config: GRPOConfig, processes: int) -> Path | None:
    """Prepares the output folder and returns the checkpoint to resume from. Never mixes two runs in one folder."""
    output = Path(config.output_dir)
    used = (output / "metrics.jsonl").exists() or bool(checkpoints(output))
    checkpoint = None
    if config.resume_from_checkpoint:
        checkpoint = find_checkpoint(config.resume_from_checkpoint, output)
        if used and checkpoint.resolve().parent != output.resolve():
            raise FlagError("output_dir", output, f"holds another run than --resume_from_checkpoint {checkpoint}")
        check_resumable(checkpoint, config, processes)
    elif used:
        problem = "holds a run already; choose another folder or --resume_from_checkpoint latest"
        raise FlagError("output_dir", output, problem)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FlagError("output_dir", output, f"can't be made: {error.strerror}") from error
    remove_leftovers(output)  # first of all, because they may fill the disk
    if checkpoint is not None:
        for moved in set_aside_later(checkpoint, output):
            print(f"warning: a checkpoint after {checkpoint.name} was moved to {moved}", file=sys.stderr)
        truncate_metrics(output / "metrics.jsonl", read_record(checkpoint)["iteration"])
        point_to(output, read_record(checkpoint).get("best"))
    return checkpoint


def check_resumable(checkpoint: Path, config: GRPOConfig, processes: int) -> None:
    """Prints how the settings differ from the checkpoint's. The command line's values count.

    Raises:
        FlagError: the settings can't continue from the checkpoint.
    """
    record = read_record(checkpoint)
    then, now = record["settings"], run_settings(config, processes)
    changed = changed_settings(record, now)
    fixed = ["use_lora", *(("lora_rank", "lora_alpha", "lora_target_modules") if config.use_lora else ())]
    for name in fixed:
        if then[name] != now[name]:
            problem = f"--resume_from_checkpoint {checkpoint} was trained with {then[name]}"
            raise FlagError(name, now[name], problem)
    check_base_model(checkpoint, config.pretrained_model_name_or_path)
    engine = choose_engine(config, processes)
    if "deepspeed" in (engine, then["engine"]) and (engine, processes, config.zero_stage) != (
        then["engine"],
        then["processes"],
        then["zero_stage"],
    ):
        raise FlagError(
            "resume_from_checkpoint",
            checkpoint,
            f"DeepSpeed's optimizer state can't be converted: it was saved by {then['engine']} "
            f"(ZeRO-{then['zero_stage']}) on {then['processes']} processes, this run is {engine} on {processes}",
        )
    used, installed = record.get("versions", {}), versions()
    other = [f"{name} {used[name]} -> {installed.get(name)}" for name in used if used[name] != installed.get(name)]
    if other:
        print(f"resuming {checkpoint} with other versions, numbers may differ in rounding: {', '.join(other)}")
    if changed:
        print(f"resuming {checkpoint} with changed settings, which count from now on: {'; '.join(changed)}")


def check_base_model(checkpoint: Path, base_model: str, field: str = "resume_from_checkpoint") -> None:
    """Raises FlagError about the setting `field` if the checkpoint is known to have another base model."""
    record, now = read_record(checkpoint), base_model_hash(base_model)
    if None not in (now, record["base_model_hash"]) and now != record["base_model_hash"]:
        raise FlagError(
            field,
            checkpoint,
            f"was trained from another base model ({record['settings']['pretrained_model_name_or_path']}) than "
            f"--pretrained_model_name_or_path {base_model}",
        )


def truncate_metrics(path: Path, last_step: int) -> None:
    """Removes the lines of metrics.jsonl after iteration `last_step`, atomically. A resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line + "\n")
        except ValueError:
            break  # a killed run left half a line
    write_bytes(path, "".join(kept).encode())
