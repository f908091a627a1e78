"""A reward whose import gets processes killed with -9 in their third iteration.

DIE_IN is `rollout` (its second noise) or `training` (its second optimizer step's loss); DIE_RANKS are the ranks, such
as `0,1`. One micro-batch an optimizer step and two steps an iteration are taken for granted.
"""

import itertools
import os
import signal
import sys

from custom_rewards import rough_brightness

trainer = sys.modules["__main__"]  # train_grpo_flux.py
losses = itertools.count(1)


def in_rollout(seed: int, iteration: int, slots: range, rows: int, step: int, shape: object) -> bool:
    return (iteration, step) == (3, 1)


def in_training(*_: object) -> bool:
    return next(losses) == 6


def deadly(function, due):
    def call(*args):
        if due(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    return call


if os.environ["RANK"] in os.environ.get("DIE_RANKS", "").split(","):
    name, due = {"rollout": ("draw_noise", in_rollout), "training": ("policy_loss", in_training)}[os.environ["DIE_IN"]]
    setattr(trainer, name, deadly(getattr(trainer, name), due))

__all__ = ["rough_brightness"]
