"""A hook of mkdocs: the README becomes the first page, and files outside docs/ that a page links to come along."""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
DOCS, README = ROOT / "docs", ROOT / "README.md"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")  # in Markdown; the path alone, without an anchor


def place_of(target: Path) -> str:
    """Where a file of the repository is in the site. Pages outside docs/ are shown as text."""
    if target == README:
        return "index.md"
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    return f"repository/{target.relative_to(ROOT).as_posix()}{'.txt' if target.suffix == '.md' else ''}"


def on_files(files: Files, config: Any) -> Files:
    """Adds the first page, and every file outside docs/ that a page links to."""
    added = {README}
    for page in (README, *DOCS.glob("*.md")):
        added |= {(page.parent / link).resolve() for link in LINK.findall(page.read_text(encoding="utf-8"))}
    for target in sorted(path for path in added if path == README or not path.is_relative_to(DOCS)):
        files.append(File.generated(config, place_of(target), content=target.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns a page's links into links within the site."""
    folder = ROOT if page.file.src_uri == "index.md" else DOCS
    return LINK.sub(lambda link: os.path.relpath(place_of((folder / link[1]).resolve())), markdown)
