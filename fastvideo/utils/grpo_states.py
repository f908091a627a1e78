"""MixGRPO's sliding window: the stochastic, trained steps of every iteration (arXiv 2507.21802, section 3.3)."""

import math
from collections.abc import Iterator
from itertools import count, repeat

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


def _cycle(config: GRPOConfig) -> list[tuple[list[int], int]]:
    """The windows of one pass over the steps, each with its number of iterations. Not for sample_strategy random."""
    end = config.sampling_steps - 2
    size = min(config.group_size, end)  # algorithms without a window don't check their --group_size
    stride = config.prog_overlap_step if config.prog_overlap else size
    starts = range(0, end, stride) if stride else [0]
    return [(list(range(start, min(start + size, end))), _stay(config, start, end)) for start in starts]


def windows(config: GRPOConfig) -> Iterator[list[int]]:
    """Yields the window of iteration 1, 2, … without end: ascending step indices, at least one, equal on all ranks.

    Usable steps are 0 … T−3. The last window may be shorter. After it the window restarts at 0 (`roll_back`) or stays.
    """
    if config.sample_strategy == "random":
        size = min(config.group_size, config.sampling_steps - 2)
        for iteration in count(1):
            draw = np.random.default_rng([config.seed, iteration])
            start = int(draw.integers(0, config.sampling_steps - 2 - size + 1))
            yield list(range(start, start + size))
    cycle = _cycle(config)
    while True:
        for window, iterations in cycle:
            yield from repeat(window, iterations)
        if not config.roll_back:
            cycle = cycle[-1:]


def window_counts(config: GRPOConfig, first: int, last: int) -> list[tuple[list[int], int]]:
    """The windows of iterations `first` … `last`, each with its number of iterations. Takes no longer for more of them.

    Not for sample_strategy random.
    """
    cycle = _cycle(config)
    if not config.roll_back:
        cycle[-1] = (cycle[-1][0], last)  # stays to the end
    length, found, begin = sum(iterations for _, iterations in cycle), [], 0
    for window, iterations in cycle:
        # Number of iterations 1 … end with this window, for both ends.
        before, until = (
            end // length * iterations + min(max(end % length - begin, 0), iterations) for end in (first - 1, last)
        )
        if until > before:
            found.append((window, until - before))
        begin += iterations
    return found
