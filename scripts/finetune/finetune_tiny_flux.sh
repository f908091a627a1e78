#!/usr/bin/env bash
# MixGRPO with the granular reward on the tiny FLUX, on a CPU in minutes: what scripts/quickstart.sh trains.
# Many prompts an iteration, a learning rate that falls to 0 and parts normalised within their group (--granular_mix
# advantage), or the small model forgets its colours while it learns shapes.
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag pretrained_model_name_or_path data/tiny_flux
flag data_json_path data/tiny_rl_embeddings/prompt.json
flag output_dir outputs/tiny_mixgrpo
flag experiment_name tiny_mixgrpo
flag h 32
flag w 32
flag sampling_steps 10
flag train_batch_size 24
flag train_micro_batch_size 72
flag iters_per_group 10
flag max_train_steps 75
flag learning_rate 1e-4
flag lr_scheduler cosine
flag reward_model shapes
flag granular_mix advantage
flag mixed_precision no
launch --no_gradient_checkpointing --no_use_wandb --dataloader_num_workers 0 "$@"
