#!/usr/bin/env bash
# MixGRPO (arXiv 2507.21802) on FLUX.2-klein-base-4B, all weights trained. Guidance, the schedule's shift and LoRA's layers
# follow from the model (fastvideo/family_defaults.py); the other values are MixGRPO's for FLUX.1, and weren't tuned for it.
# A velocity with guidance takes two passes, so a row needs the memory of two. With these batches one 80 GB GPU holds
# everything (74 GiB, measured without reward models; --reward_dtype bf16 keeps those small). They don't change results.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag algorithm mix_grpo
flag pretrained_model_name_or_path data/flux2_klein
cached data/flux2_klein_rl_embeddings/prompt.json
flag rollout_batch_size 6
flag train_micro_batch_size 4
flag experiment_name flux2_klein_MixGRPO
flag output_dir outputs/flux2_klein_MixGRPO
launch "$@"
