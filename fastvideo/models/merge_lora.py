"""Merges the adapters of a LoRA checkpoint into a full transformer: W becomes W + alpha / rank · B A.

    python -m fastvideo.models.merge_lora --model_path outputs/mixgrpo/checkpoint-300-0 --output_dir outputs/merged

The result loads with FluxTransformer2DModel.from_pretrained, and as --model_path wherever a full checkpoint does.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvideo.cli import flag, parse_dataclass
from fastvideo.models.flux import LORA_FILE, is_lora, load_with_lora
from fastvideo.runtime.checkpoint import RECORD, read_record
from fastvideo.runtime.resume import check_base_model

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class MergeConfig:
    """What to merge."""

    pretrained_model_name_or_path: str | None = flag(
        None, "base FLUX pipeline: a folder or a hub id (None: the base model of the checkpoint)"
    )
    model_path: str = flag("outputs/lora", "LoRA checkpoint, or its ema/ folder")
    output_dir: str = flag("outputs/merged", "folder for the full transformer; must be empty or new")
    dtype: str = flag("bf16", "number format of the result; the sum is computed in fp32", choices=list(DTYPES))

    def __post_init__(self) -> None:
        if not is_lora(self.model_path):
            raise ValueError(f"--model_path {self.model_path}: no {LORA_FILE} in it; give a LoRA checkpoint folder")
        if Path(self.output_dir).exists() and any(Path(self.output_dir).iterdir()):
            raise ValueError(f"--output_dir {self.output_dir}: is not empty; choose another folder")
        checkpoint = next(
            (p for p in (Path(self.model_path), Path(self.model_path).parent) if (p / RECORD).exists()), None
        )
        if self.pretrained_model_name_or_path is None:
            if checkpoint is None:
                raise ValueError(f"--pretrained_model_name_or_path: needed, as {self.model_path} has no {RECORD}")
            self.pretrained_model_name_or_path = read_record(checkpoint)["settings"]["pretrained_model_name_or_path"]
        if checkpoint is not None:
            check_base_model(checkpoint, self.pretrained_model_name_or_path, "model_path")


def merge(config: MergeConfig) -> Path:
    """Writes config.json and diffusion_pytorch_model.safetensors. Raises ValueError if the base can't be loaded."""
    transformer = load_with_lora(config.pretrained_model_name_or_path, config.model_path)
    transformer.fuse_lora(safe_fusing=True)
    transformer.unload_lora()
    transformer.to(DTYPES[config.dtype]).save_pretrained(config.output_dir, max_shard_size="1TB")
    return Path(config.output_dir)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    config = parse_dataclass(MergeConfig, argv, __doc__)
    try:
        print(f"merged transformer: {merge(config)}")
    except ValueError as error:
        sys.stderr.write(f"merge_lora.py: error: {error}\n")
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
