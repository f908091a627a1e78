#!/usr/bin/env bash
# Granular-GRPO on FLUX.1-dev: as E-GRPO without merges, and every sample is finished with strides of 1, 2 and 3 steps.
source "$(dirname "$0")/launch.sh"
flag algorithm granular_grpo
flag experiment_name Granular_GRPO
flag output_dir outputs/Granular_GRPO
flag sampling_steps 16
flag learning_rate 2e-6
flag eta_step_list None
flag granular_list 1,2,3
launch "$@"
