#!/usr/bin/env bash
# MixGRPO with the HPSv2 reward.
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"
train algorithm=mix_grpo reward=hps output_dir=outputs/mix_grpo "$@"
