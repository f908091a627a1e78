#!/usr/bin/env bash
# BranchGRPO with the HPSv2 reward.
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"
train algorithm=branch_grpo reward=hps output_dir=outputs/branch_grpo "$@"
