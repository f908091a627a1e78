"""Files of scores, and the meaning of scores' names.

A file of scores X.json is a list with one entry per picture:

    {"index", "image", "prompt", "reward": {score: number}, "measures": {measure: number}, "style"}

`image` is a path relative to the file. A failed score is null. `measures` and `style` may be missing. An evaluation
writes X_baseline.json, X_summary.json and other files beside X.json. Evaluations during training are in
evaluation/{iteration}/scores.json of the run's folder.

A reward model named M has the score M, and one score M_{part} for each component and each check. A check answers yes
or no, 1 or 0 per picture, so its mean is the share of right pictures. `reward_schema` says which parts a model has.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo.cli import FlagError
from fastvideo.io.files import write_json


def write_scores(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file of scores. entries: as `read_scores` returns them. Scores that aren't finite become null."""
    folder = path.absolute().parent
    found = []
    for entry in entries:
        scores = {name: None if v is None or not math.isfinite(v) else v for name, v in entry["reward"].items()}
        image = Path(os.path.relpath(entry["path"].absolute(), folder)).as_posix()
        found.append({"index": entry["index"], "image": image, "prompt": entry["prompt"], "reward": scores})
        found[-1] |= {name: entry[name] for name in ("measures", "style") if entry.get(name)}
    write_json(path, found)


def read_scores(path: Path, field: str) -> list[dict[str, Any]]:
    """The entries of a file of scores: index, path (of the picture), prompt, reward; measures and style if present.

    A failed score is None. Raises FlagError about the setting `field` for a file that is missing or malformed.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return [
            {
                "index": int(entry["index"]),
                "path": path.parent / entry["image"],
                "prompt": str(entry["prompt"]),
                "reward": {name: _known(value) for name, value in dict(entry["reward"]).items()},
                **{name: entry[name] for name in ("measures", "style") if name in entry},
            }
            for entry in entries
        ]
    except OSError as error:
        raise FlagError(field, path, error.strerror or str(error)) from None
    except (ValueError, KeyError, TypeError) as error:
        raise FlagError(field, path, f"not a scores file of fastvideo.eval.eval_reward: {error!r}") from None


def _known(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def companion(path: Path, ending: str) -> Path:
    """The file that an evaluation writes beside the scores X.json: X{ending}."""
    return path.with_name(f"{path.stem}{ending}")


def read_signs(scores: Path) -> list[str]:
    """The signs of reward hacking in X_summary.json beside the scores X.json. Empty if there is no summary."""
    try:
        summary = json.loads(companion(scores, "_summary.json").read_text(encoding="utf-8"))
        return list(map(str, summary["signs"]))
    except (OSError, ValueError, KeyError, TypeError):  # no such file, or a file of something else
        return []


def evaluation_scores(output_dir: str | Path, iteration: int) -> Path:
    """The scores of an evaluation during training; the pictures lie beside the file."""
    return Path(output_dir) / "evaluation" / f"{iteration:06d}" / "scores.json"


@dataclass(frozen=True)
class ScoreName:
    """The meaning of a score's name. part: a component or check of the model, empty for the model's own score."""

    model: str
    part: str
    kind: str  # "reward", "component" or "check"


def reward_schema(models: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """The rewards' entry of args.json: {name: {"components": [part, …], "checks": [part, …], "weight": share}}.

    The details of a DetailedReward are among the components, though they are no parts of a sum.

    A reward that a model at an endpoint judges has the id of this model as "judge".

    models: name -> reward model. weights: name -> share of the model in the reward; missing names have weight 0.
    """
    return {
        name: {
            "components": [*getattr(model, "component_names", ()), *getattr(model, "detail_names", ())],
            "checks": list(getattr(model, "check_names", ())),
            "weight": float(weights.get(name, 0)),
            **({"judge": model.judge} if getattr(model, "judge", None) else {}),
        }
        for name, model in models.items()
    }


def score_names(names: Sequence[str], schema: Mapping[str, Mapping[str, Any]]) -> dict[str, ScoreName]:
    """The meaning of each name, by `reward_schema`.

    Older runs have an empty schema, and a schema may lack some rewards. A name M_part that the schema lacks belongs to
    the shortest other name M that fits; M_right is a check.
    """
    known = {}
    for model, parts in schema.items():
        known |= {f"{model}_{part}": ScoreName(model, part, "component") for part in parts["components"]}
        known |= {f"{model}_{part}": ScoreName(model, part, "check") for part in parts["checks"]}
    known |= {model: ScoreName(model, "", "reward") for model in schema}
    return {name: known.get(name) or _guess(name, [*schema, *names]) for name in names}


def _guess(name: str, others: Iterable[str]) -> ScoreName:
    model = min((other for other in others if name.startswith(f"{other}_")), key=len, default=name)
    part = name[len(model) + 1 :]
    kind = "check" if name.endswith("_right") else "component" if part else "reward"
    return ScoreName(model, part, kind)
