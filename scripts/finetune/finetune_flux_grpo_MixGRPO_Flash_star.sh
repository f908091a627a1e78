#!/usr/bin/env bash
# MixGRPO-Flash*: the window stays on the first 4 steps, the rest is compressed to 20 %.
source "$(dirname "$0")/launch.sh"
flag algorithm mix_grpo_flash_star
flag experiment_name MixGRPO_Flash_star
flag output_dir outputs/MixGRPO_Flash_star
flag group_size 4
flag prog_overlap_step 0
flag dpm_algorithm_type dpmsolver++
flag dpm_apply_strategy post
flag dpm_post_compress_ratio 0.2
flag dpm_solver_order 2
flag dpm_solver_type midpoint
launch "$@"
