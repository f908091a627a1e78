#!/usr/bin/env bash
# Granular-GRPO (arXiv 2510.01982) on FLUX.1-dev: E-GRPO without merges; every sample is finished with strides of 1, 2 and 3
# steps; HPSv2. The published scripts: GRANULAR_LIST=1,2 REWARD_MODEL=hpsv2,clip_score, whose advantages they sum.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag algorithm granular_grpo
flag reward_model hpsv2
flag experiment_name Granular_GRPO
flag output_dir outputs/Granular_GRPO
launch "$@"
