"""Means with the standard errors that repeated prompts allow."""

import math
from collections.abc import Sequence

import numpy as np


def mean_and_error(values: Sequence[float], prompts: Sequence[str]) -> tuple[float, float]:
    """Mean of N values and its standard error, clustered by prompt: pictures of one prompt are not independent.

    With one value a prompt it is the usual standard error. NaN where it can't be known: no values, or a single prompt.
    """
    if len(values) == 0:
        return math.nan, math.nan
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    _, cluster = np.unique(np.asarray(prompts, dtype=object).astype(str), return_inverse=True)
    residuals = np.bincount(cluster, weights=values - mean)
    clusters = len(residuals)
    if clusters < 2:
        return mean, math.nan
    return mean, float(np.sqrt((residuals**2).sum() * clusters / (clusters - 1)) / len(values))
