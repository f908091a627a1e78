"""A folder belongs to one running program: the file run.lock in it names the program's machine and process.

Whether that program still runs is known

- from the operating system's lock on the file, which ends with the process, also after kill -9. Local disks have such
  locks, and most network disks;
- on the same machine without such locks, from the process's number and start time;
- on another machine, where a lock may be unknown here, from a sign of life that the program writes every BEAT seconds.
  A file without a new sign of life for SILENCE seconds is left behind by a dead process.

A process that was stopped for longer than that, while another machine took the folder, ends as soon as it goes on.
"""

import fcntl
import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastvideo.cli import FlagError
from fastvideo.io.files import not_written, sync

BEAT = 10  # seconds between two signs of life
SILENCE = 60  # seconds without one after which a process of another machine counts as dead
SETTLE = 1  # seconds in which another program that starts at the same moment has written its name
LOCK_FILE = "run.lock"
IDENTITY = ("host", "pid", "started", "machine")

_held: set[int] = set()  # file numbers


def _close_in_child() -> None:
    """A forked worker that outlives its parent must not keep the parent's lock."""
    for number in _held:
        os.close(number)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def start_of(pid: int) -> str | None:
    """When a process of this machine started, in ticks since the machine did. None: it doesn't run."""
    try:
        state, *values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else values[18]  # a zombie has ended


def _machine() -> str:
    """A name of this machine's start and this container's process numbers."""
    found = [socket.gethostname()]
    with suppress(OSError):
        found = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(found)


def _read(path: Path) -> dict[str, Any]:
    """The record in a lock file; empty if there is none, or half of one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if all(name in record for name in IDENTITY) else {}
    except (OSError, ValueError, TypeError):
        return {}


class FolderLock:
    """The right to write into a folder, from `take` until the end of the context or of the process."""

    def __init__(self, field: str, folder: str | Path) -> None:
        """field: the setting that the folder comes from, for errors. Takes nothing yet."""
        self.field, self.folder, self.path = field, Path(folder), Path(folder) / LOCK_FILE
        self._number: int | None = None
        self._made = False  # the folder
        self._beats, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._live, name="sign of life", daemon=True)

    def take(self) -> None:
        """Takes the folder, and makes it if needed. Waits up to SILENCE seconds if another machine's program had it.

        Raises:
            FlagError: another running program has the folder; or it can't be written to.
        """
        pid = os.getpid()
        self._me = {"host": socket.gethostname(), "pid": pid, "started": start_of(pid), "machine": _machine()}
        try:
            self._made = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            while self._number is None:
                self._try()
        except OSError as error:
            raise not_written(self.field, self.folder, error) from error
        self._thread.start()

    def _try(self) -> None:
        """Takes the folder unless its lock file is deleted meanwhile."""
        number = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = self._lock(number)
            other = _read(self.path)
            if other and self._runs(other, locked):
                raise self._taken(other)
            if not self._is_at_path(number):
                return
            self._number = number
            self._write()
            if not locked:
                time.sleep(SETTLE)  # of programs that start together, the last to write has the folder
                if (other := _read(self.path)) and not self._is_me(other):
                    self._number = None
                    raise self._taken(other)
            _held.add(number)
        finally:
            if self._number is None:
                os.close(number)

    def _lock(self, number: int) -> bool:
        """Asks for the operating system's lock. False: this file system has none. Raises FlagError if it is taken."""
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            deadline = time.monotonic() + SETTLE
            while not (other := _read(self.path)) and time.monotonic() < deadline:
                time.sleep(0.05)  # it has the lock, and is about to write its name
            raise self._taken(other) from None
        except OSError:
            return False
        return True

    def _runs(self, other: dict[str, Any], locked: bool) -> bool:
        """Whether the program of a record still runs. locked: this program has the operating system's lock."""
        if other["machine"] == self._me["machine"]:
            return not locked and not self._is_me(other) and start_of(other["pid"]) == other["started"]
        print(
            f"waiting up to {SILENCE} s for a sign of life of process {other['pid']} on {other['host']}, "
            f"which had {self.folder}",
            file=sys.stderr,
        )
        deadline = time.monotonic() + SILENCE
        while time.monotonic() < deadline and self.path.exists():
            if (now := _read(self.path)) and now != other:
                return True
            time.sleep(0.5)
        return False

    def _taken(self, other: dict[str, Any]) -> FlagError:
        who = f"process {other['pid']} on {other['host']}" if other else "another process"
        return FlagError(self.field, self.folder, f"{who} is working in it; choose another folder, or end that process")

    def _is_me(self, record: dict[str, Any]) -> bool:
        return all(record[name] == self._me[name] for name in IDENTITY)

    def _is_at_path(self, number: int) -> bool:
        """Whether the open file is still the lock file."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(number), os.stat(self.path))
        return False

    def _write(self) -> None:
        data = json.dumps(self._me | {"beat": self._beats}).encode()
        os.pwrite(self._number, data, 0)
        os.ftruncate(self._number, len(data))
        sync(self._number)

    def _live(self) -> None:
        """Runs in a thread: gives signs of life, and ends the process if another one has taken the folder."""
        while not self._ended.wait(BEAT):
            if (other := _read(self.path)) and not self._is_me(other):
                sys.stderr.write(
                    f"{Path(sys.argv[0]).name}: stopped: this process gave no sign of life, so process {other['pid']} "
                    f"on {other['host']} has taken {self.folder} over\n"
                )
                sys.stderr.flush()
                os._exit(1)  # whatever it wrote now would damage the other's files
            self._beats += 1
            with suppress(OSError):
                self._write()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the folder back, if it was taken. A new folder that is still empty is removed."""
        if self._number is None:
            return
        self._ended.set()
        self._thread.join()
        with suppress(OSError):
            if self._is_at_path(self._number):
                self.path.unlink()
                if self._made:
                    self.folder.rmdir()
        _held.discard(self._number)
        os.close(self._number)
        self._number = None
