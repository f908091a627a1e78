#!/usr/bin/env bash
# DanceGRPO (arXiv 2505.07818) on FLUX.1-dev: noise at all 16 steps, a random 60 % of them trained, one update per iteration,
# HPSv2. Published are two recipes: for 16 GPUs --gradient_accumulation_steps 4; for 8 GPUs --train_batch_size 2
# --max_grad_norm 0.01 --ema_decay 0.995.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag algorithm dance_grpo
flag reward_model hpsv2
flag experiment_name DanceGRPO
flag output_dir outputs/DanceGRPO
launch "$@"
