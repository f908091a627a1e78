#!/usr/bin/env bash
# MixGRPO (arXiv 2507.21802) on FLUX.1-dev: a window of 4 stochastic steps slides over the 25, one step every 25 iterations.
# The reward is Hier-ImageReward. The paper's mix instead: REWARD_MODEL=multi_reward IMAGE_REWARD_MODE=overall
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag algorithm mix_grpo
flag experiment_name MixGRPO
flag output_dir outputs/MixGRPO
launch "$@"
