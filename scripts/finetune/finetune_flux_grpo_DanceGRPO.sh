#!/usr/bin/env bash
# DanceGRPO (arXiv 2505.07818) on FLUX.1-dev: noise at all 16 steps, a random 60 % of them trained, one update an iteration.
source "$(dirname "$0")/launch.sh"
flag algorithm dance_grpo
flag experiment_name DanceGRPO
flag output_dir outputs/DanceGRPO
flag sampling_steps 16
flag eta 0.3
flag gradient_accumulation_steps 12
flag timestep_fraction 0.6
launch "$@"
