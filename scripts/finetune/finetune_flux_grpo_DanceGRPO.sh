#!/usr/bin/env bash
# DanceGRPO (arXiv 2505.07818) on FLUX.1-dev: noise at all 16 steps, a random 60 % of them trained, one update per iteration.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag algorithm dance_grpo
flag experiment_name DanceGRPO
flag output_dir outputs/DanceGRPO
launch "$@"
