"""The layout of the HPSv2 benchmark (arXiv 2306.09341): four styles with 800 prompts each.

{style}.json in the folder of the prompts is a JSON list. The picture of a style's prompt i is {style}/{i:05d}.jpg in
the folder of the pictures.
"""

import json
import os
from pathlib import Path

from fastvideo.cli import FlagError

STYLES = ("anime", "concept-art", "paintings", "photo")
SUFFIXES = (".jpg", ".png", ".jpeg", ".webp")


def is_benchmark(folder: Path) -> bool:
    """Whether the folder has prompts in this layout."""
    return any((folder / f"{style}.json").is_file() for style in STYLES)


def read_benchmark(folder: Path, field: str) -> dict[str, list[str]]:
    """The prompts of the styles that are in the folder, by style.

    Raises FlagError about the setting `field` for a folder without styles, and a file that is no list of prompts.
    """
    prompts = {}
    for style in STYLES:
        path = folder / f"{style}.json"
        if not path.exists():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FlagError(field, path, f"not a readable JSON file: {error}") from error
        if not isinstance(found, list) or not found or not all(isinstance(prompt, str) for prompt in found):
            raise FlagError(field, path, "expected a list of prompts")
        prompts[style] = found
    if not prompts:
        files = ", ".join(f"{style}.json" for style in STYLES)
        raise FlagError(field, folder, f"a folder of benchmark prompts holds {files}; found none of them")
    return prompts


def benchmark_entries(images: Path, prompts: dict[str, list[str]]) -> list[dict]:
    """Entries of a manifest for pictures in this layout. Where no suffix has a picture, `path` is the missing .jpg."""
    entries = []
    for style, texts in prompts.items():
        for i, prompt in enumerate(texts):
            paths = [images / style / f"{i:05d}{suffix}" for suffix in SUFFIXES]
            path = next(filter(os.path.isfile, paths), paths[0])  # unlike is_file() it raises for no path
            entries.append({"index": len(entries), "prompt": prompt, "path": path, "style": style})
    return entries
