"""Writes the index of a folder of prompt embeddings again, under any name, with the embeddings that are there.

    python scripts/preprocess/generate_json_index.py --embedding_dir data/rl_embeddings \\
        --output_path data/rl_embeddings/videos2caption.json

Preprocessing writes such an index itself, prompt.json; this one serves E-GRPO's commands, and folders of which some
embeddings were deleted. The captions come from prompt.json.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastvideo.cli import FlagError, flag, flag_errors, parse_dataclass
from fastvideo.dataset.latent_flux_rl_datasets import FOLDERS, read_index
from fastvideo.io.files import is_tensor_file, write_json, writing
from fastvideo.io.prompts import COLUMN_HELP, FORMATS, read_prompts
from fastvideo.io.words import counted


def make_index(folder: Path, output: Path, prompt_file: str | None = None, column: str | None = None) -> int:
    """Writes the entries of folder/prompt.json whose three files are whole; returns how many.

    prompt_file: only these captions; column: of them, see `read_prompts`. Raises FlagError if there is no prompt.json,
    if nothing is left, or if the index would lie apart from the embeddings, which training looks for beside it.
    """
    if output.resolve().parent != folder.resolve():
        raise FlagError("output_path", output, f"must lie in --embedding_dir {folder}")
    entries = read_index(folder / "prompt.json", "embedding_dir")
    if prompt_file is not None:
        wanted = set(read_prompts(prompt_file, "prompt_file", column).prompts)
        entries = [entry for entry in entries if entry["caption"] in wanted]
    whole = [e for e in entries if all(is_tensor_file(folder / name / e[key]) for key, name in FOLDERS.items())]
    if not whole:
        raise FlagError("embedding_dir", folder, f"none of {len(entries)} embeddings is there")
    write_json(output, whole)
    return len(whole)


@dataclass
class IndexConfig:
    """Settings of an index."""

    embedding_dir: str = flag("data/rl_embeddings", "folder of the embeddings", alias="data_dir")
    output_path: str | None = flag(None, "index to write (None: --output_name in the folder)")
    output_name: str = flag("videos2caption.json", "name of the index in the folder")
    prompt_file: str | None = flag(None, f"index only these prompts: {FORMATS}")
    prompt_column: str | None = flag(None, COLUMN_HELP)


@flag_errors("generate_json_index.py")
def main(argv: Sequence[str] | None = None) -> None:
    config = parse_dataclass(IndexConfig, argv, __doc__)
    folder = Path(config.embedding_dir)
    output = Path(config.output_path) if config.output_path else folder / config.output_name
    with writing("output_path", output, file=True):
        count = make_index(folder, output, config.prompt_file, config.prompt_column)
    print(f"{output}: {counted(count, 'prompt')}")


if __name__ == "__main__":
    main()
