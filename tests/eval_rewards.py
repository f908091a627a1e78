"""Custom rewards for tests of evaluation, in a module that child processes import quickly."""

import math
import os
import time

from fastvideo.models.reward_model.custom import PROMPTS

import numpy as np
from PIL import Image


def brightness(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """Fails on black pictures."""
    means = [float(np.asarray(image).mean()) for image in images]
    return [mean if mean > 0 else math.nan for mean in means]


def slow_brightness(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """Writes one line per batch to the file CALLS, except for the two pictures that are scored beforehand."""
    if prompts != list(PROMPTS):
        with open(os.environ["CALLS"], "a") as file:
            file.write("x\n")
    time.sleep(0.05)
    return brightness(images, prompts)
