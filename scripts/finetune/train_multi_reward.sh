#!/usr/bin/env bash
# E-GRPO on step 1 with HPSv2, ImageReward (its plain score) and PickScore.
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"
train algorithm=grpo_merge reward=multi_reward output_dir=outputs/multi_reward "$@"
