"""Scores of pictures: a manifest of sample_flux.py, or one picture, with any of the registered reward models.

    python -m fastvideo.eval.eval_reward --manifest outputs/tuned/manifest.json --reward_model_type hpsv2,pick_score
    python -m fastvideo.eval.eval_reward --manifest outputs/tuned/manifest.json \\
        --baseline_manifest outputs/base/manifest.json
    python -m fastvideo.eval.eval_reward --image cat.png --prompt "a cat" --reward_model_type image_reward

    torchrun --nproc_per_node 8 -m fastvideo.eval.eval_reward ...        (same flags)

For a manifest it writes beside `--output_json` X.json
    X.json            [{"index", "image", "prompt", "reward": {Model: score}, "measures": {name: value}}], image
                      relative to it; null: failed
    X_mean.txt        the means over the pictures that all models scored, one line a model
    X.csv             a row a score: mean, standard error clustered by prompt, 95 % bootstrap interval; with a baseline
                      manifest paired differences and win rate too; with benchmark styles rows for each
    X_summary.json    the same, and what was left out
    X_baseline.json   with a baseline manifest: its scores
Granular models add their components as {Model}_{component}, and what they check as {Model}_right, 1 or 0 a picture:
right in everything, which comes first wherever scores are listed. `measures` (see hacking.py) show reward hacking:
appearance of each picture, and where prompts have several, their diversity. Pictures that can't be read are named and
left out, failed scores are counted and never averaged in; either makes the exit status 1. Bad input makes it 2, or
through torchrun 1.

A killed evaluation goes on where it stopped: until its end X.json's folder has hidden .part files with what was scored.
Meanwhile one of other pictures or with other flags for the same X.json is refused.
docs/evaluation.md has more.
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastvideo.cli import FlagError, check_fields, flag, flag_errors, parse_dataclass, parse_first
from fastvideo.models.reward_model.spec import RewardConfig, resolve_reward_spec

# Flags of the reference, and what they are called here.
OTHER_NAMES = {
    "prompt_file": "manifest",
    "single_img": "image",
    "single_img_prompt": "prompt",
    "batch_size": "reward_batch_size",
    "reward_model": "reward_model_type",
}


@dataclass
class EvalConfig(RewardConfig):
    """Settings of an evaluation."""

    manifest: str | None = flag(
        None,
        "pictures: a manifest of sample_flux.py, or with --benchmark_prompts a folder in the HPSv2 benchmark's layout",
    )
    image: str | None = flag(None, "score this one picture instead of a manifest; needs --prompt")
    prompt: str | None = flag(None, "prompt of --image")
    reward_model_type: str = flag("all", "reward models: all, a name or a comma list, as in training's --reward_model")
    output_json: str | None = flag(None, "scores to write (None: {manifest}_scores.json beside the manifest)")
    baseline_manifest: str | None = flag(
        None, "pictures of the base model for the same prompts and seeds, for paired differences"
    )
    benchmark_prompts: str | None = flag(
        None, "folder of HPSv2 benchmark prompts (anime.json, ...): manifests are folders of {style}/{number:05d}.jpg"
    )
    trained_rewards: str | None = flag(None, "--reward_model of the training; the other rewards count as held out")
    hacking_measures: bool = flag(True, "measure saturation, sharpness, high frequencies and diversity, too")
    device: str = flag("auto", "cpu, cuda (the process's own), cuda:1, ... or auto; --reward_device goes before it")
    prompt_file: str | None = flag(None, "another name of --manifest")
    single_img: str | None = flag(None, "another name of --image")
    single_img_prompt: str | None = flag(None, "another name of --prompt")
    batch_size: int | None = flag(None, "another name of --reward_batch_size")
    reward_model: str | None = flag(None, "another name of --reward_model_type")

    # The registry asks for these too, but they decide nothing here: training isn't under way.
    granular_schedule, granular_gamma = "linear", None

    def __post_init__(self) -> None:
        for other, name in OTHER_NAMES.items():
            if getattr(self, other) is not None:
                setattr(self, name, getattr(self, other))
        if (self.manifest is None) == (self.image is None):
            raise FlagError("manifest", self.manifest, "give either --manifest or --image")
        if (self.image is None) != (self.prompt is None):
            given = "image" if self.prompt is None else "prompt"
            raise FlagError(given, getattr(self, given), "--image and --prompt go together")
        if self.baseline_manifest is not None and self.manifest is None:
            raise FlagError("baseline_manifest", self.baseline_manifest, "needs --manifest")
        if self.benchmark_prompts is not None and self.manifest is None:
            raise FlagError("benchmark_prompts", self.benchmark_prompts, "needs --manifest, the folder of the pictures")
        check_fields(self)
        resolve_reward_spec(self, "reward_model_type")
        self.trained_keys()

    def trained_keys(self) -> set[str] | None:
        """The registry's names of `--trained_rewards`, those of weight 0 left out; None where it isn't given."""
        if self.trained_rewards is None:
            return None
        weights = resolve_reward_spec(self, "trained_rewards")
        return {key for key, weight in weights.items() if weight > 0}

    @property
    def granular_end_weights(self) -> list[float]:
        return self.granular_start_weights


if __name__ == "__main__":  # before the slow imports: --help and a refused flag answer at once
    parse_first(EvalConfig, doc=__doc__)

from fastvideo.eval.benchmark import benchmark_entries, read_benchmark
from fastvideo.eval.hacking import MIN_PROMPTS, diversity, signs
from fastvideo.eval.statistics import RIGHT, bootstrap_interval, mean_and_error, win_rate
from fastvideo.io.files import write_bytes, write_json
from fastvideo.io.processes import Processes, processes
from fastvideo.io.resumable import Journal, digest, finish
from fastvideo.io.scores import companion, reward_schema, score_names, write_scores
from fastvideo.models.reward_model.clip_base import CLIPReward
from fastvideo.models.reward_model.granular import RewardModel
from fastvideo.models.reward_model.utils import build_reward_models, compute_reward
from fastvideo.utils.picture_measures import appearance

import numpy as np
import torch.distributed as dist
from PIL import Image


@dataclass(frozen=True)
class Scores:
    """Scores of the readable pictures of a manifest."""

    # index, prompt, path (of the picture), style (of a benchmark), reward {model or component: float or None}, measures
    entries: list[dict[str, Any]]
    skipped: list[dict[str, str]]  # image, problem
    models: dict[str, dict[str, Any]]  # reward model -> its components and checks, see `reward_schema`

    @property
    def successful(self) -> list[dict[str, Any]]:
        """Pictures that all models scored."""
        return [entry for entry in self.entries if all(entry["reward"][model] is not None for model in self.models)]


def read_manifest(path: Path, field: str) -> list[dict[str, Any]]:
    """The entries of a manifest with `path` (of the picture), `prompt` and `index` (the position where it has none).

    Pictures are looked for relative to the manifest, then, as the reference writes them, to the working directory.
    Raises ValueError, one line, for a file that is missing, malformed or empty, and for an index that comes twice.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FlagError(field, path, error.strerror or str(error)) from error
    except ValueError as error:
        raise FlagError(field, path, f"not a JSON file: {error}") from error
    if not isinstance(found, list) or not found:
        raise FlagError(field, path, "expected a list with at least one entry")
    entries = []
    for position, entry in enumerate(found):
        keys = entry if isinstance(entry, dict) else {}
        if not isinstance(keys.get("image"), str) or not isinstance(keys.get("prompt"), str):
            raise FlagError(field, path, f'entry {position} has no text under "image" and "prompt"')
        index = keys.get("index", position)
        if not isinstance(index, int):
            raise FlagError(field, path, f"entry {position} has the index {index!r}, not a whole number")
        places = [path.parent / keys["image"], Path(keys["image"])]
        found_at = next(filter(os.path.isfile, places), places[0])  # unlike is_file() it raises for no path
        entries.append({"index": index, "prompt": keys["prompt"], "path": found_at})
        if isinstance(keys.get("style"), str):
            entries[-1]["style"] = keys["style"]
    if len({entry["index"] for entry in entries}) < len(entries):
        raise FlagError(field, path, "an index comes twice")
    return entries


def _open(path: Path) -> Image.Image | str:
    """The picture in RGB, or what is wrong with it."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        return "no such file"
    # no picture, a truncated one, a broken PNG, one that unpacks to gigabytes
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"not a readable picture: {error}"


@dataclass(eq=False)
class Batch:
    """Pictures that are scored together."""

    entries: Sequence[dict[str, Any]]

    @cached_property
    def content(self) -> list[list[str]]:
        """A hash of each picture's file, empty where it can't be read, and the picture's prompt."""
        return [[_file_hash(entry["path"]), entry["prompt"]] for entry in self.entries]


def _file_hash(path: Path) -> str:
    try:
        return sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError):  # no such file; a name that no file can have
        return ""


class ScoreJournal(Journal[Batch, list[dict[str, Any]]]):
    """The results of batches, one per picture: {"reward": {name: score}, "measures": {name: value}} or {"problem"}."""

    def __init__(self, output: Path | None, settings: str, purpose: list[Any]) -> None:
        """settings: text of all that decides a score, besides picture and prompt."""
        self.settings = settings
        super().__init__(output, purpose)

    def key(self, batch: Batch) -> str:
        return digest([self.settings, batch.content], 64)

    def lasts(self, result: list[dict[str, Any]]) -> bool:
        """A score that failed may succeed next time."""
        return all(math.isfinite(value) for found in result for value in found.get("reward", {}).values())


def _gather(value: Any, here: Processes) -> list[Any]:
    """The values of all processes."""
    found = [value] * here.world_size
    if here.world_size > 1:
        dist.all_gather_object(found, value)
    return found


def score(
    entries: Sequence[dict[str, Any]],
    models: dict[str, RewardModel],
    batch_size: int,
    journal: ScoreJournal,
    here: Processes,
    measure: bool,
) -> Scores:
    """Scores pictures in batches, dealt out to the processes. Pictures that can't be read are named and left out.

    measure: also take the measures that show reward hacking. All processes return the same.
    """
    weights = dict.fromkeys(models, 1.0)  # only the single scores are used, not their sum

    def score_batch(batch: Batch) -> list[dict[str, Any]]:
        opened = [_open(entry["path"]) for entry in batch.entries]
        readable = [row for row, image in enumerate(opened) if not isinstance(image, str)]
        images, prompts = [opened[row] for row in readable], [batch.entries[row]["prompt"] for row in readable]
        rewards = compute_reward(images, prompts, models, weights)[2] if images else {}
        result = [{"problem": problem} for problem in opened]
        for i, row in enumerate(readable):
            result[row] = {
                "reward": {name: float(values[i]) for name, values in rewards.items()},
                "measures": appearance(images[i]) if measure else {},
            }
        return result

    batches = [Batch(entries[start : start + batch_size]) for start in range(0, len(entries), batch_size)]
    journal.complete(batches, 1, lambda single: list(map(score_batch, single)), here, "scoring")
    scored: dict[int, dict[str, Any]] = {}  # by place in entries
    skipped: dict[int, dict[str, str]] = {}
    for number in range(len(batches))[here.rank :: here.world_size]:
        result = journal.results[journal.key(batches[number])]
        for place, found in enumerate(result, number * batch_size):
            path = entries[place]["path"]
            if "problem" in found:
                skipped[place] = {"image": str(path), "problem": found["problem"]}
                print(f"skipped {path}: {found['problem']}")
            else:
                reward = {name: _number(value) for name, value in found["reward"].items()}
                scored[place] = {**entries[place], "reward": reward, "measures": dict(found["measures"])}
    for theirs, left_out in _gather((scored, skipped), here):
        scored |= theirs
        skipped |= left_out
    ordered = [scored[place] for place in sorted(scored)]
    if measure:
        _measure_diversity(ordered, models, here)
    return Scores(ordered, [skipped[place] for place in sorted(skipped)], reward_schema(models, weights))


def _measure_diversity(entries: list[dict[str, Any]], models: dict[str, RewardModel], here: Processes) -> None:
    """Adds it to the measures of pictures whose prompt has others. A CLIP is CLIPScore's, else another reward's."""
    choices = [models.get("CLIPScoreRewardModel"), *models.values()]
    clip = next((model for model in choices if isinstance(model, CLIPReward)), None)
    groups: dict[str, list[int]] = {}
    for place, entry in enumerate(entries):
        groups.setdefault(entry["prompt"], []).append(place)
    several = [places for places in groups.values() if len(places) > 1]
    found: dict[int, dict[str, float]] = {}
    for places in several[here.rank :: here.world_size]:
        measured = diversity([_open(entries[place]["path"]) for place in places], clip)
        for row, place in enumerate(places):
            found[place] = {name: float(values[row]) for name, values in measured.items()}
    for theirs in _gather(found, here):
        for place, values in theirs.items():
            entries[place]["measures"] |= values


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _interval(values: Sequence[float], prompts: Sequence[str]) -> list[float] | None:
    low, high = bootstrap_interval(values, prompts)
    return [low, high] if math.isfinite(low) else None


def _rows(entries: Sequence[dict[str, Any]], pairs: Sequence[tuple[dict, dict]] | None, where: str) -> dict[str, dict]:
    """{name: statistics} of everything under `where`, "reward" or "measures", of the entries and, if given, pairs."""
    rows = {}
    for name in dict.fromkeys(name for entry in entries for name in entry[where]):
        known = [entry for entry in entries if entry[where].get(name) is not None]
        values, prompts = [entry[where][name] for entry in known], [entry["prompt"] for entry in known]
        mean, error = mean_and_error(values, prompts)
        row = {"n": len(known), "failed": sum(name in e[where] and e[where][name] is None for e in entries)}
        row |= {"mean": _number(mean), "standard_error": _number(error), "interval": _interval(values, prompts)}
        if pairs is not None:
            both = [(a, b) for a, b in pairs if None not in (a[where].get(name), b[where].get(name))]
            before = np.array([b[where][name] for _, b in both], dtype=np.float64)
            change = np.array([a[where][name] for a, _ in both], dtype=np.float64) - before
            prompts = [a["prompt"] for a, _ in both]
            row |= {"pairs": len(both), "pair_prompts": len(set(prompts))}
            for part, values in (("baseline", before), ("difference", change)):
                mean, error = mean_and_error(values, prompts)
                row |= {f"{part}_mean": _number(mean), f"{part}_standard_error": _number(error)}
            row["baseline_deviation"] = float(before.std()) if both else None  # of the pictures, for `signs`
            row["difference_interval"] = _interval(change, prompts)
            row["win_rate"] = win_rate(change) if both else None
        rows[name] = row
    return rows


def pair_up(entries: Sequence[dict], others: Sequence[dict]) -> list[tuple[dict, dict]]:
    """Entries with those of the baseline of the same index.

    Raises ValueError, one line, when two of a pair have different prompts, or there is no pair at all.
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
    if not pairs:
        raise FlagError("baseline_manifest", None, "no index in common with --manifest")
    return pairs


def summarize(scores: Scores, baseline: Scores | None = None, trained: Iterable[str] | None = None) -> dict[str, Any]:
    """Means, standard errors clustered by prompt, bootstrap intervals over prompts, and counts.

    With a baseline the paired differences (this - baseline) and the share of pairs won, a tie counting half; a pair is
    a picture of each side with the same index. trained: names of the models that were trained on; the others are held
    out. Checks come first. Raises ValueError when there is no pair at all.
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
    """The content of *_mean.txt: how many pictures all models scored, and each model's mean over these."""
    lines = [f"Total Successful Samples: {len(scores.successful)}"]
    for model in scores.models:
        values = [entry["reward"][model] for entry in scores.successful]
        lines.append(f"{model} Mean Reward: {float(np.mean(values)) if values else math.nan}")
    return "\n".join(lines) + "\n"


def csv_lines(summary: dict[str, Any]) -> str:
    """The content of *.csv: a row a score, of all pictures and of each style; empty where there is no number."""
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
    """The summary for reading."""

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


def _entries(config: EvalConfig, path: str, field: str) -> list[dict[str, Any]]:
    if config.benchmark_prompts is None:
        return read_manifest(Path(path), field)
    if not Path(path).is_dir():
        raise FlagError(field, path, "with --benchmark_prompts it must be a folder of pictures")
    return benchmark_entries(Path(path), read_benchmark(Path(config.benchmark_prompts), "benchmark_prompts"))


def _settings(config: EvalConfig) -> str:
    """All flags that decide a score; of files their size and date too."""
    values = {field.name: getattr(config, field.name) for field in fields(RewardConfig)}
    values |= {"reward_model": config.reward_model_type, "hacking_measures": config.hacking_measures}
    files = {value: os.stat(value) for value in values.values() if isinstance(value, str) and os.path.isfile(value)}
    return json.dumps([values, {path: [stat.st_size, stat.st_mtime_ns] for path, stat in files.items()}])


def _output(config: EvalConfig) -> Path | None:
    if config.output_json is not None:
        return Path(config.output_json)
    if config.manifest is None:
        return None
    path = Path(config.manifest)
    return path / "scores.json" if path.is_dir() else path.with_name(f"{path.stem}_scores.json")


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Scores what `config` names, writes the files and prints a table; returns the summary (see `summarize`).

    Under torchrun the batches are dealt out to the processes, and rank 0 writes and prints.

    Raises:
        ValueError: one line, for bad flags, a malformed manifest, missing reward files, or not one readable picture.
    """
    if config.manifest:
        entries = _entries(config, config.manifest, "manifest")
    else:
        entries = [{"index": 0, "prompt": config.prompt, "path": Path(config.image)}]
    before = config.baseline_manifest and _entries(config, config.baseline_manifest, "baseline_manifest")
    if before:
        pair_up(entries, before)  # raises before anything loads
    output = _output(config)
    with processes(config.device) as here:
        models, _ = build_reward_models(config, here.device, evaluation=True, field="reward_model_type")
        settings = _settings(config)
        paths = [config.manifest, config.baseline_manifest, config.benchmark_prompts]
        purpose = [settings, *(path and os.path.abspath(path) for path in paths), config.trained_rewards]
        journal = ScoreJournal(output, settings, purpose)
        rest = (models, config.reward_batch_size, journal, here, config.hacking_measures)
        scores = score(entries, *rest)
        if not scores.entries:
            journal.withdraw()
            field = "manifest" if config.manifest else "image"
            raise FlagError(field, getattr(config, field), "not one picture could be read")
        baseline = score(before, *rest) if before else None
        trained = config.trained_keys()
        if trained is not None:  # the models have the spec's order
            keys = resolve_reward_spec(config, "reward_model_type")
            trained = {name for key, name in zip(keys, models, strict=True) if key in trained}
        summary = summarize(scores, baseline, trained)
        finish(here, lambda: _report(output, scores, baseline, summary))
        journal.remove()
    return summary


def _report(output: Path | None, scores: Scores, baseline: Scores | None, summary: dict[str, Any]) -> None:
    """Writes the files and prints the table."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_scores(output, scores.entries)
        if baseline:
            write_scores(companion(output, "_baseline.json"), baseline.entries)
        else:  # an earlier evaluation may have left one, which would not belong to the other files
            companion(output, "_baseline.json").unlink(missing_ok=True)
        write_bytes(companion(output, "_mean.txt"), mean_lines(scores).encode())
        write_bytes(companion(output, ".csv"), csv_lines(summary).encode())
        write_json(companion(output, "_summary.json"), summary)
    print(table(summary))
    for sign in summary["signs"]:
        print(f"against the baseline, {sign}")
    if few := summary["too_few_prompts_for_signs"]:
        print(f"no sign is looked for with pairs of fewer than {MIN_PROMPTS} prompts: {', '.join(few)}")
    print(
        f"{summary['successful']} of {summary['images']} pictures scored by all models" + f": {output}" * bool(output)
    )


@flag_errors("eval_reward.py")
def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 when a picture or a score is missing."""
    summary = evaluate(parse_dataclass(EvalConfig, argv, __doc__))
    return int(summary["successful"] < summary["images"] or bool(summary["skipped"]))


if __name__ == "__main__":
    raise SystemExit(main())
