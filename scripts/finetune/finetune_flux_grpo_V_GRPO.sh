#!/usr/bin/env bash
# V-GRPO (arXiv 2604.23380) on FLUX.1-dev: likelihood-free. All steps are noise-free, and training predicts the finished
# pictures from fresh noise. DPM_ALGORITHM_TYPE=dpmsolver++ SAMPLING_STEPS=10 samples with a fast solver. T, G, learning
# rate and size are MixGRPO's.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag algorithm v_grpo
flag experiment_name V_GRPO
flag output_dir outputs/V_GRPO
launch "$@"
