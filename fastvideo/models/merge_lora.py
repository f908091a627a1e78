"""Adapters of a LoRA checkpoint to a whole transformer: W + alpha / rank · B A in place of W.

    python -m fastvideo.models.merge_lora --pretrained_model_name_or_path black-forest-labs/FLUX.1-dev \\
        --model_path outputs/mixgrpo/checkpoint-300-0 --output_dir outputs/merged

The result loads with FluxTransformer2DModel.from_pretrained and wherever a full checkpoint does (--model_path).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvideo.config import flag, parse_dataclass
from fastvideo.models.flux import LORA_FILE, is_lora, load_with_lora

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class MergeConfig:
    """What to merge."""

    pretrained_model_name_or_path: str = flag("data/flux", "base FLUX pipeline: a folder or a hub id")
    model_path: str = flag("outputs/lora", "LoRA checkpoint, or its ema/ folder")
    output_dir: str = flag("outputs/merged", "folder for the whole transformer; must not hold anything yet")
    dtype: str = flag("bf16", "number format of the result; the sum is made in fp32", choices=list(DTYPES))

    def __post_init__(self) -> None:
        if not is_lora(self.model_path):
            raise ValueError(f"--model_path {self.model_path}: no {LORA_FILE} in it; give a LoRA checkpoint folder")
        if Path(self.output_dir).exists() and any(Path(self.output_dir).iterdir()):
            raise ValueError(f"--output_dir {self.output_dir}: is not empty; choose another folder")


def merge(config: MergeConfig) -> Path:
    """Writes config.json and diffusion_pytorch_model.safetensors. Raises ValueError when the base can't be loaded."""
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
        raise SystemExit(f"merge_lora.py: error: {error}") from error


if __name__ == "__main__":
    main()
