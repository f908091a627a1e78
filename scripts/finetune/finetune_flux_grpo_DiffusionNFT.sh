#!/usr/bin/env bash
# DiffusionNFT (arXiv 2509.16117) on FLUX.1-dev: likelihood-free, samples with an average of its policies. All steps are
# noise-free. DPM_ALGORITHM_TYPE=dpmsolver++ SAMPLING_STEPS=10 samples with a fast solver. T, G, learning rate and size
# are MixGRPO's.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag algorithm diffusion_nft
flag experiment_name DiffusionNFT
flag output_dir outputs/DiffusionNFT
launch "$@"
