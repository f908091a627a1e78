"""Rewards that fail or end a process, for `--reward_model failing_rewards:name`."""

import itertools
import math
import os

from custom_rewards import rough_brightness

CALLS = itertools.count(1)


def raises_on_rank_1(images: list, prompts: list[str]) -> list[float]:
    if os.environ["RANK"] == "1":
        raise RuntimeError("on purpose")
    return [0.5] * len(images)


def lost_on_rank_1_in_iteration_2(images: list, prompts: list[str]) -> list[float]:
    if next(CALLS) == 2 and os.environ["RANK"] == "1":
        return [math.nan] * len(images)
    return rough_brightness(images, prompts)


def lost_for_circles(images: list, prompts: list[str]) -> list[float]:
    found = rough_brightness(images, prompts)
    return [math.nan if "circle" in prompt else value for prompt, value in zip(prompts, found, strict=True)]


def raises_once_on_rank_1(images: list, prompts: list[str]) -> list[float]:
    if next(CALLS) == 2 and os.environ["RANK"] == "1":
        raise ConnectionError("the API is down")
    return rough_brightness(images, prompts)
