#!/usr/bin/env bash
# BranchGRPO (arXiv 2509.06040) on FLUX.1-dev: rows split in two at steps 0, 3, 6 and 9, which gives 16 images per prompt;
# HPSv2; an optimizer step per 12 edges. The published script has --train_batch_size 2.
# ALGORITHM=branch_grpo_mix is the mixed ODE-SDE variant. TREE_WIDTH_PRUNE=1 and DEPTH_PRUNING=16,17,18 train fewer edges.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag algorithm branch_grpo
flag reward_model hpsv2
flag experiment_name BranchGRPO
flag output_dir outputs/BranchGRPO
launch "$@"
