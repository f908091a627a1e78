"""Comparisons within a group as reward (Pref-GRPO, arXiv 2508.20751): a picture's score is its share of wins.

A judge behind --vlm_judge_url, see vlm_judge.py, says which of two pictures is better. A group of G pictures has
G(G−1)/2 comparisons, or with --pairwise_matches n about n·G/2. Every comparison asks twice, in both orders, because
judges prefer a place; a judge that contradicts itself gives each picture ½, as a tie does.
"""

from collections.abc import Sequence
from hashlib import sha256
from itertools import combinations
from typing import Any

from fastvideo.models.reward_model.chat import ChatClient
from fastvideo.models.reward_model.groups import Group
from fastvideo.models.reward_model.spec import RewardConfig
from fastvideo.models.reward_model.vlm_judge import PAIR, judge_client, read_template, try_judge

import numpy as np


def check_pairwise(config: Any) -> None:
    """As check_judge of vlm_judge.py, with a question about two grey pictures."""
    try_judge(config, read_template(config.pairwise_template, "pairwise_template", PAIR))


def chosen_pairs(size: int, matches: int | None, prompt: str) -> list[tuple[int, int]]:
    """The pairs of a group's places that are compared.

    matches: comparisons of each picture; None, or size − 1 and more: with all others. With an odd number of pictures an
    odd `matches` means one more.

    The pictures are put on a circle at random. Each is compared with those at the same few distances from it: with its
    neighbours, which from 2 comparisons on links all pictures, and at distances that are drawn. The choice depends on
    nothing but the arguments.
    """
    if matches is None or matches >= size - 1:
        return list(combinations(range(size), 2))
    matches += size % 2 and matches % 2
    rng = np.random.default_rng(int.from_bytes(sha256(f"{size} {prompt}".encode()).digest()[:8], "big"))
    circle, distances = rng.permutation(size), [1, *rng.permutation(np.arange(2, (size + 1) // 2))]
    steps = [(i, (i + distance) % size) for distance in distances[: matches // 2] for i in range(size)]
    if matches % 2:
        steps += [(i, i + size // 2) for i in range(size // 2)]
    return [tuple(sorted((int(circle[i]), int(circle[j])))) for i, j in steps]


class PairwiseRewardModel:
    """A picture's share of wins, 0 to 1, over others of its group. Attributes: those of VLMJudgeModel."""

    name = "PairwiseRewardModel"
    groupwise = True

    def __init__(
        self,
        urls: str,
        model: str | None = None,
        template: str = RewardConfig.pairwise_template,
        matches: int | None = None,
        num_workers: int = RewardConfig.vlm_judge_num_workers,
        timeout: float = RewardConfig.vlm_judge_timeout,
        retries: int = RewardConfig.vlm_judge_retries,
    ) -> None:
        """matches: see `chosen_pairs`. The other arguments are those of VLMJudgeModel."""
        self.template, self.matches = read_template(template, "pairwise_template", PAIR), matches
        self.client: ChatClient = judge_client(urls, num_workers, timeout, retries)
        self.model, self.judge = self.client.served(model, "vlm_judge_model")

    def score_groups(self, groups: Sequence[Group]) -> list[np.ndarray]:
        """R = wins/comparisons, float64 [G] per group, NaN for a picture without a comparison.

        A comparison counts if both of its questions were answered.
        """
        pairs = [chosen_pairs(len(group.images), self.matches, group.prompt) for group in groups]
        questions = [
            self.template.ask([group.images[i], group.images[j]], group.prompt)
            for group, chosen in zip(groups, pairs, strict=True)
            for a, b in chosen
            for i, j in ((a, b), (b, a))
        ]
        answers = self.client.ask(self.model, questions, self.template.read, "the judge", **self.template.body)
        won = (answers[::2] + 1 - answers[1::2]) / 2  # by the first picture of each pair; NaN: a question failed
        scores, begin = [], 0
        for group, chosen in zip(groups, pairs, strict=True):
            wins, counts = np.zeros(len(group.images)), np.zeros(len(group.images))
            for (a, b), share in zip(chosen, won[begin : begin + len(chosen)], strict=True):
                if np.isfinite(share):
                    wins[[a, b]] += share, 1 - share
                    counts[[a, b]] += 1
            begin += len(chosen)
            scores.append(np.where(counts > 0, wins / np.maximum(counts, 1), np.nan))
        return scores
