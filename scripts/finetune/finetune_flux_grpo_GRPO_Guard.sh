#!/usr/bin/env bash
# MixGRPO with GRPO-Guard (arXiv 2510.22319): normalised probability ratios, a loss that weighs all steps alike, and a
# clip range that acts on both sides. Other algorithms take the same flags.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag algorithm mix_grpo
flag step_weights velocity
flag clip_range 2e-6
flag experiment_name GRPO_Guard
flag output_dir outputs/GRPO_Guard
launch --ratio_norm "$@"
