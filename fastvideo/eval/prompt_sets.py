"""The prompt sets of published benchmarks, as `download_checkpoints.sh prompts` puts them into data/benchmarks/{name}/.

Files from the hub keep their path there. Each set is read in its own layout into entries {"prompt", "category", ...}.
What an entry has beside its prompt is the prompt's metadata, see io/prompts.py; an evaluation has rows per category.
"""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvideo.eval.benchmark import STYLES, read_benchmark

ALL_PREFERENCES = "image_reward,hpsv2,pick_score,clip_score"
DRAWBENCH = "DrawBench Prompts - Sheet1.csv"
COMPOSITIONS = "color shape texture spatial 3d_spatial numeracy non_spatial complex".split()


def _table(path: Path, **form: Any) -> list[dict[str, str]]:
    """The rows of a table with a header."""
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), **form))


def _hpsv2(folder: Path) -> list[dict[str, Any]]:
    styles = read_benchmark(folder / "benchmark", "benchmark")
    return [{"prompt": prompt, "category": style} for style, prompts in styles.items() for prompt in prompts]


def _parti(folder: Path) -> list[dict[str, Any]]:
    rows = _table(folder / "PartiPrompts.tsv", delimiter="\t", quoting=csv.QUOTE_NONE)  # quotation marks are text
    return [{"prompt": row["Prompt"], "category": row["Category"], "challenge": row["Challenge"]} for row in rows]


def _drawbench(folder: Path) -> list[dict[str, Any]]:
    return [{"prompt": row["Prompts"], "category": row["Category"]} for row in _table(folder / DRAWBENCH)]


def _geneval(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "evaluation_metadata.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines if line.strip()]
    return [{"prompt": entry["prompt"], "category": entry["tag"], **entry} for entry in entries]


def _dpg(folder: Path) -> list[dict[str, Any]]:
    """One row per question; the rows of a prompt have one item_id. A dependency of 0 means none."""
    entries: dict[str, dict[str, Any]] = {}
    for row in _table(folder / "dpg_bench.csv"):
        entry = entries.setdefault(row["item_id"], {"prompt": row["text"], "item_id": row["item_id"], "questions": []})
        parents = [int(number) for number in row["dependency"].split(",") if int(number)]
        question = {"id": int(row["proposition_id"]), "question": row["question_natural_language"], "parents": parents}
        entry["questions"].append(question)
    return list(entries.values())


def _compositions(folder: Path) -> list[dict[str, Any]]:
    return [
        {"prompt": line.strip(), "category": name}
        for name in COMPOSITIONS
        for line in (folder / f"{name}_val.txt").read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]


@dataclass(frozen=True)
class PromptSet:
    """A published benchmark.

    Attributes:
        files: of the prompts, in the folder of the set. read: the entries in that folder. Raises OSError, ValueError or
            LookupError for files in another layout.
        count: prompts of the published set. images: pictures per prompt that its authors sample.
        rewards: what scores it, as --reward_model_type.
        published: the base model's row with its source, as far as we know one. note: what differs from the published
            protocol.
    """

    files: tuple[str, ...]
    read: Callable[[Path], list[dict[str, Any]]]
    count: int
    images: int
    rewards: str
    published: str = ""
    note: str = ""


SETS = {
    "hpsv2": PromptSet(
        files=tuple(f"benchmark/{style}.json" for style in STYLES),
        read=_hpsv2,
        count=3200,
        images=1,
        rewards="hpsv2",
        published="FLUX.1-dev, HPS v2.1, times 100: 32.47 (animation 33.87, concept-art 32.27, painting 32.62, photo "
        "31.11) in HiDream-I1's report, arXiv 2505.22705",
        note="papers give 100 times this score, and the version (v2.0 or v2.1) of the checkpoint decides it",
    ),
    "partiprompts": PromptSet(("PartiPrompts.tsv",), _parti, 1632, 1, ALL_PREFERENCES),
    "drawbench": PromptSet(
        (DRAWBENCH,),
        _drawbench,
        200,
        1,
        ALL_PREFERENCES,
        published="FLUX.1-dev, 50 steps: ImageReward 1.0412 (vipshop/cache-dit, bench/README.md; its table of other "
        "papers has 0.9898)",
    ),
    "geneval": PromptSet(
        ("evaluation_metadata.jsonl",),
        _geneval,
        553,
        4,
        "geneval",
        published="FLUX.1-dev: 0.67 (NVlabs/Sana, README.md)",
        note="the published score is GenEvalRewardModel_right, its mean over categories",
    ),
    "dpg": PromptSet(
        ("dpg_bench.csv",),
        _dpg,
        1065,
        4,
        "vlm_questions",
        published="FLUX.1-dev: 84.0 (NVlabs/Sana, README.md), from 0 to 100, judged by mPLUG-large",
        note="answers depend on the judge: compare scores of one judge only",
    ),
    "t2i_compbench": PromptSet(
        tuple(f"{name}_val.txt" for name in COMPOSITIONS),
        _compositions,
        2400,
        10,
        "vlm_judge",
        published="FLUX.1-dev, by its own scorers: color 0.7407, shape 0.5718, texture 0.6922, spatial 0.2863, "
        "non_spatial 0.3127, complex 0.3703 (MILR, arXiv 2509.22761, table 2)",
        note="its own scorers (BLIP-VQA, UniDet, CLIP ViT-B/32) aren't part of this package: compare these scores only "
        "with each other",
    ),
}
