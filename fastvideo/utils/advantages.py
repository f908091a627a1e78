"""From rewards to advantages: group statistics, mixes of reward models, the order of samples over optimizer steps.

P prompts over all ranks, G samples each. All of it is small, on the host, in float64, and the same on every rank.
"""

import numpy as np

FLAT = 1e-6  # a standard deviation up to this, relative to max(1, |mean|), is rounding


def group_advantages(rewards: np.ndarray, trimmed_ratio: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """(R − mean)/(std + 1e-8) along the last axis, with the unbiased std (GRPO, arXiv 2402.03300, eq. 3).

    Args:
        rewards: [..., G]; NaN marks a failed sample, which leaves the statistics and gets 0.
        trimmed_ratio: the lowest share of each group left out of mean and std; its samples still get an advantage.

    Returns:
        advantages [..., G] and flat [...]: groups without spread (or with fewer than two scores), which get 0 for all.
    """
    advantages, flat = np.zeros_like(rewards), np.zeros(rewards.shape[:-1], dtype=bool)
    for group in np.ndindex(rewards.shape[:-1]):
        valid = np.isfinite(rewards[group])
        scores = np.sort(rewards[group][valid])
        kept = scores[int(trimmed_ratio * len(scores)) :]
        mean, std = (kept.mean(), kept.std(ddof=1)) if len(kept) > 1 else (0.0, 0.0)
        flat[group] = std <= FLAT * max(1.0, abs(mean))
        if not flat[group]:
            advantages[group][valid] = (rewards[group][valid] - mean) / (std + 1e-8)
    return advantages, flat


def mix_advantages(
    scores: dict[str, np.ndarray], weights: dict[str, np.ndarray], mix: str, use_group: bool, trimmed_ratio: float
) -> tuple[np.ndarray, int]:
    """One advantage a sample from the scores of several reward models.

    Args:
        scores: model -> [P, G], NaN where failed. weights: model -> [P, G] or a number; a sample's sum to 1.
        mix: `advantage_aggr` weights each model's advantages, where a failed score counts 0; `reward_aggr` weights the
            rewards first, where a failed score fails the sample.
        use_group: statistics per prompt; else over all P·G samples (`reward_aggr` only).

    Returns:
        advantages [P, G] and how many groups were flat (for `advantage_aggr`: in any model).
    """
    if mix == "advantage_aggr":
        parts = {name: group_advantages(scores[name], trimmed_ratio) for name in weights}
        total = sum(weight * parts[name][0] for name, weight in weights.items())
        return total, int(np.any([flat for _, flat in parts.values()], axis=0).sum())
    total = sum(weight * scores[name] for name, weight in weights.items() if np.any(weight))
    advantages, flat = group_advantages(total if use_group else total.reshape(1, -1), trimmed_ratio)
    return advantages.reshape(total.shape), int(flat.sum())


def sample_order(advantages: np.ndarray, strategy: str | None, rng: np.random.Generator) -> np.ndarray:
    """The order in which a group's samples [G] go to optimizer steps: a permutation of 0 … G−1.

    None keeps it; `random` shuffles; `balance` shuffles the positive and the negative ones, takes them alternately and
    appends what is left, zeros last, so that no step sees only good or only bad samples.
    """
    samples = np.arange(len(advantages))
    if strategy == "random":
        return rng.permutation(samples)
    if strategy == "balance":
        good, bad = rng.permutation(samples[advantages > 0]), rng.permutation(samples[advantages < 0])
        pairs = min(len(good), len(bad))
        alternating = np.stack([good[:pairs], bad[:pairs]], axis=1).ravel()
        return np.concatenate([alternating, good[pairs:], bad[pairs:], samples[advantages == 0]])
    return samples
