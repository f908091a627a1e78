"""From rewards to advantages: group statistics, mixes of reward models, the order of samples over optimizer steps.

P: prompts of all ranks. G: samples per prompt. Arrays are NumPy float64, and equal on every rank.
"""

import math

from fastvideo.config import GRPOConfig
from fastvideo.utils.plan import Plan

import numpy as np


def group_advantages(rewards: np.ndarray, config: GRPOConfig) -> tuple[np.ndarray, np.ndarray]:
    """Advantages of groups along the last axis: A = R − mean, divided by the group's spread.

    advantage_norm `std`: A/(std + 1e-8) with the unbiased std (GRPO, arXiv 2402.03300, eq. 3). `lp`: A/(Σ|A|^p)^(1/p)
    with p = advantage_p (Pref-GRPO, arXiv 2508.20751).

    Args:
        rewards: [..., G]; NaN marks a failed sample, which the statistics leave out and whose advantage is 0.
        config: trimmed_ratio is the share of each group, its lowest rewards, that mean and spread leave out; all
            samples get advantages. A std of at most flat_group_std·max(1, |mean|) counts as noise of the scorer.

    Returns:
        advantages [..., G], and flat [...]: whether a group has no spread or fewer than two scores. Flat groups get 0.
    """
    advantages, flat = np.zeros_like(rewards), np.zeros(rewards.shape[:-1], dtype=bool)
    for group in np.ndindex(rewards.shape[:-1]):
        valid = np.isfinite(rewards[group])
        scores = np.sort(rewards[group][valid])
        kept = scores[int(config.trimmed_ratio * len(scores)) :]
        mean, spread = (kept.mean(), kept.std(ddof=1)) if len(kept) > 1 else (0.0, 0.0)
        flat[group] = spread <= config.flat_group_std * max(1.0, abs(mean))
        if not flat[group]:
            if config.advantage_norm == "lp":
                spread = (np.abs(kept - mean) ** config.advantage_p).sum() ** (1 / config.advantage_p)
            advantages[group][valid] = (rewards[group][valid] - mean) / (spread + 1e-8)
    return advantages, flat


def _weighted_mean(values: np.ndarray, weights: np.ndarray | float) -> np.ndarray:
    """Weighted mean over the last axis. Leaves NaNs out; NaN where all values are NaN."""
    weights = np.where(np.isfinite(values), weights, 0.0)
    total = weights.sum(-1)
    return (weights * np.nan_to_num(values)).sum(-1) / np.where(total > 0, total, np.nan)


def fuse(values: np.ndarray, rows: int, split_log_probs: dict[int, np.ndarray], temperature: float = 1.0) -> np.ndarray:
    """Scores of the `rows` rows of a step: the mean score of each row's pictures (BranchGRPO, arXiv 2509.06040).

    With log-probabilities, scores go up the tree from pictures to rows. At every split, siblings are averaged with
    weights softmax(log p / temperature), without the failed ones.

    Args:
        values: [P, pictures], sorted by row. NaN marks a failed picture, which is left out.
        split_log_probs: rows per prompt before a split -> [P, rows after the split], sorted by parent. May be empty.

    Returns:
        [P, rows], NaN where all pictures failed.
    """
    for before in sorted((split for split in split_log_probs if split >= rows), reverse=True):
        found = split_log_probs[before]
        siblings = found.reshape(len(found), before, -1) / temperature
        values = _weighted_mean(
            values.reshape(len(values), *siblings.shape[1:]), np.exp(siblings - siblings.max(-1, keepdims=True))
        )
    return _weighted_mean(values.reshape(len(values), rows, -1), 1.0)


def kept_pictures(advantages: np.ndarray, siblings: int, mode: int, share: float) -> np.ndarray:
    """BranchGRPO's width pruning: which pictures [P, n], bool, are kept. Edges of other pictures are not trained.

    mode 1: keeps the best ⌈share·siblings⌉ of the `siblings` pictures of each branch of the last split. mode 2: keeps
    ⌈share·n⌉ pictures per prompt, half the best and half the worst (an odd count keeps one more of the best). NaN marks
    a failed picture, which does not count, and is kept only where all failed.
    """
    grouped = advantages.reshape(len(advantages), -1, siblings if mode == 1 else advantages.shape[1])
    valid = np.isfinite(grouped)
    valid |= ~valid.any(-1, keepdims=True)
    place = np.where(valid, -grouped, np.inf).argsort(-1, kind="stable").argsort(-1, kind="stable")  # 0: the best
    size = valid.sum(-1, keepdims=True)
    count = np.ceil(share * size - 1e-9)
    worst = count // 2 if mode == 2 else 0
    return (valid & ((place < count - worst) | (place >= size - worst))).reshape(advantages.shape)


def mix_advantages(
    scores: dict[str, np.ndarray], weights: dict[str, np.ndarray], config: GRPOConfig
) -> tuple[np.ndarray, int]:
    """One advantage per sample from the scores of several reward models.

    Args:
        scores: model -> [P, G], NaN where failed. weights: model -> [P, G] or a number; they sum to 1 per sample.
        config: multi_reward_mix `advantage_aggr` takes the weighted sum of each model's advantages, and a failed score
            adds 0. `reward_aggr` computes advantages of the weighted sum of rewards, and a failed score fails the
            sample. use_group: statistics per prompt; else over all P·G samples (`reward_aggr` only).

    Returns:
        advantages [P, G], and the number of flat groups (`advantage_aggr`: groups that are flat in any model).
    """
    if config.multi_reward_mix == "advantage_aggr":
        parts = {name: group_advantages(scores[name], config) for name in weights}
        total = sum(weight * parts[name][0] for name, weight in weights.items())
        return total, int(np.any([flat for _, flat in parts.values()], axis=0).sum())
    total = sum(weight * scores[name] for name, weight in weights.items() if np.any(weight))
    advantages, flat = group_advantages(total if config.use_group else total.reshape(1, -1), config)
    return advantages.reshape(total.shape), int(flat.sum())


def lost_pictures(config: GRPOConfig, scores: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> np.ndarray:
    """Which pictures have no reward, bool [P, pictures]: with `advantage_aggr` all scores that count have failed, with
    `reward_aggr` any. Arguments as in `plan_advantages`.
    """
    failed = np.isnan([scores[name] for name, weight in weights.items() if np.any(weight)])
    return failed.all(0) if config.multi_reward_mix == "advantage_aggr" else failed.any(0)


def plan_advantages(
    config: GRPOConfig,
    plan: Plan,
    scores: dict[str, np.ndarray],
    weights: dict[str, np.ndarray],
    split_log_probs: dict[int, np.ndarray],
) -> tuple[dict[int, np.ndarray], int]:
    """Advantages of the rows of every trained step, or of the pictures for every draw. `fuse` gives a row's score, and
    the rows of one prompt and step form a group. Where a step has several tails (Granular-GRPO), their advantages are
    added.

    Args:
        scores: name -> [P, pictures], NaN where failed. weights: name -> [pictures].
        split_log_probs: as in `fuse`; if empty, a row's score is the plain mean.

    Returns:
        Key of `plan.training` -> advantages [P, rows], NaN where pruned; and the number of flat groups.
    """
    lost = lost_pictures(config, scores, weights)
    scores = scores | {name: np.where(lost, np.nan, scores[name]) for name, weight in weights.items() if np.any(weight)}
    found: dict[int, np.ndarray] = {}
    groups: dict[tuple[int, int], tuple[np.ndarray, int]] = {}
    for leaf, columns in plan.columns.items():
        for position in plan.training if plan.draws else plan.trained_path(leaf):
            count = plan.training[position][0]
            group = (leaf, count)
            if group not in groups:
                below = (count, split_log_probs, config.tree_fusion_temperature)
                fused = {name: fuse(values[:, columns], *below) for name, values in scores.items()}
                shaped = {name: fuse(weight[None, columns], *below) for name, weight in weights.items()}
                groups[group] = mix_advantages(fused, shaped, config)
            found[position] = found.get(position, 0) + groups[group][0]
    if config.tree_width_prune:
        mode, share = config.tree_width_prune, config.tree_width_prune_share
        for position, values in found.items():
            if plan.rows[position] == config.num_generations:  # from the last split on
                kept = kept_pictures(np.where(lost, np.nan, values), config.tree_split_children, mode, share)
                found[position] = np.where(kept, values, np.nan)
    return found, sum(flat for _, flat in groups.values())


def sample_order(advantages: np.ndarray, strategy: str | None, rng: np.random.Generator) -> np.ndarray:
    """The order in which optimizer steps take the G samples of a group: a permutation of 0 … G−1. advantages: [G].

    None keeps the order; `random` shuffles. `balance` shuffles the samples with positive and with negative advantage,
    alternates between them and appends the rest, zeros last, so that optimizer steps see good and bad samples.
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


def reward_means(scores: dict[str, np.ndarray], weights: dict[str, float]) -> dict[str, float]:
    """The metrics reward, reward_std, failed_rewards, failed_{model}, and reward_{name} per model and component."""
    used = np.stack([scores[name] for name in weights])
    complete = np.isfinite(used).all(0)
    reward = np.tensordot(list(weights.values()), used[:, complete], 1)
    metrics = {
        "reward": reward.mean() if complete.any() else math.nan,
        "reward_std": reward.std() if complete.any() else math.nan,
        "failed_rewards": int((~np.isfinite(used)).sum()),
    } | {f"failed_{name}": int((~np.isfinite(scores[name])).sum()) for name in weights}
    for name, values in scores.items():
        finite = values[np.isfinite(values)]
        metrics[f"reward_{name}"] = finite.mean() if len(finite) else math.nan
    return metrics
