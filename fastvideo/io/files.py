"""Atomic writing of files."""

import errno
import fcntl
import io
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvideo.cli import FlagError

if TYPE_CHECKING:
    import torch


def process_name() -> str:
    """A name that no other process has, not even on another machine that shares the folder."""
    return f"{socket.gethostname()}.{os.getpid()}"


def check_writable(field: str, path: str | Path, file: bool = False, needed: int = 0) -> None:
    """Checks that a folder, which may not exist yet, can be written to. Leaves nothing there, not even the folder.

    Args:
        field: the setting that `path` comes from. file: `path` is a file that will be written.
        needed: bytes that will be written there; 0 if unknown.

    Raises:
        FlagError: the place is read-only, full, forbidden, too small, or no place for a folder or file.
    """
    try:
        place = Path(os.path.abspath(path))
        if file:
            if place.exists() and not place.is_file():  # a device would be replaced by a file
                raise FlagError(field, path, "is not a file; name a file that may be written")
            place = place.parent
        place = _nearest(place)
        if not place.is_dir():
            raise FlagError(field, path, f"{place} is not a folder")
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(bytes(1 << 16))  # a full disk still makes empty files
            probe.flush()
            sync(probe.fileno())
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise not_written(field, path, error) from error
    if free < needed:
        problem = f"needs {needed / 2**30:.1f} GiB for what will be written, but has {free / 2**30:.1f} GiB free"
        raise FlagError(field, path, problem)


def not_written(field: str, path: str | Path, error: OSError) -> FlagError:
    """The error about the setting `field` for a place that the operating system lets nobody write to."""
    return FlagError(field, path, f"can't be written: {error.strerror or error}")


# A full disk or quota, a disk that became read-only or broken, a file that the place can't hold.
LOST = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG, errno.EACCES, errno.EPERM)


@contextmanager
def writing(field: str, path: str | Path, file: bool = False, needed: int = 0) -> Iterator[None]:
    """Checks a place as `check_writable` does, before the work in this context, and writes that fail during the work.

    Raises:
        FlagError: the place can't be written to, or not any more.
    """
    check_writable(field, path, file, needed)
    try:
        yield
    except OSError as error:
        if error.errno in LOST:
            raise not_written(field, path, error) from error
        raise


def _nearest(place: Path) -> Path:
    """`place`, or the nearest folder above it that exists."""
    with suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(place)  # raises the other errors: a name that is too long, a forbidden folder
        return place
    return _nearest(place.parent)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Other processes wait in this context for each other, where the file system has locks."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def sync(number: int) -> None:
    """Waits until the disk has the content of an open file or folder, if its file system can wait for that."""
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ESTALE, errno.EROFS):
            raise  # the content is lost; other errors mean that this file system has no such operation


def usual_modes(folder: Path) -> None:
    """Gives the files in a folder the mode of files that are made there, as the umask or the folder says.

    safetensors makes files that only their owner can read.
    """
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            with suppress(OSError):  # a file system without modes
                path.chmod(mode)


def write_bytes(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Writes `data`, whole or in pieces, atomically: a reader of `path` finds the old or the new content, also after a
    kill -9."""
    part = path.with_name(f".{path.name}.{process_name()}.tmp")
    try:
        with open(part, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            sync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes readable UTF-8 JSON, atomically. Raises ValueError for NaN, which JSON lacks: use None."""
    pieces = json.JSONEncoder(ensure_ascii=False, indent=1, allow_nan=False).iterencode(value)
    write_bytes(path, (piece.encode() for piece in chain(pieces, "\n")))  # never the whole text in memory


def write_tensor(path: Path, tensor: "torch.Tensor") -> None:
    """Writes one tensor with torch.save, on the CPU and atomically."""
    import torch

    buffer = io.BytesIO()
    torch.save(tensor.detach().cpu().clone(), buffer)  # without the clone a row would carry its whole batch along
    write_bytes(path, buffer.getvalue())


def is_tensor_file(path: Path) -> bool:
    """Whether a tensor can be read from `path`. The file is mapped, not read: many large files are checked quickly."""
    import torch

    try:
        return isinstance(torch.load(path, weights_only=True, mmap=True, map_location="cpu"), torch.Tensor)
    except Exception:  # torch raises half a dozen types for a damaged file
        return False
