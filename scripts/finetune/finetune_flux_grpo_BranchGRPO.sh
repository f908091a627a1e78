#!/usr/bin/env bash
# BranchGRPO (arXiv 2509.06040) on FLUX.1-dev: trajectories split in two at steps 0, 3, 6 and 9, so 16 pictures a prompt.
# ALGORITHM=branch_grpo_mix is the mixed ODE-SDE variant. TREE_WIDTH_PRUNE=1 and DEPTH_PRUNING=16,17,18 train fewer edges.
source "$(dirname "$0")/launch.sh"
flag algorithm branch_grpo
flag experiment_name BranchGRPO
flag output_dir outputs/BranchGRPO
flag sampling_steps 20
flag eta 0.3
flag num_generations 16
flag clip_range 1e-3
flag tree_split_points 0,3,6,9
flag tree_split_noise_scale 4
flag tree_fusion mean
flag tree_width_prune 0
flag depth_pruning None
launch "$@"
