"""Scouting (Sol-RL, arXiv 2604.06916): which of many cheaply sampled candidates are sampled in full and trained.

A candidate is a number. Noise is a function of it, so the full plan starts from the noise of the candidate's picture.
What few steps draw from that noise has the layout of what all steps draw, so the scores of the candidates rank them.
P: prompts of all ranks. N: candidates per prompt. G: samples per prompt. Arrays are equal on every rank.
"""

from dataclasses import dataclass

from fastvideo.config import GRPOConfig
from fastvideo.utils.advantages import lost_pictures, mix_advantages, reward_means
from fastvideo.utils.transitions import CANDIDATES, prompt_rng

import numpy as np


def extremes(values: np.ndarray, count: int) -> np.ndarray:
    """Numbers of `count` candidates, ascending: half the best and half the worst (an odd count: one more of the best).

    values: [N], NaN where the score failed. Failed candidates are taken only where fewer than `count` have a score, the
    first of them. Of equal candidates the first counts as better.
    """
    ranked = np.argsort(-values, kind="stable")  # failed ones last
    worst, scored = count // 2, max(count, int(np.isfinite(values).sum()))
    return np.sort(np.concatenate([ranked[: count - worst], ranked[scored - worst : scored]]))


def at_random(values: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of `count` random candidates, ascending. values: as in `extremes`; failed ones are avoided as there."""
    drawn = rng.permutation(len(values))
    return np.sort(drawn[np.argsort(np.isnan(values[drawn]), kind="stable")][:count])


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0 of values [n]; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[place]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's ρ of two [n]: the correlation of their ranks. NaNs are left out. NaN where either has one value."""
    known = np.isfinite(a) & np.isfinite(b)
    centred = [found - found.mean() for found in (ranks(x[known]) for x in (a, b)) if len(found)]
    spread = np.prod([np.linalg.norm(found) for found in centred])
    return float(centred[0] @ centred[1] / spread) if len(centred) == 2 and spread else np.nan


def rewards_of(config: GRPOConfig, scores: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> np.ndarray:
    """What ranks the pictures of a prompt, [P, pictures]: their advantage among them, NaN where the score failed.

    Arguments as in `plan_advantages`.
    """
    return np.where(lost_pictures(config, scores, weights), np.nan, mix_advantages(scores, weights, config)[0])


@dataclass(frozen=True)
class Scouted:
    """An iteration's candidates. scores: name -> [P, N]. rewards: [P, N], NaN where failed. picks: numbers [P, G]."""

    scores: dict[str, np.ndarray]
    rewards: np.ndarray
    picks: np.ndarray

    @classmethod
    def of(
        cls, config: GRPOConfig, number: int, scores: dict[str, np.ndarray], weights: dict[str, np.ndarray]
    ) -> "Scouted":
        """Picks `num_generations` of the candidates of iteration `number` by --scout_pick.

        The picks ascend by number and not by reward, so that optimizer steps mix good and bad samples.
        """
        rewards, count = rewards_of(config, scores, weights), config.num_generations
        if config.scout_pick == "random":
            rngs = [prompt_rng(config, number, slot, CANDIDATES) for slot in range(len(rewards))]
            picks = [at_random(values, count, rng) for values, rng in zip(rewards, rngs, strict=True)]
        else:
            picks = [extremes(values, count) for values in rewards]
        return cls(scores, rewards, np.stack(picks))

    def metrics(
        self,
        config: GRPOConfig,
        scores: dict[str, np.ndarray],
        weights: dict[str, np.ndarray],
        shares: dict[str, float],
    ) -> dict[str, float]:
        """Means over the candidates, named scout_…; and scout_rank_correlation, the mean over the prompts of Spearman's
        ρ between the rewards of the picks as candidates and as samples.

        scores, weights: of the samples, as in `plan_advantages`. shares: as in `reward_means`.
        """
        before = np.take_along_axis(self.rewards, self.picks, 1)
        after = rewards_of(config, scores, weights)
        found = np.array([rank_correlation(a, b) for a, b in zip(before, after, strict=True)])
        known = found[np.isfinite(found)]
        means = {f"scout_{name}": value for name, value in reward_means(self.scores, shares).items()}
        return means | {"scout_rank_correlation": float(known.mean()) if len(known) else np.nan}
