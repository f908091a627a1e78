"""Scores of pictures: a manifest of sample_flux.py, or one picture, with any of the registered reward models.

    python -m fastvideo.eval.eval_reward --manifest outputs/tuned/manifest.json --reward_model_type hpsv2,pick_score
    python -m fastvideo.eval.eval_reward --manifest outputs/tuned/manifest.json \\
        --baseline_manifest outputs/base/manifest.json
    python -m fastvideo.eval.eval_reward --image cat.png --prompt "a cat" --reward_model_type image_reward

For a manifest it writes beside `--output_json` X.json
    X.json            [{"index", "image", "prompt", "reward": {Model: score}}], image relative to it; null: failed
    X_mean.txt        the means, one line a model
    X_summary.json    means, standard errors clustered by prompt, and what was left out
    X_baseline.json   with a baseline manifest: its scores; X_summary.json then has the paired differences too
Granular models add their components as {Model}_{component}. Pictures that can't be read are named and left out, failed
scores are counted and never averaged in; either makes the exit status 1. Bad input makes it 2.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo.config import RewardConfig, flag, parse_dataclass
from fastvideo.eval.statistics import mean_and_error
from fastvideo.models.reward_model.utils import RewardModel, build_reward_models, compute_reward, resolve_reward_spec
from fastvideo.utils.files import write_bytes, write_json

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm


@contextmanager
def _own_flag_names() -> Iterator[None]:
    """Errors of the registry speak of --reward_model, training's flag; here it is --reward_model_type."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("--reward_model ", "--reward_model_type ")) from error


@dataclass
class EvalConfig(RewardConfig):
    """Settings of an evaluation."""

    manifest: str | None = flag(None, "manifest of pictures, as sample_flux.py writes it")
    image: str | None = flag(None, "score this one picture instead of a manifest; needs --prompt")
    prompt: str | None = flag(None, "prompt of --image")
    reward_model_type: str = flag("all", "reward models: all, a name or a comma list, as in training's --reward_model")
    output_json: str | None = flag(None, "scores to write (None: {manifest}_scores.json beside the manifest)")
    baseline_manifest: str | None = flag(
        None, "pictures of the base model for the same prompts, for paired differences"
    )
    device: str = flag("auto", "cpu, cuda, cuda:1, ... or auto; --reward_device goes before it")

    # The registry asks for these too, but they decide nothing here: scores aren't summed, and training isn't under way.
    hps_weight = clip_score_weight = image_reward_weight = pick_score_weight = unified_reward_weight = 1.0
    granular_schedule, granular_gamma = "linear", None

    def __post_init__(self) -> None:
        if (self.manifest is None) == (self.image is None):
            raise ValueError("--manifest, --image: give one of them")
        if (self.image is None) != (self.prompt is None):
            raise ValueError("--image, --prompt: they go together")
        if self.baseline_manifest is not None and self.manifest is None:
            raise ValueError("--baseline_manifest: needs --manifest")
        if self.reward_batch_size < 1:
            raise ValueError(f"--reward_batch_size {self.reward_batch_size}: must be at least 1")
        with _own_flag_names():
            resolve_reward_spec(self)

    @property
    def reward_model(self) -> str:
        """The name under which the registry looks for it."""
        return self.reward_model_type

    @property
    def granular_end_weights(self) -> list[float]:
        return self.granular_start_weights


@dataclass(frozen=True)
class Scores:
    """Scores of the readable pictures of a manifest."""

    entries: list[dict[str, Any]]  # index, prompt, path (of the picture), reward {model or component: float or None}
    skipped: list[dict[str, str]]  # image, problem
    models: list[str]  # the reward models' names, without components

    @property
    def failed(self) -> int:
        """Pictures for which at least one model gave no score."""
        return sum(any(entry["reward"][model] is None for model in self.models) for entry in self.entries)


def read_manifest(path: Path, flag_name: str) -> list[dict[str, Any]]:
    """The entries of a manifest with `path` (of the picture), `prompt` and `index` (the position where it has none).

    Raises ValueError, one line, for a file that is missing, malformed or empty, and for an index that comes twice.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--{flag_name} {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"--{flag_name} {path}: not a JSON file: {error}") from error
    if not isinstance(found, list) or not found:
        raise ValueError(f"--{flag_name} {path}: expected a list with at least one entry")
    entries = []
    for position, entry in enumerate(found):
        keys = entry if isinstance(entry, dict) else {}
        if not isinstance(keys.get("image"), str) or not isinstance(keys.get("prompt"), str):
            raise ValueError(f'--{flag_name} {path}: entry {position} has no text under "image" and "prompt"')
        index = keys.get("index", position)
        if not isinstance(index, int):
            raise ValueError(f"--{flag_name} {path}: entry {position} has the index {index!r}, not a whole number")
        entries.append({"index": index, "prompt": keys["prompt"], "path": path.parent / keys["image"]})
    if len({entry["index"] for entry in entries}) < len(entries):
        raise ValueError(f"--{flag_name} {path}: an index comes twice")
    return entries


def _open(path: Path) -> Image.Image | str:
    """The picture in RGB, or what is wrong with it."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        return "no such file"
    except (OSError, SyntaxError, ValueError) as error:  # no picture, a truncated one, a broken PNG
        return f"not a readable picture: {error}"


def score(entries: Sequence[dict[str, Any]], models: dict[str, RewardModel], batch_size: int) -> Scores:
    """Scores pictures in batches; those that can't be read are named and left out."""
    weights = dict.fromkeys(models, 1.0)  # only the single scores are used, not their sum
    scored, skipped = [], []
    for start in tqdm(range(0, len(entries), batch_size), desc="scoring", unit="batch"):
        batch = [(entry, _open(entry["path"])) for entry in entries[start : start + batch_size]]
        for entry, problem in batch:
            if isinstance(problem, str):
                skipped.append({"image": str(entry["path"]), "problem": problem})
                print(f"skipped {entry['path']}: {problem}")
        batch = [(entry, image) for entry, image in batch if not isinstance(image, str)]
        if not batch:
            continue
        prompts = [entry["prompt"] for entry, _ in batch]
        _, _, found, _ = compute_reward([image for _, image in batch], prompts, models, weights)
        for row, (entry, _) in enumerate(batch):
            reward = {key: float(v[row]) if math.isfinite(v[row]) else None for key, v in found.items()}
            scored.append({**entry, "reward": reward})
    return Scores(scored, skipped, list(models))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def summarize(scores: Scores, baseline: Scores | None = None) -> dict[str, Any]:
    """Means, standard errors clustered by prompt and counts; with a baseline the paired differences (this - baseline).

    A pair is a picture of each side with the same index. Raises ValueError when two such have different prompts, or
    there is no pair at all.
    """
    there = {entry["index"]: entry for entry in baseline.entries} if baseline else {}
    pairs = [(entry, there[entry["index"]]) for entry in scores.entries if entry["index"] in there]
    for entry, other in pairs:
        if entry["prompt"] != other["prompt"]:
            raise ValueError(
                f"--baseline_manifest: index {entry['index']} is {other['prompt']!r} there, {entry['prompt']!r} here; "
                "sample both with one prompt file"
            )
    if baseline and not pairs:
        raise ValueError("--baseline_manifest: no index in common with --manifest")

    rows = {}
    for key in scores.entries[0]["reward"] if scores.entries else ():
        known = [entry for entry in scores.entries if entry["reward"][key] is not None]
        mean, error = mean_and_error([e["reward"][key] for e in known], [e["prompt"] for e in known])
        row = {"n": len(known), "failed": len(scores.entries) - len(known)}
        row |= {"mean": _number(mean), "standard_error": _number(error)}
        if baseline:
            both = [(a, b) for a, b in pairs if a["reward"][key] is not None and b["reward"].get(key) is not None]
            before = np.array([b["reward"][key] for _, b in both], dtype=np.float64)
            change = np.array([a["reward"][key] for a, _ in both], dtype=np.float64) - before
            prompts = [a["prompt"] for a, _ in both]
            row["pairs"] = len(both)
            for name, values in (("baseline", before), ("difference", change)):
                mean, error = mean_and_error(values, prompts)
                row |= {f"{name}_mean": _number(mean), f"{name}_standard_error": _number(error)}
            row["win_rate"] = float((change > 0).mean()) if both else None
        rows[key] = row
    sides = [side for side in (scores, baseline) if side]
    return {
        "images": len(scores.entries) + len(scores.skipped),
        "successful": len(scores.entries) - scores.failed,
        "prompts": len({entry["prompt"] for entry in scores.entries}),
        "skipped": [skip for side in sides for skip in side.skipped],
        "models": rows,
    }


def mean_lines(scores: Scores) -> str:
    """The content of *_mean.txt: how many pictures all models scored, then each model's mean over its own scores."""
    lines = [f"Total Successful Samples: {len(scores.entries) - scores.failed}"]
    for model in scores.models:
        values = [entry["reward"][model] for entry in scores.entries if entry["reward"][model] is not None]
        lines.append(f"{model} Mean Reward: {float(np.mean(values)) if values else math.nan}")
    return "\n".join(lines) + "\n"


def table(summary: dict[str, Any]) -> str:
    """The summary for reading."""

    def cell(row: dict[str, Any], name: str) -> str:
        mean, error = row[f"{name}mean"], row[f"{name}standard_error"]
        return "-" if mean is None else f"{mean:.4f}" + ("" if error is None else f" ± {error:.4f}")

    rows = [["model", "n", "failed", "mean ± s.e.", "baseline", "difference", "wins"]]
    for key, row in summary["models"].items():
        paired = ["", "", ""]
        if "pairs" in row:
            wins = "-" if row["win_rate"] is None else f"{row['win_rate']:.0%}"
            paired = [cell(row, "baseline_"), cell(row, "difference_"), wins]
        rows.append([key, str(row["n"]), str(row["failed"]), cell(row, ""), *paired])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _write_scores(path: Path, scores: Scores) -> None:
    folder = path.absolute().parent
    entries = [
        {
            "index": entry["index"],
            "image": Path(os.path.relpath(entry["path"].absolute(), folder)).as_posix(),
            "prompt": entry["prompt"],
            "reward": entry["reward"],
        }
        for entry in scores.entries
    ]
    write_json(path, entries)


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Scores what `config` names, writes the files and prints a table; returns the summary (see `summarize`).

    Raises:
        ValueError: one line, for bad flags, a malformed manifest, missing reward files, or not one readable picture.
    """
    if config.manifest:
        entries = read_manifest(Path(config.manifest), "manifest")
    else:
        entries = [{"index": 0, "prompt": config.prompt, "path": Path(config.image)}]
    before = read_manifest(Path(config.baseline_manifest), "baseline_manifest") if config.baseline_manifest else None
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with _own_flag_names():
        models, _ = build_reward_models(config, device, evaluation=True)
    scores = score(entries, models, config.reward_batch_size)
    if not scores.entries:
        raise ValueError(f"--{'manifest' if config.manifest else 'image'}: not one picture could be read")
    baseline = score(before, models, config.reward_batch_size) if before else None
    summary = summarize(scores, baseline)

    output = config.output_json
    if output is None and config.manifest:
        output = Path(config.manifest).with_name(f"{Path(config.manifest).stem}_scores.json")
    if output is not None:
        output = Path(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        _write_scores(output, scores)
        if baseline:
            _write_scores(output.with_name(f"{output.stem}_baseline.json"), baseline)
        write_bytes(output.with_name(f"{output.stem}_mean.txt"), mean_lines(scores).encode())
        write_json(output.with_name(f"{output.stem}_summary.json"), summary)
    print(table(summary))
    print(
        f"{summary['successful']} of {summary['images']} pictures scored by all models" + f": {output}" * bool(output)
    )
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 when a picture or a score is missing."""
    summary = evaluate(parse_dataclass(EvalConfig, argv, __doc__))
    return int(summary["successful"] < summary["images"] or bool(summary["skipped"]))


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
