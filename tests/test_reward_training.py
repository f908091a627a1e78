"""Training runs through the command line with every real reward, on narrow random-weight checkpoints."""

import math

import numpy as np
import pytest
from reward_checkpoints import CLIP_SCORE_FOLDER, HPS_FILE, PICK_SCORE_FOLDER

HPS, CLIP, IMAGE, PICK = "HPSClipRewardModel CLIPScoreRewardModel ImageRewardModel PickScoreRewardModel".split()
GRANULAR = [IMAGE, *(f"{IMAGE}_{component}" for component in ("blip", "clip", "aesthetic"))]
RUNS = {
    "granular raw": ("image_reward", {"granular_mix": "raw"}, GRANULAR),
    "granular advantage": ("image_reward", {"granular_mix": "advantage"}, GRANULAR),
    "overall": ("image_reward", {"image_reward_mode": "overall"}, [IMAGE]),
    "hpsv2": ("hpsv2", {}, [HPS]),
    "clip_score": ("clip_score", {}, [CLIP]),
    "pick_score": ("pick_score", {}, [PICK]),
    "custom": ("custom_rewards:brightness", {}, ["brightness"]),
    "hpsv2_clip_score": ("hpsv2_clip_score", {"hps_weight": 3}, [HPS, CLIP]),
    "multi_reward, advantages": (
        "multi_reward", {"image_reward_mode": "overall", "multi_reward_mix": "advantage_aggr"}, [HPS, IMAGE, PICK],
    ),
    "multi_reward, rewards": (
        "multi_reward", {"image_reward_mode": "overall", "multi_reward_mix": "reward_aggr"}, [HPS, IMAGE, PICK],
    ),
    "multi_reward with a granular part": ("multi_reward", {"granular_mix": "advantage"}, [HPS, PICK, *GRANULAR]),
}  # fmt: skip


@pytest.fixture
def train_with(narrow_rewards, train):
    """train_with(reward_model, name=value, ...): a run on the narrow checkpoints."""
    paths = {
        "hps_path": narrow_rewards / "hps_ckpt" / HPS_FILE,
        "clip_score_path": narrow_rewards / CLIP_SCORE_FOLDER,
        "pick_score_path": narrow_rewards / PICK_SCORE_FOLDER,
        "image_reward_score_dir": narrow_rewards / "image_reward_ckpt",
    }
    return lambda reward, **given: train(reward_model=reward, **paths, **given)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_each_reward_scores_logs_and_learns(name, train_with):
    reward, settings, keys = RUNS[name]
    run = train_with(reward, **settings)
    assert len(run.metrics) == 2
    for line in run.metrics:
        assert {key for key in line if key.startswith("reward_")} == {"reward_std", *(f"reward_{key}" for key in keys)}
        assert all(math.isfinite(line[f"reward_{key}"]) for key in keys)
        assert line["failed_rewards"] == 0 and line["zero_spread_groups"] == 0
        assert line["optimizer_steps"] % 2 == 0 and line["grad_norm"] > 0
    assert len({line[f"reward_{keys[0]}"] for line in run.metrics}) == 2  # other pictures, other scores


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["advantage_aggr", "reward_aggr"])
@pytest.mark.parametrize("failing", [False, True])
def test_a_mix_trains_with_one_reward_failing_or_not(mix, failing, train_with):
    other = "custom_rewards:first_of_each_batch_fails" if failing else "custom_rewards:brightness"
    run = train_with(f"pick_score:2,{other}", multi_reward_mix=mix)
    for line in run.metrics:
        assert line["failed_rewards"] == int(failing) and line["grad_norm"] > 0 and line["skipped_steps"] == 0
        assert np.isfinite([line[f"reward_{PICK}"], line[f"reward_{other.split(':')[1]}"], line["loss"]]).all()
