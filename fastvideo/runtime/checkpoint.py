"""Writes checkpoints. A checkpoint is complete or absent. resume.py reads checkpoints.

checkpoint-{step}-{epoch}/
    config.json, diffusion_pytorch_model.safetensors   loads with from_pretrained of diffusers' class
    pytorch_lora_weights.safetensors                   with --use_lora instead: the pipeline's load_lora_weights
    ema/                                               with --ema_decay: the average of the weights, same files
    old_policy/, reference/                            other copies that a run needs (policies.py), only for resuming
    optimizer/                                         optimizer state, only for resuming; one share per process
    checkpoint.json                                    iteration, settings, versions, sizes and hashes of all files,
                                                       and a hash of this record itself
latest                                                 link to the newest checkpoint
best                                                   link to the checkpoint of the best evaluation (--eval_steps)
"""

import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastvideo.cli import FlagError
from fastvideo.config import CURRENT, GRPOConfig
from fastvideo.io.files import sync, usual_modes, write_json
from fastvideo.io.fingerprint import local_folder, model_fingerprint, sample_file
from fastvideo.io.messages import warn
from fastvideo.io.resumable import digest
from fastvideo.io.waiting import PATIENCE, result_of
from fastvideo.io.weights import GGUF, weight_files
from fastvideo.models.lora import save_lora
from fastvideo.models.pretrained import BASE, may_be_hub_id
from fastvideo.runtime.engines import Engine, choose_engine
from fastvideo.runtime.policies import Policies

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

RECORD = "checkpoint.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
FORMAT = 1
LINKS = ("latest", "best")


class CheckpointNotWritten(RuntimeError):
    """Raised when the disk is full or gone. Earlier checkpoints stay complete."""


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that affect a run's numbers."""
    found = {"python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "accelerate", "peft", "deepspeed"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def base_model_hash(path: str) -> str | None:
    """A hash of the base transformer's files. None: some files of a hub id are not on this machine.

    Raises FlagError for an index of files that can't be read.
    """
    try:
        files = weight_files((local_folder(path) or Path(path)) / "transformer")
    except ValueError as error:
        raise FlagError(BASE, path, str(error)) from error
    here = Path(path).is_dir() or (files and all(file.exists() for file in files))
    return model_fingerprint(path, ("transformer",)) if here else None


def read_record(checkpoint: Path, field: str = "resume_from_checkpoint") -> dict[str, Any]:
    """The record of a checkpoint. Records of older versions have no hash.

    Raises:
        FlagError: about the setting `field`: the record is missing, cut off, edited or of another format.
    """
    try:
        record = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise FlagError(field, checkpoint, f"{RECORD} has format {record['format']}, this version reads {FORMAT}")
        known = record.pop("record_sha256", None)
    except OSError as error:
        raise FlagError(field, checkpoint, f"{RECORD} can't be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FlagError(field, checkpoint, f"{RECORD} can't be read: {error!r}") from error
    if known is not None and known != digest(record, 64):
        raise FlagError(field, checkpoint, f"{RECORD} has changed since it was written")
    return record


def write_base(folder: Path, base: str) -> None:
    """Records the base model of a model in `folder` that was made from a checkpoint, for `base_of`."""
    record = {"settings": {BASE: base}, "base_model_hash": base_model_hash(base), "format": FORMAT}
    write_json(folder / RECORD, record | {"record_sha256": digest(record, 64)})


def is_made_from_checkpoint(folder: Path) -> bool:
    """Whether the record in `folder` is that of `write_base`."""
    with suppress(FlagError):
        return read_record(folder).keys() == {"settings", "base_model_hash", "format"}
    return False


def base_of(checkpoint: Path, field: str) -> str:
    """The base model that a record names. Raises FlagError about the setting `field` if it names none."""
    try:
        return read_record(checkpoint, field)["settings"][BASE]
    except (KeyError, TypeError) as error:
        raise FlagError(field, checkpoint, f"{RECORD} doesn't name its base model: {error!r}") from error


def check_base_model(checkpoint: Path, base: str, field: str = "resume_from_checkpoint") -> None:
    """Raises FlagError about the setting `field` if the checkpoint is known to have another base model than `base`."""
    known, now = read_record(checkpoint, field).get("base_model_hash"), base_model_hash(base)
    if None not in (now, known) and now != known:
        problem = f"was trained from another base model ({base_of(checkpoint, field)}) than --{BASE} {base}"
        raise FlagError(field, checkpoint, problem)


def checkpoint_of(path: Path) -> Path | None:
    """The folder with the record of what `path` names: a checkpoint or merged model, its ema/, or a file in one."""
    return next((folder for folder in (path, *path.parents[:2]) if (folder / RECORD).is_file()), None)


def run_settings(config: GRPOConfig, processes: int) -> dict[str, object]:
    """The settings that a checkpoint records. A resumed run compares its own settings with them."""
    return config.to_public_dict() | {
        "engine": choose_engine(config, processes),
        "processes": processes,
        "prompts_per_iteration": config.local_prompts(processes) * config.data_ranks(processes),
    }


def _write_weights(folder: Path, weights: dict[str, torch.Tensor], engine: Engine) -> None:
    folder.mkdir(exist_ok=True)
    if engine.config.use_lora:
        save_lora(folder, weights, engine.transformer, engine.family)
    else:
        config = json.loads(engine.transformer.to_json_string())
        # FSDP2 puts its own name before that of the class.
        write_json(folder / "config.json", config | {"_class_name": engine.family.transformer.__name__})
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def _sync(path: Path) -> None:
    """Waits until the disk has a file's content, or a folder's list of names."""
    number = os.open(path, os.O_RDONLY)
    try:
        sync(number)
    finally:
        os.close(number)


class CheckpointWriter:
    """Writes checkpoints while training continues. All processes have a writer and call its methods together.

    `save` copies the state to the CPU. Threads write the copy to a temporary folder. When all processes have written
    their share, the first process renames the folder. So a killed run leaves complete checkpoints only.
    """

    def __init__(self, engine: Engine, policies: Policies) -> None:
        self.engine, self.policies = engine, policies
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.final: Path | None = None  # final folder of the checkpoint that is being written
        self.pending: Future | None = None  # this process's share of that checkpoint, if any

    def save(self, place: dict[str, Any]) -> None:
        """Starts to write a checkpoint, after the previous checkpoint is complete.

        place: the run's progress as JSON values; `iteration` and `epoch` name the folder.

        Raises:
            CheckpointNotWritten: the previous checkpoint, or DeepSpeed's part of this one, can't be written.
        """
        self.finish()
        engine, main = self.engine, self.engine.accelerator.is_main_process
        final = Path(engine.config.output_dir) / f"checkpoint-{place['iteration']}-{place['epoch']}"
        if engine.any_process(main and final.exists()):  # the run resumed from it, and no iteration followed
            return
        part = _part_of(final)
        try:
            self.pending = engine.save_optimizer(part / "optimizer")
        except OSError as error:
            raise _not_written(final, error, main) from error
        self.final = final
        weights, updates = {}, self.policies.to_save()
        for name in (CURRENT, *updates):
            with self.policies.acting(name):
                weights["." if name == CURRENT else name] = engine.trained_weights()
        if main:
            place = {**place, "ema_optimization_step": 0, **{f"{k}_optimization_step": v for k, v in updates.items()}}
            self.pending = self.thread.submit(self._write, final, place, weights, self.pending)

    def _write(
        self, final: Path, place: dict[str, Any], weights: dict[str, dict[str, torch.Tensor]], optimizer: Future | None
    ) -> None:
        """Runs in the first process's thread: writes all except the optimizer's state, then renames the folder.

        What failed leaves nothing behind, also if the run ends without asking for the result.
        """
        config, part = self.engine.config, _part_of(final)
        try:
            if optimizer is not None:
                optimizer.result()  # waits for all processes
            part.mkdir(exist_ok=True)
            for name, tensors in weights.items():
                _write_weights(part / name, tensors, self.engine)
            files = sorted(path for path in part.rglob("*") if path.is_file())
            record = {
                **place,
                "settings": run_settings(config, self.engine.accelerator.num_processes),
                "base_model_hash": base_model_hash(config.pretrained_model_name_or_path),
                "versions": versions(),
                "format": FORMAT,
                "files": {path.relative_to(part).as_posix(): sample_file(path) for path in files},
            }
            write_json(part / RECORD, record | {"record_sha256": digest(record, 64)})
            usual_modes(part)
            for path in (*part.rglob("*"), part):
                _sync(path)
            os.replace(part, final)
            _sync(final.parent)
            point_to(final.parent, place["best"])
            _rotate(final.parent, config.checkpoints_total_limit, place["best"])
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise

    @property
    def failed(self) -> bool:
        """Whether this process already knows that the current checkpoint can't be written. `finish` says why."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def finish(self) -> None:
        """Waits until the current checkpoint, if any, is complete.

        Raises:
            CheckpointNotWritten: on all processes, when any process can't write. Removes the temporary folder.
        """
        if self.final is None:
            return
        error = None
        if self.pending is not None:
            try:
                result_of(self.pending, f"the disk to write {self.final}", PATIENCE.total_seconds())
            except (Exception, CheckpointException) as problem:  # torch's is a BaseException
                error = problem
        if error is not None and not isinstance(error, (OSError, SafetensorError, CheckpointException)):
            raise error
        if self.engine.any_process(error is not None):
            error = error or OSError("another process failed")
            raise _not_written(self.final, error, self.engine.accelerator.is_main_process) from error
        self.final = self.pending = None


def _part_of(final: Path) -> Path:
    """The temporary folder of an incomplete checkpoint. Its name doesn't match a checkpoint's."""
    return final.with_name(f".{final.name}.part")


def _cause(error: BaseException) -> BaseException:
    """The disk's error behind `error`, else `error` itself. torch.save raises its own error after the disk's."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    chain = [error]
    while chain[-1].__context__ is not None:
        chain.append(chain[-1].__context__)
    return next((one for one in chain if isinstance(one, OSError)), error)


def _not_written(final: Path, error: BaseException, main_process: bool) -> CheckpointNotWritten:
    free = shutil.disk_usage(next(folder for folder in final.parents if folder.exists())).free
    if main_process:  # which has the folder; the others may outlive it, when another run has the folder already
        shutil.rmtree(_part_of(final), ignore_errors=True)
    cause = _cause(error)  # the disk's error is unknown here if another process failed
    reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
    return CheckpointNotWritten(f"{final} can't be written, with {free / 2**30:.1f} GiB free there: {reason}")


def is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"checkpoint-\d+-\d+", path.name) is not None


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder, by iteration."""
    found = filter(is_checkpoint, output_dir.glob("checkpoint-*"))
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def checkpoint_at(output_dir: Path, iteration: int) -> Path | None:
    """The checkpoint of an iteration in a folder, if it is there."""
    return next((path for path in checkpoints(output_dir) if int(path.name.split("-")[1]) == iteration), None)


def linked(path: Path, field: str) -> Path:
    """`path`; but for a run's missing `latest` or `best`, or the ema/ in it, what the link would point to.

    Disks without links, and folders copied without them, lack the links. Raises FlagError about the setting `field` if
    the record of the newest checkpoint is damaged.
    """
    if path.name == "ema" and path.parent.name in LINKS:
        return linked(path.parent, field) / path.name
    found = checkpoints(path.parent)
    if path.name not in LINKS or path.exists() or not found:
        return path
    best = read_record(found[-1], field).get("best")
    return found[-1] if path.name == "latest" else (best and checkpoint_at(path.parent, best["iteration"])) or path


def check_tuned_place(path: Path, field: str) -> None:
    """Raises FlagError about the setting `field` for a path without a tuned model, such as a run's own folder.

    Reads no file. What may be a hub id passes.
    """
    problem = None
    if path.is_dir():
        if not any(any(path.glob(name)) for name in ("*.safetensors", "config.json", "transformer", RECORD)):
            problem = "no checkpoint in it"
    elif path.is_file():
        if path.suffix != ".safetensors":
            problem = GGUF if path.suffix == ".gguf" else "is no .safetensors file, and other files may hold code"
    elif not may_be_hub_id(str(path)):
        problem = "no such file or folder"
    if problem:
        run = path if path.is_dir() else path.parent
        raise FlagError(field, path, problem + (f"; did you mean {run / LINKS[0]}?" if checkpoints(run) else ""))


def point_to(output_dir: Path, best: dict[str, Any] | None) -> None:
    """Links `latest` to the newest checkpoint and `best` to the checkpoint of the best evaluation, atomically.

    Removes a link whose checkpoint doesn't exist. Warns where the file system has no links; `linked` does without.
    """
    targets = {"latest": next(iter(checkpoints(output_dir)[-1:]), None)}
    targets["best"] = checkpoint_at(output_dir, best["iteration"]) if best else None
    for name, target in targets.items():
        link, part = output_dir / name, output_dir / f".{name}.part"
        try:
            part.unlink(missing_ok=True)  # left by a killed run
            if target is None:
                link.unlink(missing_ok=True)
            else:
                part.symlink_to(target.name)
                os.replace(part, link)
        except OSError as error:
            with suppress(OSError):
                link.unlink()  # it would mean an older checkpoint
            warn(f"{output_dir} gets no link `{name}`: {error.strerror or error}")


def _rotate(output_dir: Path, limit: int | None, best: dict[str, Any] | None) -> None:
    """Deletes all but the last `limit` checkpoints and the best one. What remains is deleted at the next start."""
    keep = best and checkpoint_at(output_dir, best["iteration"])
    for path in [p for p in checkpoints(output_dir)[: -limit if limit else 0] if p != keep]:
        os.replace(path, _part_of(path))  # so that a half deleted folder isn't taken for a checkpoint
        shutil.rmtree(_part_of(path), ignore_errors=True)
