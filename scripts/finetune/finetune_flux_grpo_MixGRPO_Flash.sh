#!/usr/bin/env bash
# MixGRPO-Flash: past the window, second-order DPM-Solver++ on 40 % of the steps; the window moves every 20 iterations.
source "$(dirname "$0")/launch.sh"
flag algorithm mix_grpo_flash
flag experiment_name MixGRPO_Flash
flag output_dir outputs/MixGRPO_Flash
flag group_size 4
flag sample_strategy progressive
flag iters_per_group 20
flag prog_overlap_step 1
flag dpm_algorithm_type dpmsolver++
flag dpm_apply_strategy post
flag dpm_post_compress_ratio 0.4
flag dpm_solver_order 2
flag dpm_solver_type midpoint
launch "$@"
