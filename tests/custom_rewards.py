"""Rewards for `--reward_model custom_rewards:name`."""

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastvideo.models.reward_model.jpeg import JpegCompressibilityRewardModel
from fastvideo.models.reward_model.shapes import ShapesRewardModel

import numpy as np
from PIL import Image

Images = list[Image.Image]


def brightness(images: Images, prompts: list[str]) -> list[float]:
    return [float(np.asarray(image).mean()) / 255 for image in images]


def rough_brightness(images: Images, prompts: list[str]) -> list[float]:
    """Brightness rounded to 1/1000, so that rounding one pixel to the next of its 256 values changes no reward."""
    return [round(value, 3) for value in brightness(images, prompts)]


def noted_brightness(images: Images, prompts: list[str]) -> list[float]:
    """Writes one line per picture to this process's file in the folder NOTES."""
    with open(Path(os.environ["NOTES"]) / f"scored_by_{os.environ['RANK']}", "a") as file:
        file.writelines(f"{prompt}\n" for prompt in prompts)
    return brightness(images, prompts)


def by_place(images: Images, prompts: list[str]) -> list[float]:
    """Scores by place only, so that advantages don't depend on the pictures' rounding."""
    return [float(place % 3) for place in range(len(images))]


def never(images: Images, prompts: list[str]) -> list[float]:
    return [math.nan] * len(images)


def infinite(images: Images, prompts: list[str]) -> list[float]:
    return [math.inf] * len(images)


def constant(images: Images, prompts: list[str]) -> list[float]:
    return [0.5] * len(images)


def first_of_each_batch_fails(images: Images, prompts: list[str]) -> list[float]:
    return [math.nan, *brightness(images[1:], prompts[1:])]


def red_prompts_fail(images: Images, prompts: list[str]) -> list[float]:
    return [math.nan if "red" in p else b for p, b in zip(prompts, brightness(images, prompts), strict=True)]


def spoils_one_step_of_rank_1(images: Images, prompts: list[str]) -> list[float]:
    """Makes the loss of one optimizer step infinite, only on the second of two processes."""
    trainer = sys.modules["__main__"]
    if os.environ["RANK"] == "1" and not hasattr(trainer, "spoiled"):
        trainer.spoiled, real = True, trainer.policy_loss

        def spoiled(*args):
            trainer.policy_loss = real
            loss, parts = real(*args)
            return loss * math.inf, parts

        trainer.policy_loss = spoiled
    return brightness(images, prompts)


def _shuffled_within_groups(scores: Sequence[float], prompts: list[str]) -> list[float]:
    """Shuffles the scores within each group. Means stay right, but scores say nothing about their pictures."""
    scores, prompts = np.array(scores), np.array(prompts)
    for prompt in np.unique(prompts):
        members = np.flatnonzero(prompts == prompt)
        scores[members] = scores[RNG.permutation(members)]
    return scores.tolist()


RNG = np.random.default_rng(0)
SHAPES, JPEG = ShapesRewardModel([1, 1, 1], [1, 1, 1]), JpegCompressibilityRewardModel()


def shuffled_shapes(images: Images, prompts: list[str]) -> list[float]:
    return _shuffled_within_groups(SHAPES(images, prompts), prompts)


def shuffled_jpeg(images: Images, prompts: list[str]) -> list[float]:
    return _shuffled_within_groups(JPEG(images, prompts), prompts)


def number_of_class(images: Images, prompts: list[str], metadata: list[dict]) -> list[float]:
    """How many of the first class the prompt file asks for; fails without an entry there."""
    return [entry["include"][0]["count"] if "include" in entry else math.nan for entry in metadata]


def place_in_group(images: Images, prompts: list[str], groups: list[int]) -> list[float]:
    """Ranks the pictures of each group by brightness: 0 to 1."""
    values, numbers = np.array(rough_brightness(images, prompts)), np.array(groups)
    scores = np.zeros(len(images))
    for number in np.unique(numbers):
        members = np.flatnonzero(numbers == number)
        assert len({prompts[i] for i in members}) == 1
        scores[members] = (values[members, None] > values[members]).mean(1)
    return scores.tolist()


def shapes_win_rates(images: Images, prompts: list[str], groups: list[int]) -> list[float]:
    """The share of its group's other pictures that a picture beats in the reward `shapes`; a tie counts half."""
    values, numbers = np.array(SHAPES(images, prompts)), np.array(groups)
    scores = np.zeros(len(images))
    for number in np.unique(numbers):
        own = values[numbers == number]
        wins = (own[:, None] > own).sum(1) + ((own[:, None] == own).sum(1) - 1) / 2
        scores[numbers == number] = wins / (len(own) - 1)
    return scores.tolist()
