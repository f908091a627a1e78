#!/usr/bin/env bash
# Granular-GRPO on FLUX.1-dev: E-GRPO without merges; every sample is finished with strides of 1, 2 and 3 steps.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag algorithm granular_grpo
flag experiment_name Granular_GRPO
flag output_dir outputs/Granular_GRPO
launch "$@"
