#!/usr/bin/env bash
# DanceGRPO (arXiv 2505.07818) on FLUX.1-dev with low-rank adapters of the attention layers: 12 steps, a larger
# learning rate, HPSv2. The published script has --train_batch_size 2.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag algorithm dance_grpo_lora
flag reward_model hpsv2
flag experiment_name DanceGRPO_lora
flag output_dir outputs/DanceGRPO_lora
launch "$@"
