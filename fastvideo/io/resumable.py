"""Work that can be killed at any moment and goes on where it stopped: sampling, evaluation, embedding.

A `Store` holds results by item. An item is what a hash of all that decides its result says, and its result is there as
a whole or not at all. Batches are fixed by the list of all items and dealt out to the processes, and a batch is made as
a whole even if one result is missing. So neither a restart nor the number of processes changes a number. `finish`
writes the file that names all items, at the very end; several runs may work on one store at once.

One kind of store can't serve all programs without changing what users see: embeddings are files named by their hash;
pictures have names that people read, so a file holds the hash, and `Claims` refuse other settings in the same folder;
scores end up in one file, and until then wait in a `Journal` beside it.
"""

import fcntl
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from fastvideo.cli import FlagError
from fastvideo.io.files import process_name, write_json
from fastvideo.io.processes import Processes, barrier

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")


def digest(value: Any, length: int = 16) -> str:
    """The first hexadecimal digits of a hash of a JSON value, the same for every order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


class Store(ABC, Generic[Item, Result]):
    """Results by item."""

    @abstractmethod
    def has(self, item: Item) -> bool:
        """Whether the item's result is there and whole."""

    @abstractmethod
    def keep(self, item: Item, result: Result) -> None:
        """Stores a result, as a whole or not at all."""

    def complete(
        self,
        items: Sequence[Item],
        batch_size: int,
        make: Callable[[Sequence[Item]], Sequence[Result]],
        here: Processes,
        description: str,
    ) -> tuple[int, int]:
        """Makes this process's share of the missing results. Returns how many it made, and how many were there.

        make: the results of a batch of items. description: of the progress bar.
        """
        batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
        mine, made = batches[here.rank :: here.world_size], 0
        for batch in tqdm(mine, desc=description, unit="batch", disable=here.rank != 0):
            missing = [not self.has(item) for item in batch]
            if not any(missing):
                continue
            for item, is_missing, result in zip(batch, missing, make(batch), strict=True):
                if is_missing:
                    self.keep(item, result)
            made += sum(missing)
        return made, sum(map(len, mine)) - made


def finish(here: Processes, write: Callable[[], None]) -> None:
    """Waits for all processes, lets the first one write the file that names all items, and waits for that too."""
    barrier()
    if here.rank == 0:
        write()
    barrier()


@dataclass(frozen=True)
class Claims:
    """Files that say which settings the pictures of a folder have, and a hash of what each picture is made of.

    The first claim is sampling.json. Pictures that are added later are claimed in sampling.1.json, sampling.2.json, ...
    with the same settings.
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
            made_of: name of each picture in the folder -> hash. sources: paths, for people who read the file.
            outdated: the files that name the folder's pictures, if the pictures are to be replaced; else None.

        Raises FlagError for a folder with pictures of other settings, or with other pictures under the same names.
        """
        if here.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            own = self.folder / f".sampling.{process_name()}.json"
            write_json(own, {"settings": settings, "pictures": made_of, "sources": sources})
            try:
                if outdated is not None:  # these files first: they must never name pictures of both runs
                    for path in (*outdated, *self.folder.glob("sampling.[0-9]*.json")):
                        path.unlink(missing_ok=True)
                    os.replace(own, self.folder / "sampling.json")
                with suppress(FlagError):  # every process raises it, below
                    while path := self._place(settings, made_of):
                        try:
                            os.link(own, path)  # fails, unlike os.replace, for a file of another run made just now
                        except FileExistsError:
                            continue
                        except OSError:  # a file system without links
                            os.replace(own, path)
            finally:
                own.unlink(missing_ok=True)
        barrier()
        self._place(settings, made_of)
        return digest(settings)

    def _place(self, settings: Mapping[str, Any], made_of: Mapping[str, str]) -> Path | None:
        """The file to claim these pictures in; None where they are claimed. Raises FlagError, see `claim`."""
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
    """Results on their way into one file, in hidden files beside it: one JSON line per item, under its hash.

    Each process writes a file of its own, locked as long as the process lives, and reads the files of all others,
    killed ones too. Other items find nothing.
    """

    def __init__(self, output: Path | None, purpose: Any) -> None:
        """Opens this process's file, and reads the files of all.

        Args:
            output: the file of --output_json, which the results end up in; None: they are kept in memory only.
            purpose: JSON value of all that decides the output.

        Raises FlagError when a living process works on the same output with another purpose.
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
    except OSError:  # the file has just been removed, or the file system has no locks
        return False
    return False
