"""Prompts to cached text embeddings: what training reads instead of running T5 and CLIP.

    python -m fastvideo.data_preprocess.preprocess_flux_embedding \\
        --model_path black-forest-labs/FLUX.1-dev --prompt_dir data/prompts.txt --output_dir data/rl_embeddings
    torchrun --nproc_per_node 8 -m fastvideo.data_preprocess.preprocess_flux_embedding ...      (same flags)

Writes `prompt_embed/`, `pooled_prompt_embeds/`, `text_ids/` and, at the very end, `prompt.json`: a list of
{"prompt_embed_path", "pooled_prompt_embeds_path", "text_ids", "caption"} whose file names lie in those folders.

A file's name is a hash of the text encoders, the caption, the length and the precision. So an embedding can't end up
under another caption however the prompt file is edited, a second run embeds only what is new, and another model never
finds the embeddings of the first.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvideo.cli import flag, parse_dataclass
from fastvideo.dataset.latent_flux_rl_datasets import FOLDERS
from fastvideo.io.devices import DTYPES, resolve_dtype
from fastvideo.io.files import is_tensor_file, read_prompts, write_json, write_tensor
from fastvideo.io.fingerprint import model_fingerprint
from fastvideo.io.processes import barrier, processes
from fastvideo.models.flux import encode_prompts, load_text_encoders

import torch
from tqdm import tqdm

ENCODERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


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
) -> Path:
    """Embeds the prompts of a text file into `output_dir`; every process calls it and gets the path of prompt.json.

    Embeddings that are there already and can be read are kept. Batches are fixed by the prompt file and dealt out to
    ranks, so neither the number of processes nor a restart changes a number. With several processes a process group
    must be initialised: rank 0 writes prompt.json when all are done, and nobody returns before it is there.

    Args:
        dtype: format of the encoders and of the stored embeddings, as in `resolve_dtype`.
        prompts_flag: the name of the flag that `prompts_file` came from, for messages.

    Raises:
        ValueError: one line, for a missing, empty or badly encoded prompt file, or a model that can't be loaded.
    """
    if batch_size < 1:
        raise ValueError(f"--batch_size {batch_size}: must be at least 1")
    if max_sequence_length < 1:
        raise ValueError(f"--max_sequence_length {max_sequence_length}: must be at least 1")
    dtype = resolve_dtype(dtype, device)
    if world_size > 1 and not torch.distributed.is_initialized():
        raise ValueError(f"{world_size} processes need a process group to wait on; start them with torchrun")
    prompt_file = read_prompts(prompts_file, prompts_flag)
    captions, output_dir = prompt_file.prompts, Path(output_dir)

    pipe, model_path = None, str(model_path)
    model = model_fingerprint(model_path, ENCODERS)
    if model is None:
        pipe = load_text_encoders(model_path, DTYPES[dtype])
        model = model_fingerprint(model_path, ENCODERS) or model_path

    def file_name(caption: str) -> str:
        return (
            hashlib.sha256(json.dumps([model, caption, max_sequence_length, dtype]).encode()).hexdigest()[:32] + ".pt"
        )

    def paths(caption: str) -> list[Path]:
        return [output_dir / folder / file_name(caption) for folder in FOLDERS.values()]

    for folder in FOLDERS.values():
        (output_dir / folder).mkdir(parents=True, exist_ok=True)
    batches = [captions[i : i + batch_size] for i in range(0, len(captions), batch_size)][rank::world_size]
    made = 0
    for batch in tqdm(batches, desc="embedding prompts", unit="batch", disable=rank != 0):
        missing = [caption for caption in batch if not all(is_tensor_file(path) for path in paths(caption))]
        if not missing:
            continue
        # A restart with all embeddings there loads no encoders: T5-XXL has 9 GB.
        pipe = (pipe or load_text_encoders(model_path, DTYPES[dtype])).to(device)
        prompt_embeds, pooled, text_ids = encode_prompts(pipe, batch, max_sequence_length)
        for row, caption in enumerate(batch):
            if caption in missing:
                for path, tensor in zip(paths(caption), (prompt_embeds[row], pooled[row], text_ids), strict=True):
                    write_tensor(path, tensor)
                made += 1
    barrier()

    index_path = output_dir / "prompt.json"
    if rank == 0:
        lost = [path for caption in captions for path in paths(caption) if not path.exists()]
        if lost:
            raise RuntimeError(f"{len(lost)} embeddings are missing after all processes finished, such as {lost[0]}")
        write_json(index_path, [dict.fromkeys(FOLDERS, file_name(c)) | {"caption": c} for c in captions])
        print(f"{prompts_file}: {prompt_file}; embeddings in {dtype}; {index_path}")
    print(f"rank {rank}: {made} embedded, {sum(map(len, batches)) - made} were there")
    barrier()
    return index_path


@dataclass
class PreprocessConfig:
    """Embeds prompts for training."""

    model_path: str = flag("data/tiny_flux", "FLUX pipeline that has the text encoders: a folder or a hub id")
    prompt_dir: str = flag("data/prompts.txt", "text file with one prompt a line (the name is the reference's)")
    output_dir: str = flag("data/rl_embeddings", "where embeddings and prompt.json go")
    batch_size: int = flag(8, "prompts embedded at a time")
    max_sequence_length: int = flag(512, "T5 tokens; cut to what the model's tokenizer declares")
    dtype: str = flag("auto", "precision of the encoders and the stored embeddings: fp32, bf16, fp16 or auto")
    device: str = flag("auto", "cpu, cuda, cuda:1, ... or auto")


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
        )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
