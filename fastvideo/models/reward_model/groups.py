"""Rewards that compare the pictures of a group, with each other or as a whole.

A group holds the pictures whose scores an advantage compares: those of one prompt, for E-GRPO and Granular-GRPO those
of one prompt, active step and stride. Such a reward has `groupwise = True`, and score_groups(groups) in place of
model(images, prompts).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastvideo.models.reward_model.granular import RewardModel, as_scores

import numpy as np
from PIL import Image


@dataclass(frozen=True, eq=False)
class Group:
    """Two or more pictures of one prompt. metadata: what the prompt file says about the prompt."""

    images: list[Image.Image]
    prompt: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def is_groupwise(model: RewardModel) -> bool:
    """Whether a reward model scores groups."""
    return getattr(model, "groupwise", False)


def joined(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """One entry per picture of all groups: its `images`, `prompts`, numbers of `groups`, and `metadata`."""
    numbers = [number for number, group in enumerate(groups) for _ in group.images]
    return {
        "images": [image for group in groups for image in group.images],
        "prompts": [groups[number].prompt for number in numbers],
        "groups": numbers,
        "metadata": [groups[number].metadata for number in numbers],
    }


def parted(values: Sequence[Any], groups: Sequence[Group]) -> list[Sequence[Any]]:
    """`values`, one per picture of all groups, by group."""
    ends = np.cumsum([len(group.images) for group in groups]).tolist()
    return [values[end - len(group.images) : end] for group, end in zip(groups, ends, strict=True)]


def score_in_groups(
    model: Any,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    numbers: Sequence[int] | None,
    metadata: Sequence[Mapping[str, Any]],
) -> np.ndarray:
    """The scores of a groupwise model, float64 [N]. NaN: failed, or the only picture of its group.

    numbers: the group of each picture. The pictures of a group may stand anywhere, and have one prompt.

    Raises ValueError without numbers, and for a group with two prompts.
    """
    if numbers is None:
        raise ValueError(f"{model.name} compares pictures of a group; give `groups`, one number per picture")
    members: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        members.setdefault(int(number), []).append(place)
    several = [places for places in members.values() if len(places) > 1]
    for places in several:
        if len(asked := {prompts[place] for place in places}) > 1:
            raise ValueError(f"a group has several prompts: {sorted(asked)}")
    groups = [Group([images[place] for place in places], prompts[places[0]], metadata[places[0]]) for places in several]
    scores = np.full(len(images), np.nan)
    for places, found in zip(several, model.score_groups(groups) if groups else [], strict=True):
        scores[places] = as_scores(found, len(places), model.name)
    return scores
