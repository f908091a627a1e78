"""Means with the standard errors that repeated prompts allow, and which scores are answers with yes or no."""

import math
from collections.abc import Sequence

import numpy as np

RIGHT = "right in everything"


def is_check(name: str) -> bool:
    """Whether a score is a model's check `right`, 1 (yes) or 0 (no) a picture: its mean is the share of right ones.

    Files of scores tell it by the name alone, as do metrics.jsonl's reward_… and evaluation_reward_….
    """
    return name.endswith("_right")


def score_label(name: str) -> str:
    """A score's name for readers."""
    return RIGHT if is_check(name) else name


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


def bootstrap_interval(
    values: Sequence[float], prompts: Sequence[str], share: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """The interval that holds the mean of N values with probability `share`: percentiles over resampled prompts.

    Prompts are drawn with replacement, each with all its values. The draws are the same for the same number of prompts.
    NaN where it can't be known: fewer than two prompts.
    """
    values = np.asarray(values, dtype=np.float64)
    _, cluster = np.unique(np.asarray(prompts, dtype=object).astype(str), return_inverse=True)
    counts = np.bincount(cluster)
    if len(counts) < 2:
        return math.nan, math.nan
    sums = np.bincount(cluster, weights=values)
    rng = np.random.default_rng(0)
    means: list[np.ndarray] = []
    at_once = max(1, 2**20 // len(counts))  # bounds the memory
    for start in range(0, resamples, at_once):
        drawn = rng.integers(len(counts), size=(min(at_once, resamples - start), len(counts)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def win_rate(changes: Sequence[float]) -> float:
    """The share of paired changes (at least one) that are gains; a tie counts half."""
    changes = np.asarray(changes, dtype=np.float64)
    return float(((changes > 0) + (changes == 0) / 2).mean())
