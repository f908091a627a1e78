#!/usr/bin/env bash
# DanceGRPO with the HPSv2 reward.
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"
train algorithm=dance_grpo reward=hps output_dir=outputs/dance_grpo "$@"
