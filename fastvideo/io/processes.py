"""Processes started by torchrun (or one plain process), and the signals that stop them."""

import datetime
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastvideo.io.devices import resolve_device
from fastvideo.io.messages import is_first
from fastvideo.io.secrets import redact
from fastvideo.io.waiting import EXIT_GRACE, end_within, waiting

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

# Signals within so many seconds are one request: Slurm signals every process of a step, and torchrun signals again.
ONE_REQUEST = 5


@dataclass(frozen=True)
class Processes:
    """This process among its peers."""

    rank: int
    world_size: int
    device: str  # where this process computes


def barrier(what: str = "the other processes") -> None:
    """Waits for the other processes, if there are any. what: what they do, for a report of a long wait."""
    if dist.is_initialized():
        with waiting(what):
            dist.barrier()


def write_whole_lines() -> None:
    """Keeps lines whole where processes share a pipe. Unbuffered Python writes a line and its line feed separately."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=False)


def entry_point(main: Callable[[], None]) -> None:
    """Runs a program that torchrun starts: leaves it the traceback, which fastvideo/torchrun.py prints last.

    The process always ends, and no traceback shows a secret.
    """

    def without_secrets() -> None:
        try:
            main()
        except Exception as error:
            text = traceback.format_exc()
            if redact(text) == text:
                raise
            raise RuntimeError(f"{type(error).__name__}; without its secrets:\n{redact(text)}") from None

    write_whole_lines()
    status = 1
    try:
        record(without_secrets)()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    finally:
        end_within(EXIT_GRACE, status)
        if status == 0 and dist.is_initialized():
            dist.destroy_process_group()  # its threads could abort the interpreter's exit


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Rank and world size from torchrun's variables. With several processes, also makes a gloo group for `barrier`.

    device: as in `resolve_device`.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    started = world_size > 1 and not dist.is_initialized()
    if started:
        write_whole_lines()
        # After a restart one rank may have hours of work more than another. When a process dies, torchrun ends the
        # others.
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))
    try:
        yield Processes(rank, world_size, resolve_device(device))
    finally:
        if started:
            dist.destroy_process_group()


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yields a list. The first SIGTERM or SIGINT adds its number; ONE_REQUEST seconds later signals act as usual."""
    asked: list[int] = []
    first: float | None = None
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: object) -> None:
        nonlocal first
        now = time.monotonic()
        if first is None:  # set at once: another signal may interrupt this handler at any place
            first = now
            asked.append(number)
            if is_first():
                print(
                    f"\n{signal.Signals(number).name}: this iteration ends, then a checkpoint is saved; another one, "
                    f"at least {ONE_REQUEST} seconds from now, stops at once",
                    file=sys.stderr,
                )
        elif now > first + ONE_REQUEST:
            restore()
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        restore()
