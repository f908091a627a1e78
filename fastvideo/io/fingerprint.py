"""Whether a model on disk is still the one that files were made with."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError


def local_folder(model_path: str) -> Path | None:
    """The folder of a model: a path, or the newest downloaded snapshot of a hub id; None when there is none yet."""
    if Path(model_path).is_dir():
        return Path(model_path)
    try:
        index = try_to_load_from_cache(model_path, "model_index.json") or try_to_load_from_cache(
            model_path, "config.json"
        )
    except HFValidationError:
        return None  # neither a folder nor a possible hub id; loading it says so
    return Path(index).parent if isinstance(index, str) else None


def model_fingerprint(model_path: str, folders: Sequence[str] = (".",)) -> str | None:
    """A hash of the configs, tokenizers and safetensors in `folders`: every file's name, size and 1 MiB of its content.

    The content, not the path, so that a moved model is recognised and a retrained one is not mistaken for the old one.
    None when there are no such files: a wrong path, or a hub id that hasn't been downloaded.
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
    """`samples` pieces of `length` bytes, evenly spaced; the whole file when it is no longer than they are together."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= samples * length:
            digest.update(file.read())
            return
        for sample in range(samples):
            file.seek((size - length) * sample // (samples - 1))
            digest.update(file.read(length))


def sample_file(path: Path) -> dict[str, int | str]:
    """Size and hash of a file; above 256 MiB, of 256 MiB evenly spread over it, so that it is quick."""
    digest = hashlib.sha256()
    _add_samples(path, digest, 1 << 12, 1 << 16)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
