#!/usr/bin/env bash
# Flow-GRPO (arXiv 2505.05470) on FLUX.1-dev: noise at all steps, all but the last trained. FLOW_GRPO_FAST_STEPS=2 is
# Flow-GRPO-Fast: noise only in 2 consecutive steps, drawn at random in every iteration. T, G, learning rate and size are
# MixGRPO's; Flow-GRPO's own are in docs/algorithms.md, "Published recipes".
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag algorithm flow_grpo
flag experiment_name FlowGRPO
flag output_dir outputs/FlowGRPO
launch "$@"
