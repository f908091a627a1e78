"""Files that survive a kill, and prompt files that say what is wrong with them."""

import io
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


def process_name() -> str:
    """Names this process among all that may share a folder, also from other machines."""
    return f"{socket.gethostname()}.{os.getpid()}"


def write_bytes(path: Path, data: bytes) -> None:
    """Writes all of `data` or nothing: whoever opens `path`, also after a kill -9, finds the old or the new content."""
    part = path.with_name(f".{path.name}.{process_name()}.tmp")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Readable UTF-8 JSON, atomically. A NaN is refused: it is no JSON, write None."""
    write_bytes(path, (json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode())


def write_tensor(path: Path, tensor: torch.Tensor) -> None:
    """torch.save of one plain CPU tensor, atomically."""
    buffer = io.BytesIO()
    torch.save(tensor.detach().cpu().clone(), buffer)  # the clone: a row of a batch would carry the whole batch along
    write_bytes(path, buffer.getvalue())


def is_tensor_file(path: Path) -> bool:
    """Whether a tensor can be read from `path`. Only maps the file, so that many large ones are checked quickly."""
    try:
        return isinstance(torch.load(path, weights_only=True, mmap=True, map_location="cpu"), torch.Tensor)
    except Exception:  # torch raises half a dozen types for a damaged file
        return False


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a text file, one a line, and what was left out."""

    prompts: list[str]
    empty: int  # blank lines
    duplicates: int  # repeated lines, dropped where `unique`

    def __str__(self) -> str:
        return f"{len(self.prompts)} prompts ({self.empty} empty lines and {self.duplicates} duplicates left out)"


def read_prompts(path: str | Path, flag: str, unique: bool = True) -> PromptFile:
    """Reads a UTF-8 file with one prompt a line, in order; a repeated prompt is kept once where `unique`.

    Raises ValueError, one line that names --`flag`, for a missing file, one without prompts, and bytes that aren't
    UTF-8 (with their line numbers: a skipped line would be a prompt that nobody misses).
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(
            f"--{flag} {path}: {error.strerror or error}; give a text file with one prompt a line"
        ) from error
    lines, bad = [], []
    # Split at line feeds only: str.splitlines also breaks at U+2028 and would shift the numbers.
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            lines.append(line.decode("utf-8").strip())
        except UnicodeDecodeError as error:
            bad.append(f"line {number} (byte 0x{line[error.start]:02x} at position {error.start + 1})")
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(f"--{flag} {path}: not UTF-8 text: {', '.join(bad[:5])}{more}")
    if lines and not lines[-1]:
        lines.pop()  # what follows the last line feed is no line
    found = [line for line in lines if line]
    if not found:
        raise ValueError(f"--{flag} {path}: no prompts in it; give a text file with one prompt a line")
    kept = list(dict.fromkeys(found)) if unique else found
    return PromptFile(kept, empty=len(lines) - len(found), duplicates=len(found) - len(kept))
