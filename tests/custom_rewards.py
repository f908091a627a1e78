"""Rewards that tests give by their path, `--reward_model custom_rewards:name`."""

import math
import os
import sys

import numpy as np
from PIL import Image

Images = list[Image.Image]


def brightness(images: Images, prompts: list[str]) -> list[float]:
    return [float(np.asarray(image).mean()) / 255 for image in images]


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


def raises_on_rank_1(images: Images, prompts: list[str]) -> list[float]:
    if os.environ["RANK"] == "1":
        raise RuntimeError("on purpose")
    return brightness(images, prompts)


def spoils_one_step_of_rank_1(images: Images, prompts: list[str]) -> list[float]:
    """Makes the loss of one optimizer step infinite, on the second of two processes alone."""
    trainer = sys.modules["__main__"]
    if os.environ["RANK"] == "1" and not hasattr(trainer, "spoiled"):
        trainer.spoiled, real = True, trainer.policy_loss

        def spoiled(*args):
            trainer.policy_loss = real
            loss, parts = real(*args)
            return loss * math.inf, parts

        trainer.policy_loss = spoiled
    return brightness(images, prompts)
