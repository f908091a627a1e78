#!/usr/bin/env bash
# E-GRPO with HPSv2, ImageReward and PickScore.
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"
train algorithm=grpo_merge reward=multi_reward reward.image_reward_mode=overall output_dir=outputs/multi_reward "$@"
