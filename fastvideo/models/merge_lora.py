"""Writes a checkpoint for other programs: a LoRA merged into the full transformer, or its adapters in other names.

    python -m fastvideo.models.merge_lora --model_path outputs/mixgrpo/checkpoint-300-0 --output_dir outputs/merged

--format diffusers: W becomes W + alpha / rank · B A. The folder loads with from_pretrained of diffusers' class, and as
--model_path wherever a full checkpoint does. The others are for FLUX.1. original: the same in the names of the original
code, as one file that ComfyUI and FluxTransformer2DModel.from_single_file load; also for a full checkpoint.
lora_diffusers, lora_kohya: the adapters alone, with alpha, in the names of diffusers or of kohya's scripts and ComfyUI.
checkpoint.json beside each names the base model for sampling.
"""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastvideo.cli import FlagError, check_fields, flag, flag_errors, parse_dataclass, parse_first
from fastvideo.io.files import check_writable, usual_modes
from fastvideo.io.lock import LOCK_FILE, FolderLock

PART = ".part"  # what isn't complete yet, in output_dir
ORIGINAL_FILE = "flux1.safetensors"


@dataclass
class MergeConfig:
    """Settings of the result."""

    pretrained_model_name_or_path: str | None = flag(
        None, "base FLUX pipeline: a folder or a hub id (None: the base model of the checkpoint)"
    )
    model_path: str | None = flag(
        None,
        "LoRA checkpoint, its ema/ folder, or any LoRA file that diffusers reads; for --format original also a full "
        "checkpoint",
    )
    output_dir: str = flag("outputs/merged", "folder for the result; must be empty or new")
    format: str = flag(
        "diffusers",
        "what to write: the full transformer for diffusers, or as one file in the original code's names; or the "
        "adapters alone in the names of diffusers or of kohya's scripts and ComfyUI",
        choices=["diffusers", "original", "lora_diffusers", "lora_kohya"],
    )
    dtype: str | None = flag(
        None,
        "number format of the result (None: bf16 for a transformer; adapters keep theirs); sums are computed in fp32",
        choices=["fp32", "bf16"],
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.model_path is None:
            raise FlagError("model_path", None, "not given; name a checkpoint, such as outputs/mixgrpo/latest")
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
from fastvideo.io.weights import not_finite, write_weights
from fastvideo.models.flux import Flux1
from fastvideo.models.lora import LORA_FILE, Adapters, find_lora, lora_file
from fastvideo.models.original import join, kohya_adapters, open_transformer, original_names, original_shapes
from fastvideo.models.pretrained import BASE, check_lora, meta_transformer, stored_transformer
from fastvideo.runtime.checkpoint import (
    RECORD,
    WEIGHTS,
    base_of,
    check_base_model,
    check_tuned_place,
    checkpoint_of,
    linked,
    write_base,
)

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors import SafetensorError
from safetensors.torch import save_file


def base_model(config: MergeConfig, adapters: Path) -> str:
    """The base model of the file `adapters`: the given one, or the one that the checkpoint names.

    Raises FlagError for adapters of another or an unknown base model.
    """
    checkpoint = checkpoint_of(adapters)
    if checkpoint is None and config.pretrained_model_name_or_path is None:
        raise FlagError(BASE, None, f"needed, as {config.model_path} has no {RECORD}")
    if checkpoint is None:
        return config.pretrained_model_name_or_path
    base = config.pretrained_model_name_or_path or base_of(checkpoint, "model_path")
    check_base_model(checkpoint, base, "model_path")
    return base


def merge(config: MergeConfig) -> Path:
    """Writes the files of the format, all or none. Returns the folder.

    Raises FlagError if a model can't be used, or the folder can't be written to or another program works in it.
    """
    output = Path(config.output_dir)
    with FolderLock("output_dir", output) as lock:
        lock.take()
        config.check_empty()  # another merge may have ended meanwhile
        model_path = linked(Path(config.model_path), "model_path")
        check_tuned_place(model_path, "model_path")
        if config.format == "original" and not lora_file(model_path):
            base, field, adapters = str(model_path), "model_path", None  # a full checkpoint, only under other names
            checkpoint = checkpoint_of(model_path)
            made_from = base_of(checkpoint, field) if checkpoint else config.pretrained_model_name_or_path
        elif not lora_file(model_path) and (model_path / WEIGHTS).is_file():
            problem = "has all weights and no adapters, so there is nothing to merge; --format original fits it"
            raise FlagError("model_path", model_path, problem)
        else:
            file = find_lora(model_path, "model_path")
            base, field = base_model(config, file), BASE
            adapters, made_from = check_lora(base, file), base
        if config.format != "diffusers" and not isinstance(meta_transformer(base, field=field), Flux1.transformer):
            raise FlagError("format", config.format, f"{base} is no FLUX.1; choose diffusers")
        part = output / PART
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir()
            if config.format.startswith("lora"):
                _write_adapters(config, part, meta_transformer(base), adapters)
            else:
                _write_model(config, part, base, field, adapters)
            if made_from:
                write_base(part, made_from)
            usual_modes(part)
            for path in sorted(part.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, output / path.name)  # config.json last: a folder without it is no model
        except (OSError, SafetensorError) as error:
            raise FlagError("output_dir", output, f"can't be written: {error}") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return output


def _write_adapters(config: MergeConfig, folder: Path, transformer: FluxTransformer2DModel, adapters: Adapters) -> None:
    if config.dtype is not None:
        weights = {name: tensor.to(torch_dtype(config.dtype)) for name, tensor in adapters.weights.items()}
        adapters = replace(adapters, weights=weights)
    if config.format == "lora_kohya":
        save_file(kohya_adapters(adapters, transformer), folder / LORA_FILE, {"format": "pt"})
    else:
        alphas = {f"{layer}.alpha": torch.tensor(alpha) for layer, alpha in adapters.alphas.items()}
        FluxPipeline.save_lora_weights(folder, transformer_lora_layers=adapters.weights | alphas)


def _write_model(config: MergeConfig, folder: Path, base: str, field: str, adapters: Adapters | None) -> None:
    """Writes the transformer of `base` with the adapters in its weights. Holds one weight in memory at a time."""
    transformer, source = stored_transformer(base, field)
    original, dtype = config.format == "original", torch_dtype(config.dtype or "bf16")
    own = {name: tensor.shape for name, tensor in transformer.state_dict().items()}
    names = original_names(transformer) if original else {name: [name] for name in own}
    shapes = original_shapes(transformer) if original else own
    size = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    check_writable("output_dir", config.output_dir, needed=size)
    with open_transformer(source, transformer) as stored:

        def merged(name: str) -> torch.Tensor:
            weight, layer = stored(name).float(), name.removesuffix(".weight")
            if name.endswith(".weight") and adapters is not None and layer in adapters.alphas:
                weight = weight + adapters.change_of(layer)
            if not_finite({name: weight}):
                raise FlagError(field, base, f"wrong weights: {name} has values that aren't finite")
            return weight

        file = ORIGINAL_FILE if original else WEIGHTS
        write_weights(folder / file, shapes, dtype, lambda name: join(name, [merged(part) for part in names[name]]))
    if not original:
        transformer.save_config(folder)


@flag_errors("merge_lora.py")
def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Bad input prints one line and exits with status 2."""
    config = parse_dataclass(MergeConfig, argv, __doc__)
    written = sorted(path.name for path in merge(config).iterdir() if path.suffix == ".safetensors")
    print(f"written: {Path(config.output_dir, *written)}")


if __name__ == "__main__":
    main()
