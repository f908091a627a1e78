"""Merges the adapters of a LoRA checkpoint into a full transformer: W becomes W + alpha / rank · B A.

    python -m fastvideo.models.merge_lora --model_path outputs/mixgrpo/checkpoint-300-0 --output_dir outputs/merged

The result loads with from_pretrained of diffusers' class, and as --model_path wherever a full checkpoint does.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvideo.cli import FlagError, check_fields, flag, flag_errors, parse_dataclass, parse_first
from fastvideo.io.files import check_writable, usual_modes
from fastvideo.io.lock import LOCK_FILE, FolderLock

PART = ".part"  # what isn't complete yet, in output_dir


@dataclass
class MergeConfig:
    """Settings of a merge."""

    pretrained_model_name_or_path: str | None = flag(
        None, "base FLUX pipeline: a folder or a hub id (None: the base model of the checkpoint)"
    )
    model_path: str = flag("outputs/lora", "LoRA checkpoint, its ema/ folder, or any LoRA file that diffusers reads")
    output_dir: str = flag("outputs/merged", "folder for the full transformer; must be empty or new")
    dtype: str = flag("bf16", "number format of the result; the sum is computed in fp32", choices=["fp32", "bf16"])

    def __post_init__(self) -> None:
        check_fields(self)
        self.check_empty()

    def check_empty(self) -> None:
        """Raises FlagError if output_dir has files in it, unless a killed merge has left them, and PART beside them."""
        folder = Path(self.output_dir)
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        if PART not in names and names - {LOCK_FILE}:
            raise FlagError("output_dir", self.output_dir, "is not empty; choose another folder")


if __name__ == "__main__":  # before the slow imports: --help and a refused flag answer at once
    parse_first(MergeConfig, doc=__doc__)

from fastvideo.io.devices import torch_dtype
from fastvideo.models.lora import find_lora
from fastvideo.models.pretrained import BASE, load_with_lora, meta_transformer
from fastvideo.runtime.checkpoint import RECORD, linked, read_record
from fastvideo.runtime.resume import check_base_model

from safetensors import SafetensorError


def base_model(config: MergeConfig, adapters: Path) -> str:
    """The base model of the file `adapters`: the given one, or the one that the checkpoint names.

    Raises FlagError for adapters of another or an unknown base model.
    """
    folders = (adapters.parent, adapters.parent.parent)  # the checkpoint, or of its ema/
    checkpoint = next((folder for folder in folders if (folder / RECORD).exists()), None)
    if checkpoint is None and config.pretrained_model_name_or_path is None:
        raise FlagError(BASE, None, f"needed, as {config.model_path} has no {RECORD}")
    if checkpoint is None:
        return config.pretrained_model_name_or_path
    try:
        base = config.pretrained_model_name_or_path or read_record(checkpoint, "model_path")["settings"][BASE]
        check_base_model(checkpoint, base, "model_path")
    except (KeyError, TypeError) as error:
        raise FlagError("model_path", config.model_path, f"{RECORD} doesn't name its base model: {error!r}") from error
    return base


def merge(config: MergeConfig) -> Path:
    """Writes config.json and diffusion_pytorch_model.safetensors, both or none. Returns the folder.

    Raises FlagError if a model can't be used, or the folder can't be written to or another merge works in it.
    """
    output = Path(config.output_dir)
    with FolderLock("output_dir", output) as lock:
        lock.take()
        config.check_empty()  # another merge may have ended meanwhile
        adapters = find_lora(linked(Path(config.model_path), "model_path"), "model_path")
        base, dtype = base_model(config, adapters), torch_dtype(config.dtype)
        size = sum(parameter.numel() for parameter in meta_transformer(base).parameters()) * dtype.itemsize
        check_writable("output_dir", output, needed=size)
        transformer = load_with_lora(base, adapters)
        transformer.fuse_lora(safe_fusing=True)
        transformer.unload_lora()
        transformer.to(dtype)
        part = output / PART
        shutil.rmtree(part, ignore_errors=True)
        try:
            transformer.save_pretrained(part, max_shard_size="1TB")
            usual_modes(part)
            for path in sorted(part.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, output / path.name)  # config.json last: a folder without it is no model
        except (OSError, SafetensorError) as error:
            raise FlagError("output_dir", output, f"can't be written: {error}") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return output


@flag_errors("merge_lora.py")
def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Bad input prints one line and exits with status 2."""
    print(f"merged transformer: {merge(parse_dataclass(MergeConfig, argv, __doc__))}")


if __name__ == "__main__":
    main()
