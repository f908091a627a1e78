"""MixGRPO's sliding window: the stochastic, trained steps of every iteration (arXiv 2507.21802, section 3.3)."""

import math
from collections.abc import Iterator

from fastvideo.config import GRPOConfig

import numpy as np


def _stay(config: GRPOConfig, start: int, end: int) -> int:
    """Number of iterations for which the window stays at `start`. end: number of usable steps, T − 2."""
    if config.sample_strategy == "decay":
        share = start / end
        return max(
            config.min_iters_per_group,
            int(config.max_iters_per_group * (1 - share) + config.min_iters_per_group * share),
        )
    if config.sample_strategy == "exp_decay":
        return math.ceil(config.iters_per_group * math.exp(-0.1 * max(0, start - 13)))
    return config.iters_per_group


def windows(config: GRPOConfig) -> Iterator[list[int]]:
    """Yields the window of iteration 1, 2, … without end: ascending step indices, at least one, equal on all ranks.

    Usable steps are 0 … T−3. The last window may be shorter. After it the window restarts at 0 (`roll_back`) or stays.
    """
    end = config.sampling_steps - 2
    size = min(config.group_size, end)  # algorithms without a window don't check their --group_size
    if config.sample_strategy == "random":
        iteration = 0
        while True:
            iteration += 1
            start = int(np.random.default_rng([config.seed, iteration]).integers(0, end - size + 1))
            yield list(range(start, start + size))
    stride = config.prog_overlap_step if config.prog_overlap else size
    start = 0
    while True:
        for _ in range(_stay(config, start, end)):
            yield list(range(start, min(start + size, end)))
        if start + stride < end:
            start += stride
        elif config.roll_back:
            start = 0
