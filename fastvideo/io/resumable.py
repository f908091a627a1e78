"""Resumable work: sampling, evaluation and embedding continue after a kill at any moment.

A `Store` keeps one result per item, complete or not at all. A hash of everything that affects the result identifies the
item. The list of all items determines the batches, and processes compute whole batches, even if only one result is
missing. So restarts and the number of processes don't change a number. Several runs may use one store at the same time.
At the very end, `finish` writes the file that names all items.

Programs need different stores. An embedding is a file named by its hash. Pictures have readable names, so another file
holds the hashes, and `Claims` refuse other settings in the same folder. Scores go to one final file; until then a
`Journal` beside that file keeps them.
"""

import fcntl
import hashlib
import json
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from fastvideo.cli import FlagError
from fastvideo.io.files import locked_folder, process_name, write_json
from fastvideo.io.lock import start_of
from fastvideo.io.processes import Processes, barrier
from fastvideo.io.progress_line import ProgressLine

Item = TypeVar("Item")
Result = TypeVar("Result")


def digest(value: Any, length: int = 16) -> str:
    """The first hexadecimal digits of a hash of a JSON value, the same for every order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


class Store(ABC, Generic[Item, Result]):
    """Keeps one result per item."""

    @abstractmethod
    def has(self, item: Item) -> bool:
        """Whether the store has the item's complete result."""

    @abstractmethod
    def keep(self, item: Item, result: Result) -> None:
        """Stores a result atomically."""

    def complete(
        self,
        items: Sequence[Item],
        batch_size: int,
        make: Callable[[Sequence[Item]], Sequence[Result]],
        here: Processes,
        description: str,
    ) -> tuple[int, int]:
        """Computes this process's share of the missing results. Returns how many were computed, and how many existed.

        make: computes the results of a batch of items. description: what the progress line calls the work. The line
        counts the first process's items, also those that existed.
        """
        batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
        mine, made, done = batches[here.rank :: here.world_size], 0, 0
        share = f"{description}, first of {here.world_size} processes:" if here.world_size > 1 else description
        with ProgressLine(share, sum(map(len, mine)), 0, here.rank == 0) as line:
            for batch in mine:
                missing = [not self.has(item) for item in batch]
                if any(missing):
                    for item, is_missing, result in zip(batch, missing, make(batch), strict=True):
                        if is_missing:
                            self.keep(item, result)
                else:
                    line.free += len(batch)
                made, done = made + sum(missing), done + len(batch)
                line.show(done)
        return made, done - made


def finish(here: Processes, write: Callable[[], None]) -> None:
    """Waits for all processes. Then the first process writes the file that names all items, and all wait for it."""
    barrier()
    if here.rank == 0:
        write()
    barrier()


@dataclass(frozen=True)
class Claims:
    """Files that record the settings of a folder's pictures, and a hash of each picture's inputs.

    The first claim is sampling.json. Later pictures are claimed in sampling.1.json, sampling.2.json, ... with the same
    settings.
    """

    folder: Path

    def claim(
        self,
        settings: Mapping[str, Any],
        made_of: Mapping[str, str],
        sources: Mapping[str, Any],
        here: Processes,
        outdated: Sequence[Path] | None = None,
    ) -> str:
        """Claims the pictures that no file claims yet; all processes call it. Returns the hash of the settings.

        Args:
            made_of: name of each picture in the folder -> hash of its inputs. sources: paths, for human readers.
            outdated: to replace the pictures, the files that name them; else None.

        Raises FlagError if the folder has pictures with other settings, or other pictures with the same names.
        """
        if here.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            own = self.folder / f".sampling.{process_name()}.json"
            write_json(own, {"settings": settings, "pictures": made_of, "sources": sources})
            try:
                if outdated is not None:  # deleted first, so that they never name pictures of both runs
                    for path in (*outdated, *self.folder.glob("sampling.[0-9]*.json")):
                        path.unlink(missing_ok=True)
                    os.replace(own, self.folder / "sampling.json")
                with suppress(FlagError):  # every process raises it below
                    while path := self._place(settings, made_of):
                        try:
                            os.link(own, path)  # unlike os.replace, fails if another run has just made the file
                        except FileExistsError:
                            continue
                        except OSError:  # a file system without links
                            with locked_folder(self.folder):
                                if not path.exists():
                                    os.replace(own, path)
            finally:
                own.unlink(missing_ok=True)
        barrier()
        self._place(settings, made_of)
        return digest(settings)

    def _place(self, settings: Mapping[str, Any], made_of: Mapping[str, str]) -> Path | None:
        """The file for claiming these pictures; None if they are claimed already. Raises FlagError, see `claim`."""
        there, taken, path = self._read()
        if there is None:
            return path
        other = "holds pictures of other {}; choose another folder, or --overwrite them"
        if changed := [f"{k} ({there.get(k)} there, {v} now)" for k, v in settings.items() if there.get(k) != v]:
            raise FlagError("output_dir", self.folder, other.format(f"settings: {', '.join(changed)}"))
        if changed := [name for name, made in made_of.items() if taken.get(name, made) != made]:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise FlagError("output_dir", self.folder, other.format(f"prompts: {', '.join(changed[:3])}{more}"))
        return path if made_of.keys() - taken.keys() else None

    def _read(self) -> tuple[dict[str, Any] | None, dict[str, str], Path]:
        """The settings (None: no claim), the hash of each claimed picture, and the path of the next claim."""
        settings, taken, number, path = None, {}, 0, self.folder / "sampling.json"
        while path.exists():
            try:
                claim = json.loads(path.read_text(encoding="utf-8"))
                settings, taken = claim["settings"], taken | claim["pictures"]
            except (ValueError, KeyError, TypeError) as error:
                problem = f"unreadable {path.name}: {error!r}; choose another folder, or --overwrite it"
                raise FlagError("output_dir", self.folder, problem) from error
            number += 1
            path = self.folder / f"sampling.{number}.json"
        return settings, taken, path


class Journal(Store[Item, Result]):
    """Keeps results for one final file in hidden files beside it: one JSON line per item, with the item's hash.

    Each process writes its own file, which is locked while the process lives. It reads the files of all processes, also
    of killed ones.
    """

    def __init__(self, output: Path | None, purpose: Any) -> None:
        """Opens this process's file, and reads the files of all processes.

        Args:
            output: the final file, --output_json. None: results are kept in memory only.
            purpose: JSON value of everything that affects the output.

        Raises FlagError if a living process works on the same output with another purpose.
        """
        self.output, self.results = output, {}
        if output is None:
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        end = f".{digest(purpose, 8)}"
        self._own = output.with_name(f".{output.name}.{process_name()}{end}.part")
        self._file = os.open(self._own, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._file, fcntl.LOCK_EX)
        if any(_is_locked(path) for path in self._files() if not path.stem.endswith(end)):
            self.withdraw()
            raise FlagError(
                "output_json",
                output,
                "an evaluation of other pictures or with other flags is under way for it; choose another file, or wait",
            )
        for path in self._files():
            try:
                lines = path.read_bytes().splitlines()
            except FileNotFoundError:  # another process has just ended, and removed it
                continue
            for line in lines:
                with suppress(ValueError, KeyError, TypeError):  # half a line, of a killed process
                    record = json.loads(line)
                    self.results[record["key"]] = record["found"]

    def _files(self) -> list[Path]:
        start = f".{self.output.name}."
        return [p for p in self.output.parent.iterdir() if p.name.startswith(start) and p.suffix == ".part"]

    @abstractmethod
    def key(self, item: Item) -> str:
        """The item's hash."""

    def lasts(self, result: Result) -> bool:
        """Whether a later run may use the result; else the run makes it again."""
        return True

    def has(self, item: Item) -> bool:
        return self.key(item) in self.results

    def keep(self, item: Item, result: Result) -> None:
        key = self.key(item)
        self.results[key] = result
        if self.output is not None and self.lasts(result):
            os.write(self._file, b"\n" + json.dumps({"key": key, "found": result}).encode())

    def withdraw(self) -> None:
        """Removes this process's file."""
        if self.output is not None:
            self._own.unlink(missing_ok=True)
            os.close(self._file)

    def remove(self) -> None:
        """Removes the files of this process and of killed ones, when the output is written."""
        self.withdraw()
        for path in self._files() if self.output is not None else ():
            if not _is_locked(path):
                path.unlink(missing_ok=True)


def _is_locked(path: Path) -> bool:
    """Whether the process that writes a journal's file is alive."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: others may be asking, too
    except BlockingIOError:
        return True
    except FileNotFoundError:  # it has just been removed
        return False
    except OSError:  # a file system without locks: the name tells the process, of this machine
        host, _, pid = path.stem.rpartition(".")[0].rpartition(".")
        return host.endswith(f".{socket.gethostname()}") and pid.isdigit() and start_of(int(pid)) is not None
    return False
