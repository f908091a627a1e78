#!/usr/bin/env bash
# MixGRPO-Flash on FLUX.2-klein-base-4B: finetune_flux2_klein_MixGRPO.sh with fewer evaluations past the window.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag algorithm mix_grpo_flash
flag pretrained_model_name_or_path data/flux2_klein
cached data/flux2_klein_rl_embeddings/prompt.json
flag rollout_batch_size 6
flag train_micro_batch_size 4
flag experiment_name flux2_klein_MixGRPO_Flash
flag output_dir outputs/flux2_klein_MixGRPO_Flash
launch "$@"
