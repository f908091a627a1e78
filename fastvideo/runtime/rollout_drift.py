"""How far FP8 in the rollout moves pictures and rewards: one prompt's group, sampled again without FP8."""

from typing import Any, Protocol

from fastvideo.config import GRPOConfig
from fastvideo.io.messages import warn
from fastvideo.runtime.engines import Engine
from fastvideo.runtime.scoring import Scoring
from fastvideo.runtime.throughput import Throughput
from fastvideo.utils.plan import Plan

import numpy as np
import torch
from PIL import Image

LIMIT = 0.2  # if each reward moves at random by this much, advantages still correlate by 0.98
WARNING = (
    "FP8 moves a picture's reward by {:.2g} of its group's standard deviation, more than {:g} (rollout_drift_reward in "
    "metrics.jsonl): advantages then come in part from rounding. Use --rollout_precision bf16"
)


class Sampler(Protocol):
    """What is needed of the trainer. See there."""

    config: GRPOConfig
    engine: Engine
    scoring: Scoring
    throughput: Throughput
    slots: range

    def sample(self, plan: Plan, number: int, slots: range, conditioning: Any, picks: np.ndarray | None) -> Any: ...
    def decode(self, sampled: Any, batch_size: int) -> list[Image.Image]: ...
    def score(self, pictures: list[Image.Image], batch: dict, part: slice, plan: Plan, number: int) -> Any: ...


def rollout_drift(
    trainer: Sampler,
    given: tuple[Plan, int, Any, dict, np.ndarray | None],
    latents: torch.Tensor,
    scores: dict[str, np.ndarray],
) -> dict[str, float]:
    """Compares the first prompt of every data rank. Empty unless a comparison is due, as it is in the first iteration.
    All processes must call it, before the weights change.

    Args:
        given: plan, number, conditioning, batch and picks of the iteration, see `Trainer.sample`.
        latents: [P·pictures, L, C] of this data rank, sampled in FP8. scores: name -> [P, pictures], all data ranks.

    Returns:
        Means over the prompts: `rollout_drift_latents` is ‖x_fp8 − x‖ / ‖x‖ of the final latents x of a group,
        `rollout_drift_reward` the mean |r_fp8 − r| of its pictures, divided by the standard deviation of its r.
    """
    plan, number, conditioning, batch, picks = given
    every, scoring, pictures = trainer.config.rollout_drift_steps, trainer.scoring, plan.pictures
    if trainer.engine.float8 is None or every == 0 or (number - 1) % every:
        return {}
    with trainer.throughput.phase("drift"):
        with trainer.engine.without_float8():
            exact = trainer.sample(plan, number, trainer.slots[:1], conditioning.of(0, 1), picks)
        size = trainer.config.rollout_batch_size or pictures
        moved = (latents[:pictures] - exact.latents).norm() / exact.latents.norm()
        moved = float(trainer.engine.gather(moved[None]).mean())
        scored = []
        if not trainer.engine.place_in_group:  # the first process of a sequence group decodes and scores
            scored = [scoring.begin(trainer.score, trainer.decode(exact, size), batch, slice(1), plan, number)]
        compared = scoring.gather_arrays(scored)

    def rewards(values: dict[str, np.ndarray]) -> np.ndarray:
        return sum(weight * values[name] for name, weight in scoring.weights.items())

    plain = rewards(compared)
    in_float8 = rewards(scores).reshape(len(plain), -1, pictures)[:, 0]
    difference, spread = np.abs(in_float8 - plain), np.nanstd(plain, 1, keepdims=True)
    relative = (difference / np.where(spread > 0, spread, np.nan))[np.isfinite(difference)]
    reward = float(np.nanmean(relative)) if np.isfinite(relative).any() else float("nan")
    if reward > LIMIT and trainer.engine.accelerator.is_main_process:
        warn(WARNING.format(reward, LIMIT))
    return {"rollout_drift_latents": moved, "rollout_drift_reward": reward}
