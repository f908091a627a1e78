"""Sends a run to the trackers of --log_with. Whatever happens to one, training neither waits nor ends because of it.

A tracker is one of Accelerate's classes, in a thread of its own. An error costs one line, and the run goes on without
the tracker; wandb goes on offline first. metrics.jsonl and the pictures in the run's folder are complete in any case.
"""

import importlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastvideo.config import GRPOConfig
from fastvideo.io.files import write_json
from fastvideo.io.pictures import open_picture
from fastvideo.io.secrets import one_line, redact

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

FINISH = 120.0  # seconds after the run, to connect (wandb itself tries for 90) and to upload the rest


class Tracker:
    """One run in one tracker. `send` calls the other methods in the tracker's thread."""

    def __init__(self, name: str, config: GRPOConfig, run_id: str, done: int) -> None:
        """run_id: a resumed run keeps it. done: iterations before this process."""
        self.name, self.config, self.id, self.done = name, config, run_id, done
        self.modes = ["online", "offline"] if name == "wandb" else ["online"]  # after an error, the next one
        self.tracker: GeneralTracker | None = None
        sys.argv = [redact(word) for word in sys.argv]  # packages record it
        self.thread = ThreadPoolExecutor(1)
        self.send(lambda: None)  # begins

    def send(self, call: Callable[..., object], *given: Any) -> Future:
        return self.thread.submit(self._attempt, call, *given)

    def log(self, values: dict[str, Any], step: int) -> None:
        """values: a line of metrics.jsonl, of which wandb takes all and the others the numbers."""
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
        self.tracker.log(values if self.name == "wandb" else numbers, step=step)

    def show(self, name: str, read: Callable[[int], list[tuple[str, str]]], step: int) -> None:
        """read: returns a step's pictures, as paths with the captions that Accelerate's log_images doesn't take."""
        pictures = read(step)
        if self.name == "tensorboard":  # one grid, and its captions in the same order
            grid = np.stack([np.asarray(open_picture(Path(path))) for path, _ in pictures])
            self.tracker.log_images({name: grid}, step=step, dataformats="NHWC")
            self.tracker.log({f"{name}_prompts": "".join(f"1. {caption}\n" for _, caption in pictures)}, step=step)
            return
        image = importlib.import_module(self.name).Image
        images = [image(path, caption=caption) for path, caption in pictures]
        single = {f"{name}/{i}": image for i, image in enumerate(images)}
        self.tracker.log(single if self.name == "trackio" else {name: images}, step=step)  # trackio takes no lists

    def _attempt(self, call: Callable[..., object], *given: Any) -> None:
        """Calls. After an error starts in the next mode and calls again; after the last mode's, gives up."""
        hook = sys.excepthook
        while self.modes:
            try:
                if self.tracker is None:
                    self.tracker = LOGGER_TYPE_TO_CLASS[self.name](**self._options())
                    self.tracker.main_process_only = False  # this is the main one; Accelerate would ask again
                    self.tracker.start()
                    if self.name == "wandb":
                        self._note_upload()
                return call(*given)
            except (Exception, SystemExit) as error:
                self.modes, self.tracker = self.modes[1:], None
                then = self.modes[0] if self.modes else f"without {self.name}"
                sys.stderr.write(f"{self.name}: {one_line(error)[:300]}; this run goes on {then}\n")
                if self.name == "wandb":
                    kill_service()
            finally:
                sys.excepthook = hook  # swanlab sets others, which show secrets

    def _options(self) -> dict[str, Any]:
        """Arguments of Accelerate's class, which hands them on to the package."""
        folder, name = self.config.output_dir, self.config.experiment_name
        shared = {"run_name": self.config.wandb_project, "config": self.config.to_public_dict()}
        resumed = {"id": self.id, "resume": "allow"}
        if self.name == "tensorboard":  # steps that a resumed run repeats replace those of before
            return {"run_name": self.name, "logging_dir": folder, "purge_step": self.done + 1}
        if self.name == "trackio":  # knows a resumed run by its name
            return shared | {"name": f"{name}-{self.id}", "resume": "allow"}
        if self.name == "swanlab":
            import swanlab
            from swanlab.package import has_api_key

            mode = self._mode("cloud", has_api_key())
            settings = swanlab.Settings(log_proxy_type="none")  # else it takes sys.stdout's place
            own = {"experiment_name": name, "logdir": f"{folder}/swanlab", "mode": mode, "settings": settings}
            return shared | own | (resumed if mode == "cloud" else {})
        if self.modes == ["offline"]:  # the trouble may come from one of these
            for variable in [variable for variable in os.environ if variable.startswith("WANDB_")]:
                del os.environ[variable]
        # wandb would send errors to its makers: with texts that may hold secrets, and a minute of tries offline.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        mode = self._mode(self.modes[0], wandb.api.api_key)
        self.modes = [mode] if mode == "offline" else self.modes
        return shared | resumed | {"name": name, "dir": folder, "mode": mode, "settings": {"silent": True}}

    def _mode(self, online: str, key: object) -> str:
        """As the environment says; offline without a key, for which a package asks whoever sits at the terminal."""
        mode = os.environ.get(f"{self.name.upper()}_MODE") or online
        return "offline" if mode == online and not key else mode

    def _note_upload(self) -> None:
        """Writes wandb.json: where wandb's files are, and how to upload them later."""
        run, found = self.tracker.tracker, Path(self.config.output_dir, "wandb").glob(f"*run-*-{self.id}")
        # A resumed run adds a folder with the same id; --append uploads it as a continuation.
        folders = sorted(map(str, found), key=lambda path: path.replace("offline-run", "run"))
        sync = shlex.join(["wandb", "sync", "--append", *folders])
        write_json(Path(self.config.output_dir, "wandb.json"), {"id": self.id, "folders": folders, "sync": sync})
        print(f"wandb is offline; to upload this run later: {sync}" if run.offline else f"wandb: {run.url}")


def kill_service() -> None:
    """Kills wandb's own process, which may try for half an hour to reach its server, and forgets its runs."""
    from wandb.sdk import wandb_setup

    with suppress(AttributeError):  # there may be none
        wandb_setup.singleton()._connection._proc._process.kill()
    with suppress(Exception, SystemExit):  # wandb exits with the status of the killed process
        wandb_setup.teardown()


def close_trackers(trackers: Sequence[Tracker]) -> None:
    """Ends the run in its trackers. Waits at most FINISH seconds for all of them."""
    ends = {tracker.send(lambda tracker=tracker: tracker.tracker.finish()): tracker for tracker in trackers}
    for tracker in [ends[end] for end in wait(ends, FINISH).not_done]:
        tracker.modes = []  # its thread ends at its next error
        sys.stderr.write(f"{tracker.name}: not finished after {FINISH:g} seconds; this program ends without it\n")
        if tracker.name == "wandb":
            kill_service()
