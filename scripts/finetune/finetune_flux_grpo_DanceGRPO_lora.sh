#!/usr/bin/env bash
# DanceGRPO (arXiv 2505.07818) on FLUX.1-dev with low-rank adapters of the attention layers: 12 steps, a larger learning rate.
source "$(dirname "$0")/launch.sh"
flag algorithm dance_grpo_lora
flag experiment_name DanceGRPO_lora
flag output_dir outputs/DanceGRPO_lora
flag sampling_steps 12
flag eta 0.3
flag gradient_accumulation_steps 12
flag timestep_fraction 0.6
flag learning_rate 3e-4
flag lora_rank 128
flag lora_alpha 256
flag lora_target_modules to_q,to_k,to_v,to_out.0
launch "$@"
