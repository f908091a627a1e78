"""The layout of the HPSv2 benchmark (arXiv 2306.09341): four styles, 800 prompts each.

Prompts lie in {folder}/{style}.json, a JSON list each. The picture of a style's prompt i is {style}/{i:05d}.jpg in the
folder of the pictures.
"""

import json
import os
from pathlib import Path

STYLES = ("anime", "concept-art", "paintings", "photo")
SUFFIXES = (".jpg", ".png", ".jpeg", ".webp")


def read_benchmark(folder: Path, flag: str) -> dict[str, list[str]]:
    """{style: prompts} of the styles that are there.

    Raises ValueError, one line that names --`flag`, for a folder with none, and a file that is no list of prompts.
    """
    prompts = {}
    for style in STYLES:
        path = folder / f"{style}.json"
        if not path.exists():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--{flag} {path}: not a readable JSON file: {error}") from error
        if not isinstance(found, list) or not found or not all(isinstance(prompt, str) for prompt in found):
            raise ValueError(f"--{flag} {path}: expected a list of prompts")
        prompts[style] = found
    if not prompts:
        files = ", ".join(f"{style}.json" for style in STYLES)
        raise ValueError(f"--{flag} {folder}: a folder of benchmark prompts holds {files}; found none of them")
    return prompts


def benchmark_entries(images: Path, prompts: dict[str, list[str]]) -> list[dict]:
    """Entries of a manifest for pictures in this layout; `path` is the .jpg where there is no picture of any suffix."""
    entries = []
    for style, texts in prompts.items():
        for i, prompt in enumerate(texts):
            paths = [images / style / f"{i:05d}{suffix}" for suffix in SUFFIXES]
            path = next(filter(os.path.isfile, paths), paths[0])  # unlike is_file() it raises for no path
            entries.append({"index": len(entries), "prompt": prompt, "path": path, "style": style})
    return entries
