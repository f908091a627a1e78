"""Custom rewards of the evaluation's tests, in a module that a child process imports at once."""

import math
import os
import time

import numpy as np
from PIL import Image


def brightness(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """It fails on pictures that are black."""
    means = [float(np.asarray(image).mean()) for image in images]
    return [mean if mean > 0 else math.nan for mean in means]


def slow_brightness(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """Each batch leaves a line in the file CALLS."""
    with open(os.environ["CALLS"], "a") as file:
        file.write("x\n")
    time.sleep(0.05)
    return brightness(images, prompts)
