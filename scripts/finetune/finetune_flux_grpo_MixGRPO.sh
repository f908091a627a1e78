#!/usr/bin/env bash
# MixGRPO (arXiv 2507.21802) on FLUX.1-dev: a window of 4 stochastic steps slides over the 25, one step every 25 iterations.
source "$(dirname "$0")/launch.sh"
flag algorithm mix_grpo
flag experiment_name MixGRPO
flag output_dir outputs/MixGRPO
flag group_size 4
flag sample_strategy progressive
flag iters_per_group 25
flag prog_overlap_step 1
launch "$@"
