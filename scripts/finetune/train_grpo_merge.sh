#!/usr/bin/env bash
# E-GRPO on steps 1 to 3, unmerged, every sample finished with strides of 1 and 2 steps; HPSv2.
source "$(dirname "${BASH_SOURCE[0]}")/train.sh"
train algorithm=grpo_merge reward=hps output_dir=outputs/grpo_merge 'grpo.eta_step_list=[1,2,3]' 'grpo.eta_step_merge_list=[1,1,1]' 'grpo.granular_list=[1,2]' "$@"
