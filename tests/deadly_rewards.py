"""A reward module whose import makes processes kill themselves with -9 in their third iteration.

DIE_IN is `rollout` (the first noise after the initial one) or `training` (the loss of the second optimizer step).
DIE_RANKS are the ranks, such as `0,1`. The tests have one micro-batch per optimizer step and two steps per iteration.
"""

import itertools
import os
import signal
import sys

from custom_rewards import rough_brightness

trainer = sys.modules["__main__"]  # train_grpo_flux.py
losses = itertools.count(1)


def in_rollout(noise: object, stream: int, rows: int) -> bool:
    return (noise.iteration, stream) == (3, 1)


def in_training(*_: object) -> bool:
    return next(losses) == 6


def deadly(function, due):
    def call(*args):
        if due(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    return call


# Not in the process that only asks for scores of two pictures before the run.
if hasattr(trainer, "Noise") and os.environ["RANK"] in os.environ.get("DIE_RANKS", "").split(","):
    if os.environ["DIE_IN"] == "rollout":
        trainer.Noise.__call__ = deadly(trainer.Noise.__call__, in_rollout)
    else:
        trainer.policy_loss = deadly(trainer.policy_loss, in_training)

__all__ = ["rough_brightness"]
