"""Reads metrics.jsonl, one line of JSON per iteration."""

import json
from pathlib import Path


def read_metrics(path: Path) -> tuple[list[dict], int]:
    """The rows of metrics.jsonl in order of step, and the number of unreadable lines.

    A running training may be in the middle of its last line, a killed one may have left half a line. A step that was
    trained again after a resume counts once, with its last values.
    """
    rows, broken = {}, 0
    for i, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows[int(row.get("step", i))] = row
        except (ValueError, AttributeError, TypeError):
            broken += 1
    return [rows[step] for step in sorted(rows)], broken
