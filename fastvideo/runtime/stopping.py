"""Why a run ends early, and what it saves before."""

import errno
import math
import os
import shlex
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastvideo.config import GRPOConfig
from fastvideo.io.messages import end, is_first
from fastvideo.io.secrets import one_line, redact
from fastvideo.io.words import counted
from fastvideo.runtime.checkpoint import CheckpointNotWritten, checkpoints
from fastvideo.runtime.resume import Progress
from fastvideo.runtime.scoring import RewardFailed

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class TrainingStopped(RuntimeError):
    """Raised when too many optimizer steps in a row had non-finite numbers, or too many scores failed."""


class Interrupted(TrainingStopped):
    """Raised after SIGTERM or SIGINT, when the current iteration is finished and saved."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class IterationFailed(TrainingStopped):
    """Raised when an error ended an iteration, from this error. What was trained before is saved if it can be."""


def why_stopped(
    config: GRPOConfig, progress: Progress, metrics: dict[str, Any], asked: list[int], interrupted: bool
) -> TrainingStopped | None:
    """The reason to end a run after an iteration, if there is one: too many failed scores or skipped steps, or a
    signal before the last iteration.

    metrics: of the iteration. asked: signals that came to this process. interrupted: whether any process got one.
    """
    if progress.too_many_failures:
        failed = ", ".join(f"{v} {k}" for k, v in metrics.items() if "failed_" in k and v)
        return TrainingStopped(
            f"more scores failed in iteration {metrics['step']} than --max_reward_failures "
            f"{config.max_reward_failures} ({failed}){_servers(config)}; this iteration trained nothing, earlier "
            "iterations are saved; --resume_from_checkpoint latest repeats this iteration"
        )
    if progress.skipped_in_a_row >= config.max_skipped_steps and not math.isfinite(metrics["reward"]):
        return TrainingStopped(
            f"no score came for any picture, the last time in iteration {progress.iteration}{_servers(config)}; "
            f"{counted(progress.skipped_in_a_row, 'optimizer step')} in a row could not be taken; the weights before "
            f"them are saved in {config.output_dir}; when scores come again, --resume_from_checkpoint latest continues"
        )
    if progress.skipped_in_a_row >= config.max_skipped_steps:
        return TrainingStopped(
            f"{progress.skipped_in_a_row} optimizer steps in a row had a non-finite loss, reward or gradient, "
            f"the last in iteration {progress.iteration}; none of them changed the weights, which are saved in "
            f"{config.output_dir}"
        )
    if interrupted and progress.iteration < config.max_train_steps:
        return Interrupted(
            asked[0] if asked else signal.SIGTERM,
            f"by a signal, after iteration {progress.iteration}, which is saved; continue with "
            "--resume_from_checkpoint latest",
        )
    return None


def _servers(config: GRPOConfig) -> str:
    """Names the servers that scores come from; empty without any."""
    urls = filter(None, (config.reward_server, config.unified_reward_url, config.vlm_judge_url))
    return "".join(f": look at {url}, where scores come from" for url in [", ".join(urls)] if url)


@contextmanager
def saving_on_error(progress: Progress, save: Callable[[], None], alone: bool) -> Iterator[None]:
    """Saves the iterations that were done before an error.

    Processes save together. So with several (`alone` is False), only an error that all know about leads to a
    checkpoint: that of a reward on any process. After another error the process ends, and torchrun ends the others.

    save: writes a checkpoint of `progress` and waits for it.

    Raises:
        IterationFailed: from the error.
    """
    try:
        yield
    except (TrainingStopped, CheckpointNotWritten):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:  # nothing can be saved
            raise
        done, problem = progress.iteration, str(error) if isinstance(error, RewardFailed) else one_line(error)
        if not done:
            kept = "no iteration was done"
        elif alone or isinstance(error, RewardFailed):
            traceback.clear_frames(error.__traceback__)  # their tensors take the memory that saving needs
            try:
                save()
                kept = f"iterations up to {done} are saved; --resume_from_checkpoint latest continues after them"
            except Exception as second:  # such as no memory left on the GPU
                kept = f"iterations up to {done} can't be saved ({one_line(second)})"
        else:
            kept = "this process failed alone; --resume_from_checkpoint latest continues from the last checkpoint"
        raise IterationFailed(f"{problem}; {kept}") from error


def _this_python() -> str:
    """How to call this interpreter in the shell."""
    if shutil.which("python") == sys.executable:
        return "python"
    inside = Path(sys.executable).is_relative_to(Path.cwd())
    return shlex.quote(os.path.relpath(sys.executable) if inside else sys.executable)


@contextmanager
def last_line(program: str, output_dir: str) -> Iterator[None]:
    """The edge of a run: its last lines say where its results are, or in one line on stderr why it stopped; then the
    status is 1, or 128 + n after signal n.

    An error comes with its traceback. With several processes torchrun writes the last lines; so it gets the error.
    """
    try:
        yield
        if is_first() and (found := checkpoints(Path(output_dir))):
            print(
                f"the trained model: {found[-1]}; metrics: {Path(output_dir) / 'metrics.jsonl'}\n"
                f"report: {_this_python()} -m fastvideo.eval.report --run_dir {shlex.quote(output_dir)}",
                flush=True,
            )
    except (TrainingStopped, CheckpointNotWritten) as error:
        if isinstance(error, IterationFailed):
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise
            sys.stderr.write(redact("".join(traceback.format_exception(error.__cause__))))
        status = 128 + error.number if isinstance(error, Interrupted) else 1
        end(f"{program}: stopped: {error}\n", status, all_know=isinstance(error, TrainingStopped))
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        full = f"--output_dir {output_dir} is full; its checkpoints are complete"
        end(f"{program}: stopped: {error}: {full}, --resume_from_checkpoint latest continues from the last one\n", 1)
