"""Rewards that report more than their score, such as its uncertainty."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from PIL import Image


class DetailedReward(ABC):
    """Base of rewards with further numbers per picture. These are logged and evaluated, and have no weight.

    detail_names: the numbers. check_names: questions that the reward answers with 1 (yes) or 0 (no), as in
    GranularRewardModel.
    """

    name: str = ""
    detail_names: tuple[str, ...] = ()
    check_names: tuple[str, ...] = ()

    @abstractmethod
    def score(
        self, images: list[Image.Image], prompts: list[str], **given: Any
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(scores [N], {detail or check: [N]}), float64, NaN where a score failed."""

    def __call__(self, images: list[Image.Image], prompts: list[str], **given: Any) -> np.ndarray:
        """Scores of N images against N prompts, float64 [N]."""
        return self.score(images, prompts, **given)[0]
