"""Sends a run to the trackers of --log_with. Whatever happens to one, training neither waits nor ends because of it.

A tracker is one of Accelerate's classes, in a thread of its own. An error costs one line, and the run goes on without
the tracker; wandb goes on offline first. metrics.jsonl and the pictures in the run's folder are complete in any case.
wandb.json says where wandb's files are and how to upload them later.
"""

import importlib.util
import os
import queue
import shlex
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastvideo.cli import FlagError
from fastvideo.config import GRPOConfig
from fastvideo.io.files import write_json
from fastvideo.io.pictures import open_picture
from fastvideo.io.secrets import one_line, redact
from fastvideo.io.waiting import waiting

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

CONNECT, FINISH = 120.0, 60.0  # seconds to connect (wandb's own limit is 90), and to upload the rest after the run

Picture = tuple[str, str]  # path and caption


def kill_service() -> None:
    """Kills wandb's own process, which may try for half an hour to reach its server, and forgets its runs."""
    from wandb.sdk import wandb_setup

    connection = wandb_setup.singleton()._connection
    if connection is not None and connection._proc is not None:
        connection._proc._process.kill()
    # With an exit status: wandb raises SystemExit for the one of the killed process.
    with suppress(Exception, SystemExit):
        wandb_setup.teardown()


class Tracker(ABC):
    """One run in one tracker. A subclass says how Accelerate's class starts, and what differs from the others."""

    name: str  # in --log_with, and of the package
    install = "pip install -r requirements.txt"
    modes: tuple[str, ...] = ("online",)  # ways to start; after an error, the next one

    def __init__(self, config: GRPOConfig, run_id: str, done: int) -> None:
        """run_id: a resumed run keeps it. done: iterations before this process."""
        self.config, self.id, self.done, self.folder = config, run_id, done, Path(config.output_dir)
        self.tracker: GeneralTracker | None = None
        self.begun = threading.Event()
        self._modes = list(self.modes)
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._work, name=self.name, daemon=True)
        self.thread.start()

    @abstractmethod
    def begin(self, mode: str) -> None:
        """Calls `start`."""

    def numbers(self, values: dict[str, Any]) -> dict[str, Any]:
        """What of a line of metrics.jsonl the tracker takes."""
        return {name: value for name, value in values.items() if isinstance(value, int | float) and name != "step"}

    def images(self, name: str, pictures: list[Picture]) -> dict[str, Any]:
        """Pictures with their captions, which Accelerate's log_images doesn't take."""
        image = importlib.import_module(self.name).Image
        return {name: [image(path, caption=caption) for path, caption in pictures]}

    def abandon(self) -> str:
        """Ends, without waiting, what the package has started. Returns advice."""
        return ""

    def start(self, **options: Any) -> None:
        """options: of Accelerate's class, which hands them on to the package."""
        tracker = LOGGER_TYPE_TO_CLASS[self.name](**options)
        tracker.main_process_only = False  # this is the main process; Accelerate would ask its state, in this thread
        tracker.start()
        self.tracker = tracker

    def log(self, values: dict[str, Any], step: int) -> None:
        self._calls.put(lambda: self.tracker.log(self.numbers(values), step=step))

    def log_pictures(self, name: str, pictures: Callable[[], list[Picture]], step: int) -> None:
        """`pictures` is called in the tracker's thread."""
        self._calls.put(lambda: self.tracker.log(self.images(name, pictures()), step=step))

    def end(self) -> None:
        """Asks the thread to finish."""
        self._calls.put(None)

    def give_up(self) -> None:
        """Leaves a thread that isn't finished alone."""
        if self.thread.is_alive():
            self._modes.clear()  # it ends at its next error
            sys.stderr.write(
                f"{self.name}: not finished after {FINISH:g} seconds; this program ends without it{self.abandon()}\n"
            )

    def _work(self) -> None:
        self._attempt(lambda: None)
        self.begun.set()
        for call in iter(self._calls.get, None):
            self._attempt(call)
        self._attempt(lambda: self.tracker.finish())

    def _attempt(self, call: Callable[[], object]) -> None:
        """Calls. After an error starts in the next mode and calls again; after the last mode's, gives up."""
        hook = sys.excepthook
        while self._modes:
            try:
                if self.tracker is None:
                    self.begin(self._modes[0])
                return call()
            except (Exception, SystemExit) as error:
                self._modes[:1], self.tracker = [], None
                then = self._modes[0] if self._modes else f"without {self.name}"
                sys.stderr.write(f"{self.name}: {one_line(error)[:300]}; this run goes on {then}\n")
                self.abandon()
            finally:
                sys.excepthook = hook  # swanlab sets one of its own, which shows secrets


class Wandb(Tracker):
    """Offline without a key, or as WANDB_MODE says."""

    name, modes = "wandb", ("online", "offline")

    def begin(self, mode: str) -> None:
        if mode == "offline":  # the trouble may come from one of these
            for name in [name for name in os.environ if name.startswith("WANDB_")]:
                del os.environ[name]
        # wandb would send errors to its makers: with texts that may hold secrets, and a minute of tries offline.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        if mode == "online":
            mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
            if mode == "offline":
                self._modes = ["offline"]
        self.start(
            run_name=self.config.wandb_project,
            name=self.config.experiment_name,
            dir=self.config.output_dir,
            config=self.config.to_public_dict(),
            mode=mode,
            id=self.id,
            resume="allow" if mode == "online" else None,  # offline, `wandb sync --append` does it
            settings=wandb.Settings(silent=True),
        )
        run = self.tracker.tracker
        record = {"id": self.id, "project": self.config.wandb_project, "folders": self._folders()}
        write_json(self.folder / "wandb.json", record | {"sync": self._sync() if run.offline else None})
        if run.offline:
            print(f"wandb is offline; to upload this run later: {self._sync()}")
        elif run.url:
            print(f"wandb: {run.url}")

    def numbers(self, values: dict[str, Any]) -> dict[str, Any]:
        return values

    def abandon(self) -> str:
        kill_service()
        return f"; to upload this run later: {self._sync()}" if self._folders() else ""

    def _folders(self) -> list[str]:
        found = (self.folder / "wandb").glob(f"*run-*-{self.id}")
        return [str(path) for path in sorted(found, key=lambda path: path.name.removeprefix("offline-"))]

    def _sync(self) -> str:
        # A resumed run adds a folder with the same id; --append uploads it as a continuation.
        return shlex.join(["wandb", "sync", "--append", *self._folders()])


class TensorBoard(Tracker):
    """In {output_dir}/tensorboard. Steps that a resumed run repeats replace those of before."""

    name = "tensorboard"

    def begin(self, mode: str) -> None:
        self.start(run_name=self.name, logging_dir=self.config.output_dir, purge_step=self.done + 1)
        if not self.done:  # each call makes a folder of its own
            values = self.config.to_public_dict().items()
            self.tracker.store_init_configuration({k: v if isinstance(v, int | float) else str(v) for k, v in values})

    def log_pictures(self, name: str, pictures: Callable[[], list[Picture]], step: int) -> None:
        def log() -> None:  # one grid, and its captions in the same order
            paths, captions = zip(*pictures(), strict=True)
            self.tracker.log_images(
                {name: np.stack([np.asarray(open_picture(Path(path))) for path in paths])},
                step=step,
                dataformats="NHWC",
            )
            self.tracker.log({f"{name}_prompts": "".join(f"1. {caption}\n" for caption in captions)}, step=step)

        self._calls.put(log)


class SwanLab(Tracker):
    """In {output_dir}/swanlab without a key, or as SWANLAB_MODE says."""

    name = "swanlab"
    install = "pip install -e '.[trackers]'"

    def begin(self, mode: str) -> None:
        import swanlab
        from swanlab.package import get_key

        key, mode = None, os.environ.get("SWANLAB_MODE", "cloud")
        with suppress(Exception):
            key = get_key()
        if mode == "cloud" and not key:
            mode = "offline"  # else swanlab asks whoever sits at the terminal
        self.start(
            run_name=self.config.wandb_project,
            experiment_name=self.config.experiment_name,
            logdir=str(self.folder / self.name),
            config=self.config.to_public_dict(),
            mode=mode,
            **({"id": self.id, "resume": "allow"} if mode == "cloud" else {}),
            settings=swanlab.Settings(log_proxy_type="none"),  # else it takes sys.stdout's place
        )


class Trackio(Tracker):
    """On this machine, in the folder TRACKIO_DIR; or in the Space or at the server that the environment names."""

    name = "trackio"
    install = SwanLab.install

    def begin(self, mode: str) -> None:
        self.start(
            run_name=self.config.wandb_project,
            name=f"{self.config.experiment_name}-{self.id}",  # trackio knows a resumed run by its name
            config=self.config.to_public_dict(),
            resume="allow",
        )

    def images(self, name: str, pictures: list[Picture]) -> dict[str, Any]:
        found = super().images(name, pictures)[name]  # trackio takes no lists
        return {f"{name}/{i}": image for i, image in enumerate(found)}


TRACKERS: dict[str, type[Tracker]] = {kind.name: kind for kind in (Wandb, TensorBoard, SwanLab, Trackio)}


def not_installed(config: GRPOConfig) -> Iterator[FlagError]:
    """The trackers whose package isn't there."""
    for name in config.log_with:
        if importlib.util.find_spec(name) is None:
            yield FlagError("log_with", name, f"needs the package {name}; `{TRACKERS[name].install}` installs it")


def start_trackers(config: GRPOConfig, run_id: str, done: int) -> list[Tracker]:
    """run_id: of the run in its trackers, which a resumed run keeps. done: iterations before this process."""
    sys.argv = [redact(word) for word in sys.argv]  # trackers record it
    return [TRACKERS[name](config, run_id, done) for name in config.log_with]


def close_trackers(trackers: Sequence[Tracker]) -> None:
    """Ends the run in its trackers. Waits at most CONNECT and FINISH seconds for all of them."""
    for tracker in trackers:
        tracker.end()
    with waiting(", ".join(tracker.name for tracker in trackers)):
        for seconds, waits in (
            (CONNECT, [tracker.begun.wait for tracker in trackers]),
            (FINISH, [tracker.thread.join for tracker in trackers]),
        ):
            end = time.monotonic() + seconds
            for wait in waits:
                wait(max(0.0, end - time.monotonic()))
    for tracker in trackers:
        tracker.give_up()
