"""Processes started by torchrun (or one plain process), and the signals that stop them."""

import datetime
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastvideo.io.devices import resolve_device

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


def barrier() -> None:
    """Waits for the other processes, if there are any."""
    if dist.is_initialized():
        dist.barrier()


def write_whole_lines() -> None:
    """Keeps lines whole where processes share a pipe. Unbuffered Python writes a line and its line feed separately."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=False)


def entry_point(main: Callable[[], None]) -> None:
    """Runs a program that torchrun starts. torchrun's last lines are the traceback of the process that failed first."""
    write_whole_lines()
    record(main)()
    if dist.is_initialized():
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
        # A slow rank may reach the barrier hours later, so wait and don't time out. When a process dies, torchrun ends
        # the others.
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    try:
        yield Processes(rank, world_size, resolve_device(device))
    finally:
        if started:
            dist.destroy_process_group()


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yields a list. The first SIGTERM or SIGINT adds its number; ONE_REQUEST seconds later signals act as usual."""
    asked: list[int] = []
    first = 0.0
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame: object) -> None:
        nonlocal first
        if not asked:
            asked.append(number)
            first = time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                print(
                    f"\n{signal.Signals(number).name}: this iteration ends, then a checkpoint is saved; another one, "
                    f"at least {ONE_REQUEST} seconds from now, stops at once",
                    file=sys.stderr,
                )
        elif time.monotonic() > first + ONE_REQUEST:
            restore()
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        restore()
