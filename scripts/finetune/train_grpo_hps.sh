#!/usr/bin/env bash
# E-GRPO with the HPSv2 reward on step 1, unmerged. grpo.eta_step_list=[] chooses steps and merges by entropy.
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"
train algorithm=grpo_merge reward=hps output_dir=outputs/grpo_hps "$@"
