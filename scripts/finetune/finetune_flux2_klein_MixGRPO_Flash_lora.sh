#!/usr/bin/env bash
# MixGRPO-Flash on FLUX.2-klein-base-4B with low-rank adapters, for one 24 GB GPU: measured are 15.3 GiB, predicted 14.9, without rewards.
# Flash, because it needs less than half of MixGRPO's evaluations in the rollout.
# alpha is the rank: programs that don't read alpha from the file's metadata, such as ComfyUI, then apply the adapters as
# they were trained. The learning rate is that of LoRA for FLUX.1, where alpha is twice the rank; it wasn't tuned. A higher
# one would be bold: guidance of 4 makes four times as much of what the adapters change in the prompt's velocity.
# Batches don't change results; smaller ones, or --quantize_base, leave room for larger pictures and rewards.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag algorithm mix_grpo_flash
flag pretrained_model_name_or_path data/flux2_klein
cached data/flux2_klein_rl_embeddings/prompt.json
flag lora_rank 128
flag lora_alpha 128
flag learning_rate 3e-4
flag rollout_batch_size 6
flag train_micro_batch_size 4
flag experiment_name flux2_klein_MixGRPO_Flash_lora
flag output_dir outputs/flux2_klein_MixGRPO_Flash_lora
launch --use_lora "$@"
