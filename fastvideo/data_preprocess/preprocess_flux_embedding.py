"""Embeds prompts and stores the text embeddings, so that training doesn't run T5 and CLIP.

    python -m fastvideo.data_preprocess.preprocess_flux_embedding \\
        --model_path black-forest-labs/FLUX.1-dev --prompt_dir data/prompts.txt --output_dir data/rl_embeddings
    torchrun --nproc_per_node 8 -m fastvideo.data_preprocess.preprocess_flux_embedding ...      (same flags)

Writes `prompt_embed/`, `pooled_prompt_embeds/`, `text_ids/` and, at the very end, `prompt.json`: a list of
{"prompt_embed_path", "pooled_prompt_embeds_path", "text_ids", "caption"} whose file names lie in those folders. What
the prompt file says about a prompt in other keys or columns is its "metadata", for rewards that need it; `weight` says
how often training takes the prompt, if not once per epoch. FLUX.2 has no pooled embedding; for its guidance,
"negative_prompt_embed_path" is the file of the empty prompt.

A file's name is a hash of the text encoders, the caption, the length and the number format. So an embedding stays with
its caption however the prompt file is edited, a second run embeds only new captions, and another model never finds the
first model's embeddings.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvideo.cli import check_fields, flag, flag_errors, parse_dataclass, parse_first
from fastvideo.io.devices import DTYPES
from fastvideo.io.prompts import COLUMN_HELP, FORMATS, WEIGHT, read_prompts


@dataclass
class PreprocessConfig:
    """Embeds prompts for training."""

    model_path: str = flag("data/flux", "FLUX pipeline that has the text encoders: a folder or a hub id")
    prompt_dir: str = flag(
        "data/prompts.txt",
        f"prompts: {FORMATS} (the names are the references')",
        alias="prompt_path",
    )
    prompt_column: str | None = flag(None, COLUMN_HELP)
    output_dir: str = flag("data/rl_embeddings", "where embeddings and prompt.json go")
    batch_size: int = flag(8, "prompts embedded at a time", at_least=1)
    max_sequence_length: int = flag(
        512, "T5 tokens; cut to what the model's tokenizer declares, and to 256 for FLUX.1-schnell", at_least=1
    )
    dtype: str = flag(
        "auto",
        "number format of the encoders and the stored embeddings; auto: bf16 on a GPU, fp32 on the CPU",
        choices=["auto", *DTYPES],
    )
    device: str = flag("auto", "cpu, cuda (the process's own), cuda:1, ... or auto")

    def __post_init__(self) -> None:
        check_fields(self)


if __name__ == "__main__":  # before the slow imports: --help and a refused flag answer at once
    parse_first(PreprocessConfig, doc=__doc__)

from fastvideo.dataset.latent_flux_rl_datasets import FOLDERS, NEGATIVE, TENSORS
from fastvideo.io.devices import resolve_dtype, torch_dtype
from fastvideo.io.files import is_tensor_file, write_json, write_tensor, writing
from fastvideo.io.fingerprint import model_fingerprint
from fastvideo.io.messages import say
from fastvideo.io.processes import Processes, processes
from fastvideo.io.resumable import Store, digest, finish
from fastvideo.io.words import counted
from fastvideo.models.family import Family
from fastvideo.models.pretrained import BASE, CutPrompts, family_of, load_text_encoders, longest_prompt

import torch


class Embeddings(Store[str, tuple[torch.Tensor, ...]]):
    """Files of a caption's embeddings, one in each folder, named by a hash of what they are made of.

    keys: those of FOLDERS that the model's family has.
    """

    def __init__(self, folder: Path, family: Family, settings: tuple[str, int, str]) -> None:
        """settings: all that decides an embedding besides its caption: model, length, number format."""
        self.folder, self.settings = folder, settings
        self.keys = [key for key, name in zip(FOLDERS, TENSORS, strict=True) if name in family.embeddings]
        for key in self.keys:
            (folder / FOLDERS[key]).mkdir(parents=True, exist_ok=True)

    def file_name(self, caption: str) -> str:
        """The name of the caption's file in each folder."""
        model, length, dtype = self.settings
        return digest([model, caption, length, dtype], 32) + ".pt"

    def paths(self, caption: str) -> list[Path]:
        """The caption's files, in the order of `keys`."""
        return [self.folder / FOLDERS[key] / self.file_name(caption) for key in self.keys]

    def has(self, caption: str) -> bool:
        return all(is_tensor_file(path) for path in self.paths(caption))

    def keep(self, caption: str, tensors: tuple[torch.Tensor, ...]) -> None:
        for path, tensor in zip(self.paths(caption), tensors, strict=True):
            write_tensor(path, tensor)


def embed_prompts(
    model_path: str,
    prompts_file: str | Path,
    output_dir: str | Path,
    *,
    batch_size: int = 8,
    max_sequence_length: int = 512,
    dtype: str = "auto",
    device: str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    prompts_flag: str = "prompts_file",
    prompt_column: str | None = None,
) -> Path:
    """Embeds prompts into `output_dir`; all processes call it and get the path of prompt.json.

    Readable embeddings are kept. Neither the number of processes nor a restart changes a number (see `Store`). With
    several processes a process group must be initialised: rank 0 writes prompt.json when all processes are done, and no
    process returns earlier.

    Args:
        dtype: format of the encoders and of the stored embeddings, as in `resolve_dtype`.
        prompts_flag: the name of the flag that `prompts_file` came from, for messages.
        prompt_column: see `read_prompts`.

    Raises:
        ValueError: one line, for a missing, empty or badly encoded prompt file, or a model that can't be loaded.
    """
    dtype = resolve_dtype(dtype, device)
    if world_size > 1 and not torch.distributed.is_initialized():
        raise ValueError(f"{world_size} processes need a process group to wait on; start them with torchrun")
    prompt_file = read_prompts(prompts_file, prompts_flag, prompt_column)
    captions, output_dir = prompt_file.prompts, Path(output_dir)

    with writing("output_dir", output_dir):
        pipe, model_path = None, str(model_path)
        family = family_of(model_path)
        encoders = (*family.text_encoders, *family.tokenizers)
        model = model_fingerprint(model_path, encoders)
        if model is None:
            pipe = load_text_encoders(model_path, torch_dtype(dtype))
            model = model_fingerprint(model_path, encoders) or model_path

        length = min(max_sequence_length, longest_prompt(model_path))
        store = Embeddings(output_dir, family, (model, length, dtype))
        here, cut = Processes(rank, world_size, device), CutPrompts(family)

        def embed(batch: Sequence[str]) -> list[tuple[torch.Tensor, ...]]:
            nonlocal pipe
            # A run that finds all embeddings loads no encoders: T5-XXL has 9 GB.
            pipe = (pipe or load_text_encoders(model_path, torch_dtype(dtype))).to(device)
            cut.look(pipe, batch, length)
            *rows, text_ids = family.encode_prompts(pipe, batch, length).values()
            return [(*row, text_ids) for row in zip(*rows, strict=True)]

        all_captions = [*captions, *[""] * family.classifier_free]  # the empty prompt, for guidance
        made, there = store.complete(all_captions, batch_size, embed, here, "embedding prompts")
        cut.warn()
        index_path = output_dir / "prompt.json"

        def write() -> None:
            lost = [path for caption in all_captions for path in store.paths(caption) if not path.exists()]
            if lost:
                missing = counted(len(lost), "embedding")
                raise RuntimeError(f"after all processes finished, {missing} can't be found, such as {lost[0]}")
            entries = [dict.fromkeys(store.keys, store.file_name(c)) | {"caption": c} for c in captions]
            for entry in entries if family.classifier_free else ():
                entry[NEGATIVE] = store.file_name("")
            for entry, metadata, weight in zip(entries, prompt_file.metadata, prompt_file.weights, strict=True):
                entry |= {"metadata": metadata} if metadata else {}
                entry |= {WEIGHT: weight} if weight != 1 else {}
            _tell_of_replaced(index_path, captions, prompts_file)
            write_json(index_path, entries)
            print(f"{prompts_file}: {prompt_file}; embeddings in {dtype}; {index_path}")

        print(f"rank {rank}: {made} embedded, {there} were there")
        finish(here, write)
        return index_path


def _tell_of_replaced(index_path: Path, captions: Sequence[str], prompts_file: str | Path) -> None:
    """Says which prompts training will no longer use, if prompt.json lists some that `captions` lacks."""
    try:
        before = [entry["caption"] for entry in json.loads(index_path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError):  # none, or nothing that training could use
        return
    if lost := len({*before} - {*captions}):
        say(
            f"note: {index_path} listed {counted(len(before), 'prompt')}, {lost} of which {prompts_file} lacks; their "
            f"embeddings stay, but training now uses the {counted(len(captions), 'prompt')} of {prompts_file}"
        )


@flag_errors("preprocess_flux_embedding.py", {BASE: "model_path"})
def main(argv: Sequence[str] | None = None) -> Path:
    """The command line; returns the path of prompt.json."""
    config = parse_dataclass(PreprocessConfig, argv, __doc__)
    with processes(config.device) as here:
        return embed_prompts(
            config.model_path,
            config.prompt_dir,
            config.output_dir,
            batch_size=config.batch_size,
            max_sequence_length=config.max_sequence_length,
            dtype=config.dtype,
            device=here.device,
            rank=here.rank,
            world_size=here.world_size,
            prompts_flag="prompt_dir",
            prompt_column=config.prompt_column,
        )


if __name__ == "__main__":
    main()
