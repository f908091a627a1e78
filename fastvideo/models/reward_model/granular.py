"""Granular rewards: a weighted sum of named components. The weights move during training.

With progress p = clamp(curr_step / total_steps, 0, 1), each weight moves from its start s to its end e:

    linear        s + (e - s) * p
    exponential   s + (e - s) * p**gamma                  gamma 2 by default: slow start
    logarithmic   s + (e - s) * (1 - (1 - p)**gamma)      gamma 0.5 by default: also a slow start; above 1 a fast one
    cosine        s + (e - s) * (1 - cos(pi * p)) / 2

Then the weights are divided by their sum, so start and end weights need not sum to 1: (5, 3, 2) to (2, 5, 3) is the
same as (.5, .3, .2) to (.2, .5, .3). If the two sums differ, the weights with the larger sum count more on the way.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fastvideo.cli import FlagError, choose_from
from fastvideo.models.reward_model.spec import SCHEDULES

import numpy as np
from PIL import Image

RewardModel = Callable[[list[Image.Image], list[str]], Sequence[float]]  # has a `name`; see utils.py
SmoothFunc = Callable[[float, float, np.ndarray], np.ndarray]


def _check_weights(weights: Sequence[float], component_names: Sequence[str], field: str) -> None:
    names = ", ".join(component_names)
    try:
        values = np.asarray(list(weights), dtype=np.float64)
    except (TypeError, ValueError):
        raise FlagError(field, repr(weights), f"expected one number for each of {names}") from None
    if values.shape != (len(component_names),):
        problem = f"expected {len(component_names)} weights, one for each of {names}"
    elif not np.isfinite(values).all() or (values < 0).any():
        problem = f"every weight of {names} must be a finite number >= 0"
    elif values.sum() <= 0:
        problem = f"at least one weight of {names} must be above 0"
    else:
        return
    raise FlagError(field, list(weights), problem)


def check_schedule(
    start_weights: Sequence[float],
    end_weights: Sequence[float],
    schedule: str,
    gamma: float | None,
    component_names: Sequence[str],
) -> None:
    """Raises FlagError for settings that give no schedule.

    Weights must be one finite number >= 0 per component and not all 0; gamma must be None, or finite and above 0.
    """
    _check_weights(start_weights, component_names, "granular_start_weights")
    _check_weights(end_weights, component_names, "granular_end_weights")
    if schedule not in SCHEDULES:
        raise FlagError("granular_schedule", repr(schedule), choose_from(SCHEDULES, schedule))
    if gamma is not None and not (math.isfinite(gamma) and gamma > 0):
        raise FlagError("granular_gamma", gamma, "must be a finite number above 0")


class GranularRewardModel(ABC):
    """Base of rewards made of components. A subclass sets `name` and `component_names`, and has `score_components`.

    check_names: questions that the reward answers with 1 (yes) or 0 (no). They are reported beside the components and
    have no weight in the reward. Evaluation and report show the check `right` (right in everything) first.
    start_weights, end_weights: one weight per component, at the first and at the last step of training.
    schedule: one of SCHEDULES. gamma: exponent of the exponential and logarithmic schedules; None: 2 and
    0.5, the defaults of their functions.
    """

    name: str = "GranularRewardModel"
    component_names: tuple[str, ...] = ()
    check_names: tuple[str, ...] = ()

    def __init__(
        self,
        start_weights: Sequence[float],
        end_weights: Sequence[float],
        schedule: str = "linear",
        gamma: float | None = None,
    ) -> None:
        check_schedule(start_weights, end_weights, schedule, gamma, self.component_names)
        self.start_weights = np.asarray(list(start_weights), dtype=np.float64)
        self.end_weights = np.asarray(list(end_weights), dtype=np.float64)
        self.schedule = schedule
        self.gamma = gamma

    # Each schedule maps start value, end value and progress in [0, 1] (a number or an array) to the value there.
    @staticmethod
    def _linear_smooth(start: float, end: float, progress: np.ndarray) -> np.ndarray:
        return start + (end - start) * progress

    @staticmethod
    def _exponential_smooth(start: float, end: float, progress: np.ndarray, gamma: float = 2.0) -> np.ndarray:
        return start + (end - start) * progress**gamma

    @staticmethod
    def _logarithmic_smooth(start: float, end: float, progress: np.ndarray, gamma: float = 0.5) -> np.ndarray:
        return start + (end - start) * (1 - (1 - progress) ** gamma)

    @staticmethod
    def _cosine_smooth(start: float, end: float, progress: np.ndarray) -> np.ndarray:
        return start + (end - start) * (1 - np.cos(np.pi * progress)) / 2

    def get_dynamic_weights(
        self,
        curr_step: float | np.ndarray,
        total_steps: float,
        smooth_func: SmoothFunc | str | None = None,
    ) -> list[float] | np.ndarray:
        """Weights at a step, a list [components] of sum 1; for an array of N steps float64 [N, components].

        smooth_func: schedule of this call, as a name or a function (start, end, progress) -> value; None: the
        constructor's schedule. The schedules of this class get the constructor's gamma. Steps outside [0, total_steps]
        are clamped. Raises ValueError for total_steps <= 0, a step that isn't finite or an unknown schedule.
        """
        if not (math.isfinite(total_steps) and total_steps > 0):
            raise ValueError(f"total_steps {total_steps}: must be above 0")
        steps = np.asarray(curr_step, dtype=np.float64)
        if not np.isfinite(steps).all():
            raise ValueError(f"curr_step {curr_step}: must be finite")
        progress = np.clip(steps / total_steps, 0.0, 1.0)
        smooth = self.schedule if smooth_func is None else smooth_func
        if isinstance(smooth, str):
            if smooth not in SCHEDULES:
                raise ValueError(f"smooth_func {smooth!r}: {choose_from(SCHEDULES, smooth)}")
            smooth = getattr(self, f"_{smooth}_smooth")
        if self.gamma is not None and smooth in (self._exponential_smooth, self._logarithmic_smooth):
            smooth = partial(smooth, gamma=self.gamma)
        pairs = zip(self.start_weights, self.end_weights, strict=True)
        weights = np.stack([np.broadcast_to(smooth(s, e, progress), progress.shape) for s, e in pairs], axis=-1)
        weights = weights / weights.sum(axis=-1, keepdims=True)
        return weights.tolist() if steps.ndim == 0 else weights

    def _weights_per_image(self, curr_step: float | np.ndarray | None, total_steps: float | None, n: int) -> np.ndarray:
        """[n, components]: the start weights without a step, else one row per image."""
        if curr_step is None:
            weights = self.start_weights / self.start_weights.sum()
        elif total_steps is None:
            raise ValueError("curr_step was given without total_steps")
        else:
            weights = np.asarray(self.get_dynamic_weights(curr_step, total_steps))
        if weights.ndim == 2 and len(weights) != n:
            raise ValueError(f"curr_step has {len(weights)} entries for {n} images")
        return np.broadcast_to(weights, (n, len(self.component_names)))

    def component_weights(
        self, curr_step: float | np.ndarray | None, total_steps: float | None, n: int
    ) -> dict[str, np.ndarray]:
        """Weights of the scores that enter the advantage for this model under `--granular_mix advantage`.

        Returns {f"{name}_{component}": float64 [n]}: one weight per component and image. The weights of an image sum
        to 1. The keys are keys of `compute_reward`'s rewards_dict.
        """
        weights = self._weights_per_image(curr_step, total_steps, n)
        return {f"{self.name}_{c}": weights[:, i].copy() for i, c in enumerate(self.component_names)}

    @abstractmethod
    def score_components(self, images: list[Image.Image], prompts: list[str]) -> dict[str, np.ndarray]:
        """One float64 [N] array per component and per check; NaN where a score failed."""

    def score(
        self,
        images: list[Image.Image],
        prompts: str | list[str],
        curr_step: float | np.ndarray | None = None,
        total_steps: float | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores every component once: (weighted sum [N], {component or check: [N]}), NaN where a score failed.

        An image whose failed component has weight 0 still has a weighted sum.
        """
        found = self.score_components(images, prompt_per_image(prompts, len(images)))
        names = (*self.component_names, *self.check_names)
        if set(found) != set(names):
            raise ValueError(f"{self.name} scored {sorted(found)}, expected {sorted(names)}")
        components = {c: as_scores(found[c], len(images), f"{self.name}_{c}") for c in names}
        weights = self._weights_per_image(curr_step, total_steps, len(images))
        values = np.stack([components[c] for c in self.component_names], axis=1)
        return np.where(weights > 0, weights * values, 0.0).sum(axis=1), components

    def __call__(
        self,
        images: list[Image.Image],
        prompts: str | list[str],
        curr_step: float | np.ndarray | None = None,
        total_steps: float | None = None,
    ) -> list[float]:
        """Weighted sum of the components, one float per image (NaN: failed). Without a step: with the start weights.

        prompts: one per image, or one str for all. curr_step may be an array with one step per image.
        """
        return self.score(images, prompts, curr_step, total_steps)[0].tolist()


def prompt_per_image(prompts: str | Sequence[str], n: int) -> list[str]:
    """One prompt for each of n images; a single str is the prompt of all. ValueError for another number of prompts."""
    texts = [prompts] * n if isinstance(prompts, str) else list(prompts)
    if len(texts) != n:
        raise ValueError(f"{n} images but {len(texts)} prompts")
    return texts


def _on_cpu(value: Any) -> Any:
    """A tensor of any device and number format as a float64 array; other values unchanged."""
    return value.detach().double().cpu().numpy() if hasattr(value, "detach") and not value.is_complex() else value


def as_scores(values: Any, n: int, name: str) -> np.ndarray:
    """A model's answer as float64 [n]; None and numbers that aren't finite become NaN (failed).

    values: n numbers as a list, tuple, numpy array or tensor, [n] or [n, 1], of any number format and device.
    Raises ValueError for anything else.
    """
    problem = f"{name} returned {{}} for {n} pictures; expected {n} numbers, as a list, array or tensor"
    try:
        found = _on_cpu(values)
        if isinstance(found, (list, tuple)):
            found = [np.nan if v is None else _on_cpu(v) for v in found]
        scores = np.asarray(found)
    except (TypeError, ValueError, RuntimeError):  # lists of different lengths, or complex, sparse or quantized tensors
        raise ValueError(problem.format(f"a {type(values).__name__} that is no array of numbers")) from None
    if scores.dtype.kind not in "fiub" and n:  # float, integers, bool
        raise ValueError(problem.format(f"a {type(values).__name__} of {scores.dtype.name} values"))
    if scores.shape not in ((n,), (n, 1)):
        raise ValueError(problem.format(f"scores of shape {scores.shape}"))
    scores = scores.reshape(n).astype(np.float64)
    return np.where(np.isfinite(scores), scores, np.nan)
