#!/usr/bin/env bash
# MixGRPO-Flash with the granular reward on the tiny FLUX, on a CPU in minutes: what scripts/quickstart.sh trains.
# Without a GPU each core gets a process of one thread, as far as 24 prompts per iteration divide. Several threads of one
# process wait for each other in busy loops: slower on a quiet machine, and many times slower on a busy one.
if [ -z "${NPROC_PER_NODE:-}${HOSTFILE:-}" ] && ! [ -e /dev/nvidia0 ]; then
  cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) # nproc would answer OMP_NUM_THREADS
  for processes in 8 6 4 3 2 1; do [ "$processes" -gt "$cores" ] || break; done
  export NPROC_PER_NODE=$processes OMP_NUM_THREADS=1
fi
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flag algorithm mix_grpo_flash
flag pretrained_model_name_or_path data/tiny_flux
cached data/tiny_rl_embeddings/prompt.json
flag output_dir outputs/tiny_mixgrpo
flag experiment_name tiny_mixgrpo
flag h 32
flag w 32
flag sampling_steps 10
flag prompts_per_iteration 24
flag train_micro_batch_size 72
flag iters_per_group 6
flag max_train_steps 50
flag learning_rate 2e-4
flag lr_scheduler cosine
flag reward_model shapes
flag mixed_precision no
flag dataloader_num_workers 0
args+=(--no_gradient_checkpointing --log_with none)
launch "$@"
