"""Statistics of an evaluation: means, paired differences against a baseline, and the texts and tables made of them."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fastvideo.cli import FlagError
from fastvideo.eval.hacking import MIN_PROMPTS, signs
from fastvideo.eval.statistics import RIGHT, bootstrap_interval, mean_and_error, win_rate
from fastvideo.io.scores import score_names

import numpy as np


@dataclass(frozen=True)
class Scores:
    """Scores of the readable pictures of a manifest.

    Attributes:
        entries: see `read_scores`. skipped: {"image", "problem"} of each unreadable picture. models: `reward_schema`.
    """

    entries: list[dict[str, Any]]
    skipped: list[dict[str, str]]
    models: dict[str, dict[str, Any]]

    @property
    def successful(self) -> list[dict[str, Any]]:
        """Pictures that all models scored."""
        return [entry for entry in self.entries if all(entry["reward"][model] is not None for model in self.models)]


def finite(value: float) -> float | None:
    """The value, None if it is not finite: for JSON, which has no NaN."""
    return value if math.isfinite(value) else None


def _interval(values: Sequence[float], prompts: Sequence[str]) -> list[float] | None:
    low, high = bootstrap_interval(values, prompts)
    return [low, high] if math.isfinite(low) else None


def _rows(entries: Sequence[dict[str, Any]], pairs: Sequence[tuple[dict, dict]] | None, where: str) -> dict[str, dict]:
    """Statistics of each score (where: "reward") or measure ("measures"). pairs: (entry, the baseline's entry)."""
    rows = {}
    for name in dict.fromkeys(name for entry in entries for name in entry[where]):
        known = [entry for entry in entries if entry[where].get(name) is not None]
        values, prompts = [entry[where][name] for entry in known], [entry["prompt"] for entry in known]
        mean, error = mean_and_error(values, prompts)
        row = {"n": len(known), "failed": sum(name in e[where] and e[where][name] is None for e in entries)}
        row |= {"mean": finite(mean), "standard_error": finite(error), "interval": _interval(values, prompts)}
        if pairs is not None:
            both = [(a, b) for a, b in pairs if None not in (a[where].get(name), b[where].get(name))]
            before = np.array([b[where][name] for _, b in both], dtype=np.float64)
            change = np.array([a[where][name] for a, _ in both], dtype=np.float64) - before
            prompts = [a["prompt"] for a, _ in both]
            row |= {"pairs": len(both), "pair_prompts": len(set(prompts))}
            for part, values in (("baseline", before), ("difference", change)):
                mean, error = mean_and_error(values, prompts)
                row |= {f"{part}_mean": finite(mean), f"{part}_standard_error": finite(error)}
            row["baseline_deviation"] = float(before.std()) if both else None  # over pictures, for `signs`
            row["difference_interval"] = _interval(change, prompts)
            row["win_rate"] = win_rate(change) if both else None
        rows[name] = row
    return rows


def pair_up(entries: Sequence[dict], others: Sequence[dict]) -> list[tuple[dict, dict]]:
    """Pairs of an entry and the baseline's entry of the same index.

    Raises FlagError if the prompts of a pair or their metadata differ, or if there is no pair.
    """
    there = {entry["index"]: entry for entry in others}
    pairs = [(entry, there[entry["index"]]) for entry in entries if entry["index"] in there]
    for entry, other in pairs:
        if entry["prompt"] != other["prompt"]:
            raise FlagError(
                "baseline_manifest",
                None,
                f"index {entry['index']} is {other['prompt']!r} there, {entry['prompt']!r} here; sample both with one "
                "prompt file",
            )
        metadata = [found["metadata"] for found in (entry, other) if "metadata" in found]
        if len(metadata) == 2 and metadata[0] != metadata[1]:
            problem = f"index {entry['index']}, {entry['prompt'][:60]!r}, has other metadata there, so rewards may ask "
            raise FlagError("baseline_manifest", None, f"{problem}something else; sample both with one prompt file")
    if not pairs:
        raise FlagError("baseline_manifest", None, "no index in common with --manifest")
    return pairs


def summarize(scores: Scores, baseline: Scores | None = None, trained: Iterable[str] | None = None) -> dict[str, Any]:
    """Means, standard errors clustered by prompt, bootstrap intervals over prompts, and counts. Checks come first.

    A baseline adds paired differences (scores - baseline) and the win rate. A pair has two pictures of the same index.

    trained: names of the models that were trained on; the other models are held out. None: nothing is known about it.
    Raises FlagError, see `pair_up`.
    """
    pairs = pair_up(scores.entries, baseline.entries) if baseline else []

    def of(style: str | None) -> dict[str, dict[str, dict]]:
        chosen = [entry for entry in scores.entries if style in (None, entry.get("style"))]
        both = [pair for pair in pairs if style in (None, pair[0].get("style"))] if baseline else None
        models = _rows(chosen, both, "reward")
        for name, known in score_names(list(models), scores.models).items():
            models[name] |= {"kind": known.kind, "held_out": None if trained is None else known.model not in trained}
        models = dict(sorted(models.items(), key=lambda item: item[1]["kind"] != "check"))
        measures = _rows(chosen, both, "measures")
        for row in measures.values():
            row |= {"kind": "measure", "held_out": None}
        return {"models": models, "measures": measures}

    sides = [side for side in (scores, baseline) if side]
    whole = of(None)
    rows = whole["models"] | whole["measures"]
    return {
        "images": len(scores.entries) + len(scores.skipped),
        "successful": len(scores.successful),
        "prompts": len({entry["prompt"] for entry in scores.entries}),
        "skipped": [skip for side in sides for skip in side.skipped],
        **whole,
        "signs": signs(rows),
        "too_few_prompts_for_signs": [k for k, row in rows.items() if 0 < row.get("pair_prompts", 0) < MIN_PROMPTS],
        "styles": {style: of(style) for style in dict.fromkeys(e["style"] for e in scores.entries if "style" in e)},
    }


def mean_lines(scores: Scores) -> str:
    """The content of *_mean.txt: how many pictures all models scored, and each model's mean over these pictures."""
    lines = [f"Total Successful Samples: {len(scores.successful)}"]
    for model in scores.models:
        values = [entry["reward"][model] for entry in scores.successful]
        lines.append(f"{model} Mean Reward: {float(np.mean(values)) if values else math.nan}")
    return "\n".join(lines) + "\n"


def csv_lines(summary: dict[str, Any]) -> str:
    """The content of *.csv: one row per score, for all pictures and for each style. Unknown numbers are empty."""
    names = "kind held_out n failed mean standard_error interval pairs baseline_mean baseline_standard_error".split()
    names += "difference_mean difference_standard_error difference_interval win_rate".split()
    header = ["style", "score"]
    for name in names:
        header += [f"{name}_low", f"{name}_high"] if name.endswith("interval") else [name]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for style, part in {"all": summary, **summary["styles"]}.items():
        for score_name, row in (part["models"] | part["measures"]).items():
            cells = [style, score_name]
            for name in names:
                value = row.get(name)
                cells += (value or [None, None]) if name.endswith("interval") else [value]
            writer.writerow(cells)
    return text.getvalue()


def table(summary: dict[str, Any]) -> str:
    """The summary as a table for the terminal."""

    def cell(row: dict[str, Any], name: str) -> str:
        mean, error = row[f"{name}mean"], row[f"{name}standard_error"]
        digits = {"measure": ".3g", "check": ".2f"}.get(row["kind"], ".4f")
        return "-" if mean is None else f"{mean:{digits}}" + ("" if error is None else f" ± {error:{digits}}")

    rows = [["score", "n", "failed", "mean ± s.e.", "baseline", "difference", "wins"]]
    for style, part in {"": summary, **summary["styles"]}.items():
        for key, row in (part["models"] | part["measures"]).items():
            if style and row["kind"] not in ("reward", "check"):
                continue  # the CSV has them
            paired = ["", "", ""]
            if "pairs" in row:
                wins = "-" if row["win_rate"] is None else f"{row['win_rate']:.0%}"
                paired = [cell(row, "baseline_"), cell(row, "difference_"), wins]
            name = RIGHT if row["kind"] == "check" else key
            label = f"{style} {name}".strip() + " (held out)" * bool(row["held_out"])
            rows.append([label, str(row["n"]), str(row["failed"]), cell(row, ""), *paired])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
