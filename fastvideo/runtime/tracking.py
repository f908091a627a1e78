"""Sends a run to wandb. Whatever happens to wandb, training neither waits for it nor ends because of it.

All calls of wandb run in a thread of their own. The first error costs one line, and the run goes on offline; after
another one it goes on without wandb. metrics.jsonl and the pictures in the run's folder are complete in any case.
wandb.json says where wandb's files are and how to upload them later.
"""

import os
import queue
import shlex
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastvideo.config import GRPOConfig
from fastvideo.io.files import write_json
from fastvideo.io.secrets import one_line, redact
from fastvideo.io.waiting import waiting

CONNECT, FINISH = 120.0, 60.0  # seconds to connect (wandb's own limit is 90), and to upload the rest after the run

Entry = Callable[[], dict[str, Any]]  # makes what is logged, in wandb's thread


def _say(text: str) -> None:
    sys.stderr.write(f"wandb: {text}\n")


def picture(source: Any, caption: str | None = None) -> Any:
    """What wandb shows a picture as. source: a PIL image or a path. Call it in an `Entry`."""
    import wandb

    return wandb.Image(source, caption=caption)


def kill_service() -> None:
    """Kills wandb's own process, which may try for half an hour to reach its server, and forgets its runs."""
    from wandb.sdk import wandb_setup

    connection = wandb_setup.singleton()._connection
    if connection is not None and connection._proc is not None:
        connection._proc._process.kill()
    # With an exit status: wandb raises SystemExit for the one of the killed process.
    with suppress(Exception, SystemExit):
        wandb_setup.teardown()


class Tracker:
    """One run in wandb. Offline without a key, or as WANDB_MODE says."""

    def __init__(self, config: GRPOConfig, wandb_id: str) -> None:
        """wandb_id: the run's id in wandb; a resumed run keeps the id."""
        self.config, self.id, self.folder = config, wandb_id, Path(config.output_dir)
        self.run: Any = None
        self._modes: list[str | None] = [None, "offline"]  # None: as the environment says
        self._entries: queue.SimpleQueue[tuple[Entry, int] | None] = queue.SimpleQueue()
        self._begun = threading.Event()
        sys.argv = [redact(word) for word in sys.argv]  # wandb records it
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, entry: Entry, step: int) -> None:
        """Logs the result of `entry`, in wandb's thread."""
        self._entries.put((entry, step))

    def close(self) -> None:
        """Ends the run in wandb. Waits at most CONNECT and FINISH seconds for it."""
        self._entries.put(None)
        with waiting("wandb"):
            self._begun.wait(CONNECT)
            self._thread.join(FINISH)
        if self._thread.is_alive():
            self._modes.clear()  # its thread ends at its next error
            _say(f"not finished after {FINISH:g} seconds; this program ends without it{self._advice()}")
            kill_service()

    def _work(self) -> None:
        self._attempt(lambda: None)
        self._begun.set()
        for entry, step in iter(self._entries.get, None):
            self._attempt(lambda entry=entry, step=step: self.run.log(entry(), step=step))
        self._attempt(lambda: self.run.finish())

    def _attempt(self, call: Callable[[], object]) -> None:
        """Calls. After an error starts an offline run and calls again; after another error, gives wandb up."""
        while self._modes:
            try:
                if self.run is None:
                    self._begin(self._modes[0])
                return call()
            except (Exception, SystemExit) as error:
                self._modes[:1], self.run = [], None
                then = "this run goes on offline" if self._modes else "this run goes on without wandb"
                _say(f"{one_line(error)[:300]}; {then}")
                kill_service()

    def _begin(self, mode: str | None) -> None:
        if mode is not None:  # the trouble may come from one of these
            for name in [name for name in os.environ if name.startswith("WANDB_")]:
                del os.environ[name]
        # wandb would send errors to its makers: with texts that may hold secrets, and a minute of tries offline.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        if mode is None:
            mode = os.environ.get("WANDB_MODE") or ("online" if wandb.api.api_key else "offline")
            if mode == "offline":
                self._modes = ["offline"]
        self.run = wandb.init(
            project=self.config.wandb_project,
            name=self.config.experiment_name,
            dir=self.config.output_dir,
            config=self.config.to_public_dict(),
            mode=mode,
            id=self.id,
            resume="allow" if mode == "online" else None,  # offline, `wandb sync --append` does it
            settings=wandb.Settings(silent=True),
        )
        record = {"id": self.id, "project": self.config.wandb_project, "folders": self._folders()}
        write_json(self.folder / "wandb.json", record | {"sync": self._sync() if self.run.offline else None})
        if self.run.offline:
            print(f"wandb is offline; to upload this run later: {self._sync()}")
        elif self.run.url:
            print(f"wandb: {self.run.url}")

    def _folders(self) -> list[str]:
        found = (self.folder / "wandb").glob(f"*run-*-{self.id}")
        return [str(path) for path in sorted(found, key=lambda path: path.name.removeprefix("offline-"))]

    def _sync(self) -> str:
        # A resumed run adds a folder with the same id; --append uploads it as a continuation.
        return shlex.join(["wandb", "sync", "--append", *self._folders()])

    def _advice(self) -> str:
        return f"; to upload this run later: {self._sync()}" if self._folders() else ""
