"""Means, and the standard errors that pictures of repeated prompts allow; numbers as people write them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

RIGHT = "right in everything"  # a check's name for readers


def number(value: Any, signed: bool = False, digits: int | None = None) -> str:
    """A number as people write it, '–' for anything else. digits: decimals; None: chosen by magnitude."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    if digits is None:
        power = math.floor(math.log10(abs(value))) if value else 0
        digits = 3 - max(power, 0) if power >= -2 else min(2 - power, 8)
    return f"{value:{'+' if signed else ''},.{max(digits, 0)}f}".replace("-", "−")


def with_error(value: tuple[float, float], signed: bool = False, digits: int | None = None) -> str:
    """Mean ± standard error. digits: decimals; None: two digits of the error."""
    error = value[1]
    if digits is None and error > 0:
        digits = min(1 - math.floor(math.log10(error)), 8)
    return f"{number(value[0], signed, digits)} ± {number(error, digits=digits)}"


def mean_and_error(values: Sequence[float], prompts: Sequence[str]) -> tuple[float, float]:
    """Mean of N values and its standard error, clustered by prompt: pictures of one prompt are not independent.

    With one value per prompt it is the usual standard error. NaN where it can't be known: no values, or one prompt.
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

    Prompts are drawn with replacement, each with all its values; the draws depend on nothing but the number of prompts.
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
    """The share of gains among paired changes, of which there is at least one; a tie counts half."""
    changes = np.asarray(changes, dtype=np.float64)
    return float(((changes > 0) + (changes == 0) / 2).mean())
