"""GenEval's decision rules (arXiv 2310.11513): whether the objects found in a picture are those that its prompt wants.

What a prompt wants is its metadata, in the format of GenEval's evaluation_metadata.jsonl:

    {"prompt": "a photo of a red cup left of two dogs", "tag": "position",
     "include": [{"class": "dog", "count": 2},
                 {"class": "cup", "count": 1, "color": "red", "position": ["left of", 0]}],
     "exclude": [{"class": "dog", "count": 3}]}

`position` names a relation to the objects of an earlier entry of `include`, by its place in the list. `exclude` says
how many objects are too many. With the tag "counting" only objects that are found with high confidence count.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastvideo.cli import choose_from

import numpy as np

CLASSES = (  # COCO's 80 classes in their order, three of them under clearer names
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, "
    "clock, vase, scissors, teddy bear, hair drier, toothbrush"
).split(", ")
COLORS = "red orange yellow green blue purple pink brown black white".split()
RELATIONS = ("left of", "right of", "above", "below")
THRESHOLD = 0.3  # confidence above which an object counts
COUNTING_THRESHOLD = 0.9  # with the tag "counting"
MOST = 16  # objects per class, the most confident ones
MARGIN = 0.1  # share of two objects' sizes by which their centres must be apart


@dataclass(frozen=True, eq=False)
class Found:
    """An object in a picture. box: left, top, right, bottom in pixels. mask: bool [height, width] of the picture."""

    box: tuple[float, float, float, float]
    confidence: float
    mask: np.ndarray | None = None


def check_wants(metadata: Mapping[str, Any]) -> None:
    """Raises ValueError, which names the entry, for metadata that isn't in GenEval's format."""
    for part in ("include", "exclude"):
        entries = metadata.get(part, [])
        if not isinstance(entries, list):
            raise ValueError(f"{part} is no list")
        for number, entry in enumerate(entries):
            if problem := _problem(entry if isinstance(entry, dict) else {}, number, part == "include"):
                raise ValueError(f"{part}, entry {number}: {problem}")


def _problem(entry: dict[str, Any], number: int, included: bool) -> str | None:
    count, position = entry.get("count"), entry.get("position")
    if entry.get("class") not in CLASSES:
        return f"no class {entry.get('class')!r}; {choose_from(CLASSES, entry.get('class'))}"
    if type(count) is not int or count < 1:
        return f"count {count!r} is no whole number above 0"
    if not included:
        return None
    if "color" in entry and entry["color"] not in COLORS:
        return f"no color {entry['color']!r}; {choose_from(COLORS, entry['color'])}"
    fits = isinstance(position, list) and len(position) == 2 and position[0] in RELATIONS
    if "position" in entry and not (fits and type(position[1]) is int and 0 <= position[1] < number):
        return f"position {position!r} is no [relation, place of an earlier entry]; relations: {', '.join(RELATIONS)}"
    return None


def counted(objects: Sequence[Found], tag: str | None) -> list[Found]:
    """The objects of one class that count, the most confident first. tag: the metadata's."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    ranked = sorted(objects, key=lambda found: -found.confidence)
    return [found for found in ranked if found.confidence > threshold][:MOST]


def relations(a: Found, b: Found) -> set[str]:
    """Where a is, seen from b: at most two of RELATIONS.

    The distance of the centres counts as far as it exceeds MARGIN of both objects' widths, or heights. A relation holds
    where this is more than half of the whole distance.
    """
    corners = np.array([a.box, b.box], dtype=np.float64).reshape(2, 2, 2)  # object, corner, (x, y)
    offset = np.subtract(*corners.mean(1))
    sizes = np.abs(corners[:, 1] - corners[:, 0]).sum(0)
    beyond = np.sign(offset) * np.maximum(np.abs(offset) - MARGIN * sizes, 0)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, true in holds.items() if true}


def judge(
    objects: Mapping[str, Sequence[Found]],
    metadata: Mapping[str, Any],
    colors_of: Callable[[str, Sequence[Found]], Sequence[str]],
) -> tuple[bool, float]:
    """(GenEval's verdict, the share of the wants that are fulfilled, 1 for a right picture).

    Only the `count` most confident objects of an entry are looked at. A want is the number of objects of an entry, or
    their colour, or their position, or an entry of `exclude`; too few objects, and too few of the right colour, fulfil
    theirs in part. An object has a position only if objects and colours of both entries are right.

    Args:
        objects: class -> what was found, at any confidence. colors_of: (class, objects) -> one of COLORS per object.
    """
    seen = {name: counted(found, metadata.get("tag")) for name, found in objects.items()}
    fulfilled: list[float] = []
    groups: list[list[Found] | None] = []  # per entry, its objects if they are right
    for want in metadata.get("include", []):
        name, count = want["class"], want["count"]
        found = seen.get(name, [])[:count]
        shares = [len(found) / count]
        if "color" in want:
            shares.append(sum(color == want["color"] for color in colors_of(name, found)) / count if found else 0.0)
        if "position" in want:
            relation, place = want["position"]
            others = groups[place]
            apart = others is not None and all(relation in relations(a, b) for a in found for b in others)
            shares.append(float(apart and min(shares) == 1))
        groups.append(found if min(shares) == 1 else None)
        fulfilled += shares
    fulfilled += [float(len(seen.get(want["class"], [])) < want["count"]) for want in metadata.get("exclude", [])]
    return min(fulfilled, default=1.0) == 1, float(np.mean(fulfilled)) if fulfilled else 1.0
