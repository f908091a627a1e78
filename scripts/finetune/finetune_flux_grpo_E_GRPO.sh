#!/usr/bin/env bash
# E-GRPO (arXiv 2601.00423) on FLUX.1-dev: starts from an ODE run; a group and an optimizer step for each of the first 8
# steps; steps of low entropy are merged with the next ones; HPSv2. To choose them:
# ETA_STEP_LIST=1,2,3 ETA_STEP_MERGE_LIST=1,1,1
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag algorithm grpo_merge
flag reward_model hpsv2
flag experiment_name E_GRPO
flag output_dir outputs/E_GRPO
launch "$@"
