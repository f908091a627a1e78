"""Writes the index of a folder of prompt embeddings again, under any name, with the embeddings that are there.

    python scripts/preprocess/generate_json_index.py --embedding_dir data/rl_embeddings \\
        --output_path data/rl_embeddings/videos2caption.json

Preprocessing writes such an index itself, prompt.json; this one serves E-GRPO's commands, and folders of which some
embeddings were deleted. The captions come from prompt.json.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fastvideo.cli import FlagError, flag_errors
from fastvideo.dataset.latent_flux_rl_datasets import FOLDERS, read_index
from fastvideo.io.files import is_tensor_file, write_json
from fastvideo.io.prompts import read_prompts


def make_index(folder: Path, output: Path, prompt_file: str | None = None) -> int:
    """Writes the entries of folder/prompt.json whose three files are whole; returns how many.

    prompt_file: only these captions. Raises FlagError if there is no prompt.json, if nothing is left, or if the index
    would lie apart from the embeddings, which training looks for beside it.
    """
    if output.resolve().parent != folder.resolve():
        raise FlagError("output_path", output, f"must lie in --embedding_dir {folder}")
    entries = read_index(folder / "prompt.json", "embedding_dir")
    if prompt_file is not None:
        wanted = set(read_prompts(prompt_file, "prompt_file").prompts)
        entries = [entry for entry in entries if entry["caption"] in wanted]
    whole = [e for e in entries if all(is_tensor_file(folder / name / e[key]) for key, name in FOLDERS.items())]
    if not whole:
        raise FlagError("embedding_dir", folder, f"none of {len(entries)} embeddings is there")
    write_json(output, whole)
    return len(whole)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedding_dir", "--data_dir", type=Path, default=Path("data/rl_embeddings"))
    parser.add_argument("--output_path", type=Path, help="index to write (default: --output_name in the folder)")
    parser.add_argument("--output_name", default="videos2caption.json")
    parser.add_argument("--prompt_file", help="text file: index only these prompts")
    given = parser.parse_args(argv)
    output = given.output_path or given.embedding_dir / given.output_name
    with flag_errors("generate_json_index.py"):
        count = make_index(given.embedding_dir, output, given.prompt_file)
    print(f"{output}: {count} prompts")


if __name__ == "__main__":
    main()
