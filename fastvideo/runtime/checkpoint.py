"""Checkpoints that are whole or absent, and the way back into a run.

checkpoint-{step}-{epoch}/
    config.json, diffusion_pytorch_model.safetensors   loads with FluxTransformer2DModel.from_pretrained
    pytorch_lora_weights.safetensors                   instead, with --use_lora: FluxPipeline.load_lora_weights
    ema/                                               the same for the average of the weights, with --ema_decay
    optimizer/                                         only resuming needs it; split over the processes
    checkpoint.json                                    iteration, settings, versions, sizes and hashes of all files
latest                                                 a link to the newest checkpoint
best                                                   a link to the checkpoint of the best evaluation (--eval_steps)
"""

import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastvideo.config import PLACES, GRPOConfig
from fastvideo.io.files import write_bytes, write_json
from fastvideo.io.fingerprint import local_folder, model_fingerprint, sample_file
from fastvideo.models.flux import (
    add_lora,
    enable_gradient_checkpointing,
    is_lora,
    load_transformer,
    read_lora,
    save_lora,
)
from fastvideo.models.int8 import quantize_blocks
from fastvideo.runtime.engines import Engine, choose_engine

import torch
from diffusers import FluxTransformer2DModel
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

RECORD = "checkpoint.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
FORMAT = 1
# What resuming reads of RECORD, and of the settings in it.
NEEDED = ("iteration", "epoch", "optimizer_steps", "ema_optimization_step", "wandb_id", "settings", "base_model_hash")
NEEDED += ("files",)
NEEDED_SETTINGS = ("use_lora", "lora_rank", "lora_alpha", "lora_target_modules", "pretrained_model_name_or_path")
NEEDED_SETTINGS += ("engine", "processes", "zero_stage")


class CheckpointNotWritten(RuntimeError):
    """The disk is full or gone. The earlier checkpoints are untouched."""


# --- writing ----------------------------------------------------------------------------------------------------------


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "accelerate", "peft", "deepspeed"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def base_model_hash(config: GRPOConfig) -> str | None:
    """A hash of the base transformer's files; None: unknown, as a hub id's are not all on this machine (yet)."""
    path = config.pretrained_model_name_or_path
    folder = (local_folder(path) or Path(path)) / "transformer"
    index = folder / f"{WEIGHTS}.index.json"
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values() if index.exists() else [WEIGHTS]
    here = Path(path).is_dir() or all((folder / name).exists() for name in names)
    return model_fingerprint(path, ("transformer",)) if here else None


def _write_weights(folder: Path, weights: dict[str, torch.Tensor], engine: Engine) -> None:
    folder.mkdir(exist_ok=True)
    if engine.config.use_lora:
        save_lora(folder, weights, engine.transformer)
    else:
        engine.transformer.save_config(folder)
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def _sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def swap_in(ema: EMAModel, parameters: list[torch.nn.Parameter]) -> None:
    """Exchanges the average and the parameters; a second call undoes it."""
    for parameter, average in zip(parameters, ema.shadow_params, strict=True):
        keep = parameter.detach().clone()
        parameter.data.copy_(average)
        average.copy_(keep)


class CheckpointWriter:
    """Writes checkpoints while training goes on. All processes have one and call it at the same places.

    `save` copies the state to the CPU. Threads write the copy beside its final place, and the first process renames it
    when all have written their share: a kill leaves the old checkpoints and no half one.
    """

    def __init__(self, engine: Engine, ema: EMAModel | None) -> None:
        self.engine, self.ema = engine, ema
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.final: Path | None = None  # of the checkpoint that is being written
        self.pending: Future | None = None  # this process's share of it, if it has one

    def save(self, place: dict[str, Any]) -> None:
        """Begins a checkpoint, after the one before is whole.

        place: where the run is, JSON values; `iteration` and `epoch` name the folder.

        Raises:
            CheckpointNotWritten: the one before can't be written, or this one by an engine that doesn't wait with it.
        """
        self.finish()
        engine, ema, main = self.engine, self.ema, self.engine.accelerator.is_main_process
        final = Path(engine.config.output_dir) / f"checkpoint-{place['iteration']}-{place['epoch']}"
        if engine.any_process(main and final.exists()):  # the one resumed from, and no iteration since
            return
        part = _part_of(final)
        try:
            self.pending = engine.save_optimizer(part / "optimizer")
        except OSError as error:
            raise _not_written(final, error) from error
        self.final = final
        weights = {".": engine.trained_weights()}
        if ema is not None:
            swap_in(ema, engine.trained_parameters())
            weights["ema"] = engine.trained_weights()
            swap_in(ema, engine.trained_parameters())
        if main:
            place = {**place, "ema_optimization_step": ema.optimization_step if ema is not None else 0}
            self.pending = self.thread.submit(self._write, final, place, weights, self.pending)

    def _write(
        self, final: Path, place: dict[str, Any], weights: dict[str, dict[str, torch.Tensor]], optimizer: Future | None
    ) -> None:
        """The first process's thread: all but the optimizer's state, and the rename."""
        config, part = self.engine.config, _part_of(final)
        if optimizer is not None:
            optimizer.result()  # of all processes
        part.mkdir(exist_ok=True)
        for name, tensors in weights.items():
            _write_weights(part / name, tensors, self.engine)
        files = sorted(path for path in part.rglob("*") if path.is_file())
        record = {
            **place,
            "settings": run_settings(config, self.engine.accelerator.num_processes),
            "base_model_hash": base_model_hash(config),
            "versions": versions(),
            "format": FORMAT,
            "files": {path.relative_to(part).as_posix(): sample_file(path) for path in files},
        }
        write_json(part / RECORD, record)
        for path in (*part.rglob("*"), part):
            _sync(path)
        os.replace(part, final)
        _sync(final.parent)
        point_to(final.parent, place["best"])
        _rotate(final.parent, config.checkpoints_total_limit)

    @property
    def failed(self) -> bool:
        """Whether it is known here that the checkpoint which was begun can't be written; `finish` says why."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def finish(self) -> None:
        """Waits until the checkpoint that was begun, if any, is whole.

        Raises:
            CheckpointNotWritten: on all processes: it can't be written. The part that was is removed.
        """
        if self.final is None:
            return
        error = self.pending.exception() if self.pending is not None else None
        if error is not None and not isinstance(error, (OSError, SafetensorError, CheckpointException)):
            raise error
        if self.engine.any_process(error is not None):
            raise _not_written(self.final, error or OSError("another process failed")) from error
        self.final = self.pending = None


def _part_of(final: Path) -> Path:
    """Where a checkpoint is while it isn't whole: nothing there passes for a checkpoint."""
    return final.with_name(f".{final.name}.part")


def _cause(error: BaseException) -> BaseException:
    """The disk's error behind `error`, else the error itself. torch.save raises one of its own after the disk's."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    chain = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    return next((one for one in chain if isinstance(one, OSError)), error)


def _not_written(final: Path, error: BaseException) -> CheckpointNotWritten:
    free = shutil.disk_usage(next(folder for folder in final.parents if folder.exists())).free
    shutil.rmtree(_part_of(final), ignore_errors=True)
    cause = _cause(error)  # if another process's, without the disk's error
    reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
    return CheckpointNotWritten(f"{final} can't be written, with {free / 2**30:.1f} GiB free there: {reason}")


def _is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"checkpoint-\d+-\d+", path.name) is not None


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder, by iteration."""
    found = filter(_is_checkpoint, output_dir.glob("checkpoint-*"))
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def point_to(output_dir: Path, best: dict[str, Any] | None) -> None:
    """Makes `latest` and `best` links to the newest checkpoint and that of the best evaluation, each in one step.

    Removes them where there is none.
    """
    found = {int(path.name.split("-")[1]): path for path in checkpoints(output_dir)}
    for name, iteration in {"latest": max(found, default=None), "best": best and best["iteration"]}.items():
        link, part = output_dir / name, output_dir / f".{name}.part"
        if iteration not in found:
            link.unlink(missing_ok=True)
            continue
        part.unlink(missing_ok=True)  # left by a kill
        part.symlink_to(found[iteration].name)
        os.replace(part, link)


def _rotate(output_dir: Path, limit: int | None) -> None:
    best = (output_dir / "best").resolve()
    for path in [p for p in checkpoints(output_dir)[: -limit if limit else 0] if p.resolve() != best]:
        os.replace(path, _part_of(path))  # before it is half deleted
        shutil.rmtree(_part_of(path))


# --- reading ----------------------------------------------------------------------------------------------------------


def find_checkpoint(value: str, output_dir: Path) -> Path:
    """The folder that `--resume_from_checkpoint` means: `latest` is the one of the highest iteration in output_dir.

    Raises:
        ValueError: there is none, or it is damaged, or not one of this trainer.
    """
    if value == "latest":
        found = checkpoints(output_dir)
        if not found:
            raise ValueError(f"--resume_from_checkpoint latest: no checkpoint in --output_dir {output_dir}")
        path = found[-1]
    else:
        path = Path(value)
    if not (path / RECORD).is_file():
        raise ValueError(f"--resume_from_checkpoint {path}: no {RECORD} in it; give a checkpoint folder, or `latest`")
    problem = _damage(path)
    if problem:
        raise ValueError(f"--resume_from_checkpoint {path}: damaged: {problem}; resume from an earlier checkpoint")
    return path


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files."""
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
        if _is_checkpoint(path.resolve()) and path.resolve().name != own:
            return f"{RECORD} is that of {own}"
        for name, expected in record["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            found = sample_file(path / name)
            if found["bytes"] != expected["bytes"]:
                return f"{name} has {found['bytes']} bytes, {expected['bytes']} were written"
            if found != expected:
                return f"the content of {name} has changed"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{RECORD} can't be read: {error!r}"
    return None


def read_record(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The trained parameters of a checkpoint or its ema/, named as in the transformer."""
    return read_lora(folder) if is_lora(folder) else load_transformer(str(folder)).state_dict()


def load_trained(config: GRPOConfig, engine: Engine, checkpoint: Path | None) -> FluxTransformer2DModel:
    """The model with its trained parameters, all of them or adapters, as the base model or a checkpoint has them."""
    base = config.pretrained_model_name_or_path
    source = base if config.use_lora or checkpoint is None else str(checkpoint)
    master = torch.bfloat16 if config.master_weight_type == "bf16" else torch.float32
    dtype = engine.frozen_dtype if config.use_lora else master
    transformer = engine.load(source, dtype)
    if checkpoint is not None:
        check_base_model(checkpoint, config)  # which may have been downloaded just now
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
    """Puts the average of a checkpoint, if it has one, into `ema`, which is split like the parameters."""
    if not engine.any_process(engine.accelerator.is_main_process and (checkpoint / "ema").is_dir()):
        return
    weights = read_weights(checkpoint / "ema") if engine.accelerator.is_main_process else {}
    swap_in(ema, engine.trained_parameters())
    engine.set_trained_weights(weights)
    swap_in(ema, engine.trained_parameters())
    ema.optimization_step = read_record(checkpoint)["ema_optimization_step"]


def changed_settings(record: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """`name: then -> now` for every setting that a resumed run changes."""
    then = record["settings"]
    names = sorted((then.keys() | settings.keys()) - set(PLACES))
    return [f"{n}: {then.get(n)} -> {settings.get(n)}" for n in names if then.get(n) != settings.get(n)]


def set_aside_later(checkpoint: Path, output_dir: Path) -> list[Path]:
    """Moves checkpoints after `checkpoint` into superseded/, so that `latest` means the resumed run. Returns them."""
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
    """Parts of checkpoints that a kill cut off."""
    for path in output_dir.glob(".checkpoint-*.part"):
        shutil.rmtree(path)


def run_settings(config: GRPOConfig, processes: int) -> dict[str, object]:
    """What a checkpoint records of its run, and a resumed run is compared with."""
    return config.to_public_dict() | {
        "engine": choose_engine(config, processes),
        "processes": processes,
        "prompts_per_iteration": config.local_prompts(processes) * config.data_ranks(processes),
    }


def open_output(config: GRPOConfig, processes: int) -> Path | None:
    """Makes the output folder ready; returns the checkpoint to resume from. Never mixes two runs in one folder."""
    output = Path(config.output_dir)
    used = (output / "metrics.jsonl").exists() or bool(checkpoints(output))
    checkpoint = None
    if config.resume_from_checkpoint:
        checkpoint = find_checkpoint(config.resume_from_checkpoint, output)
        if used and checkpoint.resolve().parent != output.resolve():
            raise ValueError(f"--output_dir {output}: holds another run than --resume_from_checkpoint {checkpoint}")
        check_resumable(checkpoint, config, processes)
    elif used:
        raise ValueError(
            f"--output_dir {output}: holds a run already; choose another folder, or --resume_from_checkpoint latest"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {output}: can't be made: {error.strerror}") from error
    remove_leftovers(output)  # before anything is written: they may have filled the disk
    if checkpoint is not None:
        for moved in set_aside_later(checkpoint, output):
            print(f"warning: a checkpoint after {checkpoint.name} was moved to {moved}", file=sys.stderr)
        truncate_metrics(output / "metrics.jsonl", read_record(checkpoint)["iteration"])
        point_to(output, read_record(checkpoint).get("best"))
    return checkpoint


def check_resumable(checkpoint: Path, config: GRPOConfig, processes: int) -> None:
    """Lists what differs between a checkpoint's run and this one. The command line's values are used.

    Raises:
        ValueError: with these settings the checkpoint can't be gone on from.
    """
    record, where = read_record(checkpoint), f"--resume_from_checkpoint {checkpoint}"
    then, now = record["settings"], run_settings(config, processes)
    changed = changed_settings(record, now)
    fixed = ["use_lora", *(("lora_rank", "lora_alpha", "lora_target_modules") if config.use_lora else ())]
    for name in fixed:
        if then[name] != now[name]:
            raise ValueError(f"--{name} {now[name]}: {where} was trained with {then[name]}")
    check_base_model(checkpoint, config)
    engine = choose_engine(config, processes)
    if "deepspeed" in (engine, then["engine"]) and (engine, processes, config.zero_stage) != (
        then["engine"],
        then["processes"],
        then["zero_stage"],
    ):
        raise ValueError(
            f"{where}: DeepSpeed's optimizer state can't change hands: it is of {then['engine']} (ZeRO-"
            f"{then['zero_stage']}) on {then['processes']} processes, this run is {engine} on {processes}"
        )
    used, installed = record.get("versions", {}), versions()
    other = [f"{name} {used[name]} -> {installed.get(name)}" for name in used if used[name] != installed.get(name)]
    if other:
        print(f"resuming {checkpoint} with other versions, numbers may differ in rounding: {', '.join(other)}")
    if changed:
        print(f"resuming {checkpoint} with changed settings, which count from now on: {'; '.join(changed)}")


def check_base_model(checkpoint: Path, config: GRPOConfig, flag: str = "resume_from_checkpoint") -> None:
    """Raises ValueError when the base model is known not to be that of the checkpoint's run."""
    record, now = read_record(checkpoint), base_model_hash(config)
    if None not in (now, record["base_model_hash"]) and now != record["base_model_hash"]:
        raise ValueError(
            f"--{flag} {checkpoint}: was trained from another base model "
            f"({record['settings']['pretrained_model_name_or_path']}) than "
            f"--pretrained_model_name_or_path {config.pretrained_model_name_or_path}"
        )


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
