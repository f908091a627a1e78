"""Rewards that end a process, `--reward_model failing_rewards:name`."""

import os


def raises_on_rank_1(images: list, prompts: list[str]) -> list[float]:
    if os.environ["RANK"] == "1":
        raise RuntimeError("on purpose")
    return [0.5] * len(images)
