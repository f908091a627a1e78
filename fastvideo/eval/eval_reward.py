"""Scores the pictures of a manifest of sample_flux.py, or one picture, with any of the registered reward models.

    python -m fastvideo.eval.eval_reward --manifest outputs/tuned/manifest.json --reward_model_type hpsv2,pick_score
    python -m fastvideo.eval.eval_reward --manifest outputs/tuned/manifest.json \\
        --baseline_manifest outputs/base/manifest.json
    python -m fastvideo.eval.eval_reward --image cat.png --prompt "a cat" --reward_model_type image_reward

    torchrun --nproc_per_node 8 -m fastvideo.eval.eval_reward ...        (same flags)

Writes, for `--output_json` X.json:
    X.json            one entry per picture: scores and measures (io/scores.py describes the format)
    X_mean.txt        one line per model: the mean over the pictures that all models scored
    X.csv             one row per score: mean, standard error clustered by prompt, 95 % bootstrap interval; with a
                      baseline manifest also paired differences and win rate; with benchmark styles also rows per style
    X_summary.json    the content of X.csv, and which pictures were left out
    X_baseline.json   the baseline's scores, with a baseline manifest
Granular models add their components as {Model}_{component}. They also add the check {Model}_right, 1 or 0 per picture:
right in everything. It comes first wherever scores are listed. `measures` (see hacking.py) show reward hacking: the
appearance of each picture, and for prompts with several pictures the diversity.

Pictures that can't be read are named and left out. Failed scores are counted, and no mean includes them. Either makes
the exit status 1. Bad input makes it 2, or 1 through plain torchrun.

A killed evaluation goes on where it stopped: until the end, hidden .part files beside X.json hold what was scored.
Meanwhile another evaluation for the same X.json is refused if its pictures or flags differ. docs/evaluation.md has
more.
"""

import json
import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastvideo.cli import FlagError, FlagErrors, flag_errors, parse_dataclass, parse_first
from fastvideo.eval.settings import NO_RIVALS, EvalConfig
from fastvideo.models.reward_model.spec import RewardConfig, resolve_reward_spec

if __name__ == "__main__":  # before the slow imports: --help and a refused flag answer at once
    parse_first(EvalConfig, doc=__doc__)

from fastvideo.eval.benchmark import benchmark_entries, read_benchmark
from fastvideo.eval.hacking import MIN_PROMPTS, diversity
from fastvideo.eval.summary import Scores, csv_lines, finite, mean_lines, pair_up, summarize, table
from fastvideo.io.files import write_bytes, write_json, writing
from fastvideo.io.pictures import open_picture
from fastvideo.io.processes import Processes, processes
from fastvideo.io.resumable import Journal, digest, finish
from fastvideo.io.scores import companion, reward_schema, write_scores
from fastvideo.models.reward_model.clip_base import CLIPReward
from fastvideo.models.reward_model.granular import RewardModel
from fastvideo.models.reward_model.groups import is_groupwise
from fastvideo.models.reward_model.utils import (
    build_reward_models,
    check_needs,
    compute_reward,
    judge_of,
    reward_problems,
)
from fastvideo.utils.picture_measures import appearance

import numpy as np
import torch.distributed as dist
from PIL import Image


def read_manifest(path: Path, field: str) -> list[dict[str, Any]]:
    """The entries of a manifest: index, prompt, path (of the picture); the prompt's style and metadata if present. A
    category in the metadata is a style too, and so is GenEval's tag.

    Without an index an entry's position is its index. A path is relative to the manifest or, as in the reference's
    manifests, to the working directory. Raises FlagError about the setting `field` for a file that is missing,
    malformed or empty, and for an index that comes twice.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(found, ensure_ascii=False).encode()  # half a pair of UTF-16 could be written nowhere
    except OSError as error:
        raise FlagError(field, path, error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
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
        found_at = next(filter(os.path.isfile, places), places[0])  # Path.is_file raises for some names
        entries.append({"index": index, "prompt": keys["prompt"], "path": found_at})
        metadata = keys.get("metadata", {})
        if not isinstance(metadata, dict):
            raise FlagError(field, path, f"entry {position} has metadata that is no object")
        if metadata:
            entries[-1]["metadata"] = metadata
        if isinstance(style := keys.get("style", metadata.get("category", metadata.get("tag"))), str):
            entries[-1]["style"] = style
    if len({entry["index"] for entry in entries}) < len(entries):
        raise FlagError(field, path, "an index comes twice")
    return entries


def _open(path: Path) -> Image.Image | str:
    """The picture in RGB, or what is wrong with it."""
    try:
        return open_picture(path)
    except FileNotFoundError:
        return "no such file"
    except ValueError as error:
        return str(error)


@dataclass(eq=False)
class Batch:
    """Pictures that are scored together. rivals: for groupwise models, the entry that each one is compared with."""

    entries: Sequence[dict[str, Any]]
    rivals: Sequence[dict[str, Any] | None] = ()

    @cached_property
    def content(self) -> list[list[Any]]:
        """A hash of each picture's file, empty where it can't be read, its prompt and metadata; the rivals' hashes."""
        rivals = [[_file_hash(rival["path"]) if rival else ""] for rival in self.rivals]
        return [[_file_hash(e["path"]), e["prompt"], e.get("metadata", {})] for e in self.entries] + rivals


def _file_hash(path: Path) -> str:
    try:
        return sha256(path.read_bytes()).hexdigest() if os.path.isfile(path) else ""  # a pipe or device has no end
    except (OSError, ValueError):  # no such file; a name that no file can have
        return ""


class ScoreJournal(Journal[Batch, list[dict[str, Any]]]):
    """The results of batches, one per picture: {"reward": {name: score}, "measures": {name: value}} or {"problem"}."""

    def __init__(self, output: Path | None, settings: str, purpose: list[Any]) -> None:
        """settings: text of all that decides a score, except picture and prompt. output, purpose: see `Journal`."""
        self.settings = settings
        super().__init__(output, purpose)

    def key(self, batch: Batch) -> str:
        return digest([self.settings, batch.content], 64)

    def lasts(self, result: list[dict[str, Any]]) -> bool:
        """False for a batch with a failed score, which may succeed next time."""
        return all(math.isfinite(value) for found in result for value in found.get("reward", {}).values())


def _gather(value: Any, here: Processes) -> list[Any]:
    """The values of all processes."""
    found = [value] * here.world_size
    if here.world_size > 1:
        dist.all_gather_object(found, value)
    return found


def _compared(
    images: list[Image.Image],
    entries: list[dict[str, Any]],
    rivals: list[dict[str, Any] | None],
    models: dict[str, RewardModel],
) -> dict[str, np.ndarray]:
    """The scores of groupwise models, for which a picture and its rival are a group; NaN without a readable rival."""
    others = [rival and _open(rival["path"]) for rival in rivals]
    met = [i for i, other in enumerate(others) if isinstance(other, Image.Image)]
    scores = {name: np.full(len(images), np.nan) for name in models}
    if met:
        both = [images[i] for i in met] + [others[i] for i in met]
        prompts, metadata = ([entries[i].get(key, {}) for i in met] * 2 for key in ("prompt", "metadata"))
        found = compute_reward(both, prompts, models, dict.fromkeys(models, 1.0), groups=met * 2, metadata=metadata)[2]
        for name in models:
            scores[name][met] = found[name][: len(met)]
    return scores


def score(
    entries: Sequence[dict[str, Any]],
    models: dict[str, RewardModel],
    batch_size: int,
    journal: ScoreJournal,
    here: Processes,
    measure: bool,
    rivals: Sequence[dict[str, Any]] = (),
) -> Scores:
    """Scores pictures in batches, dealt out to the processes. Pictures that can't be read are named and left out.

    measure: also take the measures that show reward hacking. rivals: entries with which groupwise models compare the
    entries of the same index; without rivals these models don't score. All processes return the same.
    """
    weights = dict.fromkeys(models, 1.0)  # only the single scores are used, not their sum
    alone = {name: model for name, model in models.items() if not is_groupwise(model)}
    grouped = {name: model for name, model in models.items() if rivals and is_groupwise(model)}
    there = {rival["index"]: rival for rival in rivals} if grouped else {}

    def score_batch(batch: Batch) -> list[dict[str, Any]]:
        opened = [_open(entry["path"]) for entry in batch.entries]
        readable = [row for row, image in enumerate(opened) if not isinstance(image, str)]
        images, entries = [opened[row] for row in readable], [batch.entries[row] for row in readable]
        prompts, metadata = [e["prompt"] for e in entries], [e.get("metadata", {}) for e in entries]
        rewards = {}
        if images and alone:
            rewards |= compute_reward(images, prompts, alone, dict.fromkeys(alone, 1.0), metadata=metadata)[2]
        if images and grouped:
            rewards |= _compared(images, entries, [batch.rivals[row] for row in readable], grouped)
        result = [{"problem": problem} for problem in opened]
        for i, row in enumerate(readable):
            result[row] = {
                "reward": {name: float(values[i]) for name, values in rewards.items()},
                "measures": appearance(images[i]) if measure else {},
            }
        return result

    parts = (entries[start : start + batch_size] for start in range(0, len(entries), batch_size))
    batches = [Batch(part, [there.get(entry["index"]) for entry in part] if grouped else ()) for part in parts]
    journal.complete(batches, 1, lambda single: list(map(score_batch, single)), here, "scoring batches")
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
                reward = {name: finite(value) for name, value in found["reward"].items()}
                scored[place] = {**entries[place], "reward": reward, "measures": dict(found["measures"])}
    for theirs, left_out in _gather((scored, skipped), here):
        scored |= theirs
        skipped |= left_out
    ordered = [scored[place] for place in sorted(scored)]
    if measure:
        _measure_diversity(ordered, models, here)
    return Scores(ordered, [skipped[place] for place in sorted(skipped)], reward_schema(models, weights))


def _measure_diversity(entries: list[dict[str, Any]], models: dict[str, RewardModel], here: Processes) -> None:
    """Adds diversity to the measures of pictures whose prompt has other pictures too.

    Features come from CLIPScore's CLIP or, without CLIPScore, from another reward's.
    """
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


def _entries(config: EvalConfig, path: str, field: str) -> list[dict[str, Any]]:
    if config.benchmark_prompts is None:
        return read_manifest(Path(path), field)
    if not Path(path).is_dir():
        raise FlagError(field, path, "with --benchmark_prompts it must be a folder of pictures")
    return benchmark_entries(Path(path), read_benchmark(Path(config.benchmark_prompts), "benchmark_prompts"))


def _settings(config: EvalConfig, models: dict[str, RewardModel]) -> str:
    """All that decides a score, as text: flags, for a flag that names a file also its size and date, and the judge."""
    values = {field.name: getattr(config, field.name) for field in fields(RewardConfig)}
    values |= {"reward_model": config.reward_model_type, "hacking_measures": config.hacking_measures}
    files = {value: os.stat(value) for value in values.values() if isinstance(value, str) and os.path.isfile(value)}
    stats = {path: [stat.st_size, stat.st_mtime_ns] for path, stat in files.items()}
    return json.dumps([values, stats, judge_of(models)])


def _output(config: EvalConfig) -> Path | None:
    if config.output_json is not None:
        return Path(config.output_json)
    if config.manifest is None:
        return None
    path = Path(config.manifest)
    return path / "scores.json" if path.is_dir() else path.with_name(f"{path.stem}_scores.json")


def _pictures(config: EvalConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The entries to score, and those of --baseline_manifest.

    Raises FlagError for malformed manifests, if they don't match, and if no picture can be read.
    """
    if config.manifest:
        entries = _entries(config, config.manifest, "manifest")
    else:
        entries = [{"index": 0, "prompt": config.prompt, "path": Path(config.image)}]
    before = _entries(config, config.baseline_manifest, "baseline_manifest") if config.baseline_manifest else []
    if before:
        pair_up(entries, before)  # raises before anything loads
    for entry in entries:
        if not isinstance(problem := _open(entry["path"]), str):
            break
    else:
        field = "manifest" if config.manifest else "image"
        problem = f"not one picture could be read; {entries[-1]['path']}: {problem}"
        raise FlagError(field, getattr(config, field), problem)
    return entries, before


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Scores the pictures that `config` names, writes the files and prints a table; returns the summary.

    Under torchrun the batches are dealt out to the processes, and rank 0 writes and prints.

    Raises FlagError for settings that can't be used, a malformed manifest, missing reward files, and if no picture can
    be read.
    """
    try:
        entries, before = _pictures(config)
    except FlagError as error:  # and whatever else is missing
        missing = reward_problems(config, evaluation=True, field="reward_model_type")
        raise FlagErrors([error, *missing]) from None
    rewards = resolve_reward_spec(config, "reward_model_type")
    for field, pictures in (("manifest", entries), ("baseline_manifest", before)):
        prompts = [(entry["prompt"], entry.get("metadata", {})) for entry in pictures]
        check_needs(rewards if prompts else (), prompts, field, getattr(config, field))
    output = _output(config)
    with processes(config.device) as here:
        models, _ = build_reward_models(config, here.device, evaluation=True, field="reward_model_type")
        settings = _settings(config, models)
        paths = [config.manifest, config.baseline_manifest, config.benchmark_prompts]
        purpose = [settings, *(path and os.path.abspath(path) for path in paths), config.trained_rewards]
        journal = ScoreJournal(output, settings, purpose)
        rest = (models, config.reward_batch_size, journal, here, config.hacking_measures)
        grouped = [name for name, model in models.items() if is_groupwise(model)]
        if grouped and not before:  # a function of the user's own
            raise FlagError("reward_model_type", config.reward_model_type, NO_RIVALS)
        scores = score(entries, *rest, before)
        baseline = score(before, *rest) if before else None
        for entry in baseline.entries if grouped else ():
            entry["reward"] |= _mirrored(scores, grouped, entry["index"])
        trained = config.trained_keys()
        if trained is not None:  # the models have the spec's order
            trained = {name for key, name in zip(rewards, models, strict=True) if key in trained}
        summary = summarize(scores, baseline, trained)
        finish(here, lambda: _report(output, scores, baseline, summary))
        journal.remove()
    return summary


def _mirrored(scores: Scores, names: Sequence[str], index: int) -> dict[str, float | None]:
    """The scores of groupwise models for the rival of the picture with an index: 1 less the picture's."""
    rewards = next((entry["reward"] for entry in scores.entries if entry["index"] == index), {})
    return {name: None if rewards.get(name) is None else 1 - rewards[name] for name in names}


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
    config = parse_dataclass(EvalConfig, argv, __doc__)
    output = _output(config)
    with writing("output_json", output, file=True) if output else nullcontext():
        summary = evaluate(config)
    return int(summary["successful"] < summary["images"] or bool(summary["skipped"]))


if __name__ == "__main__":
    raise SystemExit(main())
