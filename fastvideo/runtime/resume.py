"""Resumes a run: finds a checkpoint, checks that it is complete and fits the run, and loads its state."""

import json
import os
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvideo.cli import FlagError, written
from fastvideo.config import PLACES, REFERENCE, GRPOConfig
from fastvideo.io.files import check_writable, not_written, write_bytes
from fastvideo.io.fingerprint import sample_file
from fastvideo.io.lock import FolderLock
from fastvideo.io.messages import say, warn
from fastvideo.models.int8 import quantize_linear
from fastvideo.models.lora import LORA_FILE, read_trained_lora
from fastvideo.models.pretrained import add_lora, load_transformer, read_lora_init
from fastvideo.models.reward_model.utils import served_judge
from fastvideo.models.speed import enable_gradient_checkpointing
from fastvideo.runtime.checkpoint import (
    LINKS,
    RECORD,
    check_base_model,
    checkpoint_at,
    checkpoints,
    is_checkpoint,
    is_made_from_checkpoint,
    linked,
    point_to,
    read_record,
    run_settings,
    versions,
)
from fastvideo.runtime.engines import Engine, choose_engine
from fastvideo.runtime.optimizer_files import unreadable
from fastvideo.runtime.policies import Policies

import torch
from diffusers import ModelMixin

# Keys that resuming needs in RECORD, and in its settings.
NEEDED = ("iteration", "epoch", "optimizer_steps", "ema_optimization_step", "wandb_id", "settings", "base_model_hash")
NEEDED += ("files",)
NEEDED_SETTINGS = ("use_lora", "lora_rank", "lora_alpha", "lora_target_modules", "pretrained_model_name_or_path")
NEEDED_SETTINGS += ("engine", "processes", "zero_stage")
# What a run writes into its folder besides checkpoints.
FOLDERS = ("images", "evaluation", "tensorboard", "rl_embeddings", "eval_embeddings", "superseded")
FILES = ("args.json", "config.yaml", "metrics.jsonl", "wandb.json")


@dataclass
class Progress:
    """The progress of a run. A checkpoint stores all fields except the last two.

    Attributes:
        iteration: iterations done. optimizer_steps: optimizer steps taken, without skipped ones.
        prompts: prompts that the run used before this process started. None: unknown (new run, or an old checkpoint).
        wandb_id: id of the run in its trackers. best: iteration, value and `measure` of the best evaluation so far.
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

    def best_is_in(self, output_dir: Path) -> bool:
        """Whether the checkpoint of the best evaluation is in the folder."""
        return self.best is not None and checkpoint_at(output_dir, self.best["iteration"]) is not None

    def record(self, epoch: int, prompts: int, judge: str | None) -> dict[str, Any]:
        """The entries of checkpoint.json. prompts: number of prompts of the training stream used so far. judge: the id
        of the model that judged the pictures, if one did."""
        found = {"iteration": self.iteration, "epoch": epoch, "optimizer_steps": self.optimizer_steps, "judge": judge}
        return found | {"prompts": prompts, "wandb_id": self.wandb_id, "best": self.best}


def find_checkpoint(value: str, output_dir: Path) -> Path | None:
    """The checkpoint folder that `--resume_from_checkpoint` means. None: the run starts from the beginning.

    `latest` is the newest checkpoint in output_dir, or the beginning of a run that has none yet. `auto` also begins a
    new run. Other values are paths.

    Raises:
        FlagError: there is no checkpoint, or it is damaged, or another program wrote it.
    """
    if value in ("auto", "latest"):
        found = checkpoints(output_dir)
        if not found and value == "latest" and not is_used(output_dir):
            problem = f"no checkpoint in --output_dir {output_dir}, and no run; `auto` also starts a new run"
            raise FlagError("resume_from_checkpoint", value, problem)
        if not found:
            return None
        path = found[-1]
    else:
        path = linked(Path(value), "resume_from_checkpoint")
        advice = "give a folder checkpoint-ITERATION-EPOCH of an --output_dir, `latest` or `auto`"
        if not path.exists():
            raise FlagError("resume_from_checkpoint", path, f"not found; {advice}")
        recorded = (path / RECORD).is_file() and not is_made_from_checkpoint(path)
        if not recorded and not (is_checkpoint(path) and path.is_dir()):
            raise FlagError("resume_from_checkpoint", path, f"no checkpoint of a training run; {advice}")
    problem = _damage(path)
    if problem:
        others = (other for other in reversed(checkpoints(path.parent)) if other != path and _damage(other) is None)
        sound = next(others, None)
        advice = f"the newest sound one is {sound}" if sound else f"no other one in {path.parent} is sound"
        raise FlagError("resume_from_checkpoint", path, f"damaged: {problem}; {advice}")
    return path


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if nothing is."""
    try:
        record = read_record(path)
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
        if problem := unreadable(path / "optimizer"):
            return f"optimizer/.metadata can't be read: {problem}"
    except FlagError as error:
        return error.problem
    except OSError as error:
        return f"a file can't be read: {error}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{RECORD} can't be read: {error!r}"
    return None


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The trained parameters in a checkpoint or a folder of it, named as in the transformer."""
    adapters = folder / LORA_FILE
    return read_trained_lora(adapters) if adapters.is_file() else load_transformer(str(folder)).state_dict()


def load_trained(config: GRPOConfig, engine: Engine, checkpoint: Path | None) -> ModelMixin:
    """The model to train, full or with adapters, with the weights of the base model or of a checkpoint."""
    base = config.pretrained_model_name_or_path
    source = base if config.use_lora or checkpoint is None else str(checkpoint)
    master = torch.bfloat16 if config.master_weight_type == "bf16" else torch.float32
    dtype = engine.frozen_dtype if config.use_lora else master
    transformer = engine.load(source, dtype)
    if checkpoint is not None:
        check_base_model(checkpoint, config.pretrained_model_name_or_path)  # it may have been downloaded just now
    if config.quantize_base:
        quantize_linear(engine.family.blocks(transformer), engine.accelerator.device)
    if config.use_lora:
        shape = (config.lora_rank, config.lora_alpha, config.lora_target_modules)
        start = read_lora_init(transformer, config.lora_init, *shape) if config.lora_init else {}
        add_lora(transformer, *shape, config.seed)
        transformer.load_state_dict(start if checkpoint is None else read_weights(checkpoint), strict=False)
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(transformer, engine.family.blocks(transformer), config.selective_checkpointing)
    return transformer.train()


def load_policies(checkpoint: Path, policies: Policies) -> None:
    """Loads the copies in a checkpoint. A copy that isn't there starts as the checkpoint's own weights, but the
    reference as the base model.
    """
    config, engine = policies.config, policies.engine
    main = engine.accelerator.is_main_process
    for name, copy in policies.copies.items():
        stored = engine.any_process(main and (checkpoint / name).is_dir())
        if stored:
            weights = read_weights(checkpoint / name) if main else {}
            copy.optimization_step = read_record(checkpoint)[f"{name}_optimization_step"]
        elif name == REFERENCE:
            base = load_trained(config, engine, None).named_parameters()
            weights = {key: p.detach() for key, p in base if p.requires_grad} if main else {}
        else:
            continue
        policies.reference_moved |= stored and name == REFERENCE
        with policies.acting(name):
            engine.set_trained_weights(weights)


def changed_settings(record: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """One `name: old -> new` per setting that a resumed run changes."""
    then = record["settings"]
    names = sorted((then.keys() | settings.keys()) - set(PLACES))
    return [f"{n}: {then.get(n)} -> {settings.get(n)}" for n in names if then.get(n) != settings.get(n)]


def is_used(output_dir: Path) -> bool:
    """Whether a run has done something in the folder."""
    return (output_dir / "metrics.jsonl").exists() or bool(checkpoints(output_dir))


def _free(output_dir: Path, name: str) -> Path:
    """A path in superseded/ that isn't taken yet: `name` with the next number."""
    attempt = 0
    while (target := output_dir / "superseded" / f"{name}.{attempt}").exists():
        attempt += 1
    return target


def _set_aside(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, target)


def set_aside_later(checkpoint: Path, output_dir: Path) -> None:
    """Moves later checkpoints into superseded/, the last one first, so that `latest` means the resumed run."""
    for path in reversed(checkpoints(output_dir)):
        if int(path.name.split("-")[1]) <= read_record(checkpoint)["iteration"]:
            break
        target = _free(output_dir, path.name)
        _set_aside(path, target)
        warn(f"a checkpoint after {checkpoint.name} was moved to {target}")


def set_aside_run(output_dir: Path) -> None:
    """Moves what a run without a checkpoint has written into superseded/run.N/. Its embeddings are used again."""
    target = _free(output_dir, "run")
    for name in (
        "args.json",
        "config.yaml",
        "wandb.json",
        "tensorboard",
        "images",
        "evaluation",
        "metrics.jsonl",
    ):  # is_used until the last is moved
        if (output_dir / name).exists():
            _set_aside(output_dir / name, target / name)
    print(f"{output_dir} has no checkpoint yet: the run starts from the beginning; what was there is in {target}")


def copies_to_checkpoints(output_dir: Path) -> None:
    """`latest` and `best` may be folders, in a run's folder that was copied without links: gives them back their names.

    A copy of a checkpoint that is there as well, or of something else, goes to superseded/.
    """
    for path in (output_dir / name for name in LINKS):
        if path.is_symlink() or not path.exists():
            continue
        target = _free(output_dir, path.name)
        with suppress(FlagError, KeyError):  # something else
            record = read_record(path)
            own = output_dir / f"checkpoint-{record['iteration']}-{record['epoch']}"
            target = target if own.exists() else own
        _set_aside(path, target)
        warn(f"{path} was no link; it was moved to {target}")


def remove_leftovers(output_dir: Path) -> None:
    """Deletes incomplete checkpoints and files of a killed run."""
    for path in output_dir.glob(".checkpoint-*.part"):
        shutil.rmtree(path)
    for path in output_dir.glob(".*.tmp"):
        path.unlink()


def check_output(output_dir: str) -> None:
    """Checks that a run can write into its folder, and into what is there already: perhaps of another user.

    Raises:
        FlagError: it can't.
    """
    check_writable("output_dir", output_dir)
    for path in (Path(output_dir, name) for name in FOLDERS):
        if os.path.lexists(path):
            check_writable("output_dir", path)
    for path in (Path(output_dir, name) for name in FILES):
        if path.is_dir() or (path.name == "metrics.jsonl" and path.exists() and not os.access(path, os.W_OK)):
            raise FlagError("output_dir", output_dir, f"{path.name} in it is no file that can be written")


def open_output(config: GRPOConfig, processes: int, lock: FolderLock | None = None) -> Path | None:
    """Prepares the output folder and returns the checkpoint to resume from. Never mixes two runs in one folder.

    Raises:
        FlagError: the folder can't be written to, or another run has it or is in it, or nothing can be resumed.
    """
    output = Path(config.output_dir)
    check_output(config.output_dir)
    try:
        if lock is not None:
            lock.take()
        output.mkdir(parents=True, exist_ok=True)
        return _open(config, processes, output)
    except OSError as error:
        raise not_written("output_dir", output, error) from error


def _open(config: GRPOConfig, processes: int, output: Path) -> Path | None:
    copies_to_checkpoints(output)
    checkpoint = to_resume(config, processes)
    remove_leftovers(output)  # before anything is written, because they may fill the disk
    if checkpoint is None and is_used(output):
        set_aside_run(output)
    elif checkpoint is not None:
        set_aside_later(checkpoint, output)
        truncate_metrics(output, read_record(checkpoint)["iteration"])
        point_to(output, read_record(checkpoint).get("best"))
    return checkpoint


def to_resume(config: GRPOConfig, processes: int) -> Path | None:
    """The checkpoint that --resume_from_checkpoint means, if any. Changes nothing.

    Raises FlagError if there is none, if it can't be continued with these settings in this folder, or if the folder
    holds a run that isn't to be resumed.
    """
    output, checkpoint = Path(config.output_dir), None
    if not config.resume_from_checkpoint and is_used(output):
        problem = "holds a run already; choose another folder or --resume_from_checkpoint latest"
        raise FlagError("output_dir", output, problem)
    if config.resume_from_checkpoint:
        checkpoint = find_checkpoint(config.resume_from_checkpoint, output)
    if checkpoint is not None:
        if is_used(output) and checkpoint.resolve().parent != output.resolve():
            raise FlagError("output_dir", output, f"holds another run than --resume_from_checkpoint {checkpoint}")
        check_resumable(checkpoint, config, processes)
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
            problem = f"--resume_from_checkpoint {checkpoint} was trained with --{written(name, then[name])}"
            raise FlagError(name, now[name], problem)
    check_base_model(checkpoint, config.pretrained_model_name_or_path)
    _check_judge(checkpoint, record.get("judge"), config)
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


def _check_judge(checkpoint: Path, before: str | None, config: GRPOConfig) -> None:
    """Raises FlagError for another judge than the checkpoint's. If --vlm_judge_model names it, only says so."""
    judge = served_judge(config)
    if None in (judge, before) or judge == before:
        return
    if config.vlm_judge_model is not None:
        say(f"note: resuming {checkpoint} with the judge {judge}; before, it was {before}")
    else:
        where = "--reward_server" if config.reward_server else "--vlm_judge_url"
        problem = (
            f"not given; {checkpoint} was trained with the judge {before}, {where} serves {judge}; name it to go on"
        )
        raise FlagError("vlm_judge_model", None, problem)


def truncate_metrics(output_dir: Path, last_step: int) -> None:
    """Moves the lines of metrics.jsonl after iteration `last_step` to superseded/. A resumed run writes them again."""
    path = output_dir / "metrics.jsonl"
    data = path.read_bytes() if path.exists() else b""
    lines, kept = data.splitlines(), 0
    for line in lines:
        try:
            if json.loads(line)["step"] > last_step:
                break
        except (ValueError, KeyError, TypeError):
            break  # a killed run left half a line
        kept += 1
    if kept < len(lines):
        target = _free(output_dir, path.name)
        target.parent.mkdir(exist_ok=True)
        write_bytes(target, _joined(lines[kept:]))
    if data != _joined(lines[:kept]):
        write_bytes(path, _joined(lines[:kept]))


def _joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)
