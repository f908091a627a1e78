#!/usr/bin/env bash
# DanceGRPO (arXiv 2505.07818) on FLUX.1-dev with low-rank adapters of the attention layers: 12 steps, a larger learning rate.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag algorithm dance_grpo_lora
flag experiment_name DanceGRPO_lora
flag output_dir outputs/DanceGRPO_lora
launch "$@"
