#!/usr/bin/env bash
# Advantage Weighted Matching (arXiv 2509.25050) on FLUX.1-dev: likelihood-free, flow matching weighted by advantages.
# All steps are noise-free. DPM_ALGORITHM_TYPE=dpmsolver++ SAMPLING_STEPS=10 samples with a fast solver. T, G, learning
# rate and size are MixGRPO's.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag algorithm awm
flag experiment_name AWM
flag output_dir outputs/AWM
launch "$@"
