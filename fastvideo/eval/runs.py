"""Reads what trainings left in their folders, and pairs the pictures of two sides that have the same prompts and seeds.

A report is made of this: `Run` holds a run's settings and metrics, `Comparison` the pictures and scores of two sides.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fastvideo.cli import FlagError
from fastvideo.config import PLACES
from fastvideo.eval.statistics import RIGHT, mean_and_error, win_rate
from fastvideo.io.metrics import read_metrics
from fastvideo.io.scores import evaluation_scores, read_scores, score_names

import numpy as np


def read_settings(run_dir: Path) -> dict:
    """The content of args.json, empty where there is none. Raises FlagError for a file that is no JSON."""
    path = run_dir / "args.json"
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FlagError("run_dir", run_dir, f"args.json is no JSON: {error}") from None
    return settings if isinstance(settings, dict) else {}


@dataclass
class Run:
    """The files of a training.

    Attributes:
        rows: lines of metrics.jsonl. broken: how many of its lines can't be read. version: time of its last change.
        settings: args.json without `reward_names`. reward_names: see `reward_schema`; empty in older runs.
    """

    folder: Path
    rows: list[dict]
    broken: int
    settings: dict
    version: str
    reward_names: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Raises FlagError for a folder without metrics.jsonl."""
        path = folder / "metrics.jsonl"
        if not path.is_file():
            raise FlagError("run_dir", folder, "no metrics.jsonl in it; give the --output_dir of a training run")
        version = str(path.stat().st_mtime_ns)
        rows, broken = read_metrics(path)
        settings = read_settings(folder)
        names = settings.pop("reward_names", {})
        return cls(folder, rows, broken, settings, version, names)

    @property
    def name(self) -> str:
        """The experiment's name, or without one the folder's."""
        return str(self.settings.get("experiment_name") or self.folder.resolve().name)

    @property
    def iterations(self) -> int:
        """The last iteration in the metrics."""
        return max((int(row.get("step", i)) for i, row in enumerate(self.rows, 1)), default=0)

    def evaluations(self) -> list[Path]:
        """The scores of all evaluations in the metrics, in order."""
        steps = (row["step"] for row in self.rows if "evaluation_reward" in row)
        paths = (evaluation_scores(self.folder, step) for step in steps)
        return [path for path in paths if path.is_file()]


def group_runs(runs: list[Run]) -> dict[str, list[Run]]:
    """Groups runs whose settings differ in nothing but seeds and places; keeps the order.

    A group's name is the name of its first run, or where groups would share one the run's folder, or its whole path.
    """
    found: dict[str, list[Run]] = {}
    for run in runs:
        same = {k: v for k, v in run.settings.items() if k not in (*PLACES, "seed", "sampler_seed")}
        found.setdefault(json.dumps(same, sort_keys=True) if same else str(run.folder), []).append(run)
    groups = list(found.values())
    for names in (
        [group[0].name for group in groups],
        [group[0].folder.resolve().name for group in groups],
        [str(group[0].folder) for group in groups],
    ):
        if len(set(names)) == len(groups):
            break
    return dict(zip(names, groups, strict=True))


@dataclass
class Pair:
    """Two pictures of one prompt and seed: before and after training, or from two runs.

    scores: name -> (before, after), None where a score failed.
    """

    index: int
    prompt: str
    images: tuple[Path, Path]
    scores: dict[str, tuple[float | None, float | None]]

    def change(self, score: str) -> float:
        """After minus before; NaN where one of them isn't known."""
        before, after = self.scores.get(score, (None, None))
        return math.nan if before is None or after is None else after - before


def read_pairs(baseline: Path, tuned: Path) -> list[Pair]:
    """Pairs the entries of two files of scores by index.

    Raises FlagError for a file that is no file of scores, for no common index and for different prompts at one index.
    """
    before, after = (
        {entry["index"]: entry for entry in read_scores(path, field)}
        for field, path in (("baseline_scores", baseline), ("tuned_scores", tuned))
    )
    common = sorted(before.keys() & after.keys())
    if not common:
        raise FlagError("tuned_scores", tuned, f"no index in common with {baseline}")
    pairs = []
    for i in common:
        sides = before[i], after[i]
        if sides[0]["prompt"] != sides[1]["prompt"]:
            raise FlagError("tuned_scores", tuned, f"index {i} has another prompt than in {baseline}")
        # A score that one side doesn't list was never asked for, so it can't have failed.
        names = [name for name in sides[0]["reward"] if name in sides[1]["reward"]]
        scores = {name: tuple(side["reward"][name] for side in sides) for name in names}
        pairs.append(Pair(i, sides[0]["prompt"], tuple(side["path"] for side in sides), scores))
    return pairs


@dataclass
class Comparison:
    """Pictures of two sides, what the sides are called, and the scores' meaning.

    checks: names of the scores that answer yes or no. problem: why there are no pairs although there are evaluations.
    """

    pairs: list[Pair] = field(default_factory=list)
    labels: tuple[str, str] = ("Before", "After")
    checks: frozenset[str] = frozenset()
    problem: str = ""

    @classmethod
    def of(cls, runs: Sequence[Run], baseline: str | Path | None, tuned: str | Path | None) -> "Comparison":
        """Pairs two files of scores, or without them evaluations: the first and the last one of a run, or of several
        runs the last ones of the first and the last run.

        Raises FlagError for files of scores that can't be paired. Evaluations that can't be are a `problem`.
        """
        if baseline and tuned:
            return cls._read(runs, Path(baseline), Path(tuned))
        first, last = runs[0].evaluations(), runs[-1].evaluations()
        if len(runs) == 1:
            chosen = first[:1] + last[1:][-1:]
            labels = [f"Iteration {int(path.parent.name)}" for path in chosen]
        else:
            chosen = first[-1:] + last[-1:]
            labels = [run.name for run in (runs[0], runs[-1])]
            if labels[0] == labels[1]:
                labels = [run.folder.resolve().name for run in (runs[0], runs[-1])]
        if len(chosen) < 2:
            return cls()
        try:
            return cls._read(runs, *chosen, tuple(labels))
        except FlagError as error:  # a run resumed with other --eval_prompts; runs with different ones
            return cls(problem=f"{error.value}: {error.problem}")

    @classmethod
    def _read(
        cls, runs: Sequence[Run], baseline: Path, tuned: Path, labels: tuple[str, str] = ("Before", "After")
    ) -> "Comparison":
        pairs = read_pairs(baseline, tuned)
        schema = {name: parts for run in runs for name, parts in run.reward_names.items()}
        known = score_names(list(dict.fromkeys(name for pair in pairs for name in pair.scores)), schema)
        return cls(pairs, labels, frozenset(name for name, meaning in known.items() if meaning.kind == "check"))

    def label(self, score: str) -> str:
        """A score's name for readers."""
        return RIGHT if score in self.checks else score

    @cached_property
    def rows(self) -> list[dict]:
        """One row per score, checks first: `model` is its name, n the number of pairs with both scores, `failed` the
        number of the other pairs. Then before, after and change: mean and standard error; improved: the win rate.
        """
        names = dict.fromkeys(name for pair in self.pairs for name in pair.scores)
        rows = []
        for name in sorted(names, key=lambda name: name not in self.checks):
            complete = [pair for pair in self.pairs if math.isfinite(pair.change(name))]
            row = {"model": name, "n": len(complete), "failed": len(self.pairs) - len(complete)}
            if complete:
                prompts = [pair.prompt for pair in complete]
                scores = np.array([pair.scores[name] for pair in complete], dtype=np.float64)
                row["before"], row["after"] = (mean_and_error(side, prompts) for side in scores.T)
                row["change"] = mean_and_error(scores[:, 1] - scores[:, 0], prompts)
                row["improved"] = win_rate(scores[:, 1] - scores[:, 0])
            rows.append(row)
        return rows
