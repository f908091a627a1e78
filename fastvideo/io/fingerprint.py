"""Hashes of models and files on disk, to find out whether they have changed."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError


def local_folder(model_path: str) -> Path | None:
    """The folder of a model: a path, or the newest downloaded snapshot of a hub id. None: nothing is downloaded yet."""
    if Path(model_path).is_dir():
        return Path(model_path)
    try:
        index = try_to_load_from_cache(model_path, "model_index.json") or try_to_load_from_cache(
            model_path, "config.json"
        )
    except HFValidationError:
        return None  # neither a folder nor a valid hub id; loading the model will say so
    return Path(index).parent if isinstance(index, str) else None


def model_fingerprint(model_path: str, folders: Sequence[str] = (".",)) -> str | None:
    """A hash of the configs, tokenizers and weights in `folders`: every file's name, size and 1 MiB of its content.

    The hash depends on content, not on the path: it recognises a moved model, and tells a retrained model from the old.
    None if there are no such files: a wrong path, or a hub id that isn't downloaded.
    """
    root = local_folder(model_path)
    if root is None:
        return None
    kinds = (".json", ".txt", ".model", ".safetensors", ".bin")
    files = {path for folder in folders for path in (root / folder).glob("*") if path.suffix in kinds}
    if not files:
        return None
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(root).as_posix()} {path.stat().st_size}\n".encode())
        _add_samples(path, digest)
    return digest.hexdigest()


def _add_samples(path: Path, digest: "hashlib._Hash", samples: int = 16, length: int = 1 << 16) -> None:
    """Hashes `samples` pieces of `length` bytes, evenly spaced; the whole file if it is not longer than all pieces."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= samples * length:
            digest.update(file.read())
            return
        for sample in range(samples):
            file.seek((size - length) * sample // (samples - 1))
            digest.update(file.read(length))


def sample_file(path: Path) -> dict[str, int | str]:
    """Size and hash of a file. Above 256 MiB, hashes only 256 MiB evenly spread over the file, to be quick."""
    digest = hashlib.sha256()
    _add_samples(path, digest, 1 << 12, 1 << 16)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
