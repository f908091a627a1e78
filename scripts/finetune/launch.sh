# shellcheck shell=bash
# Sourced by the recipes. A recipe names its algorithm and what differs from the trainer's defaults (fastvideo/config.py):
#   flag NAME VALUE   passes --NAME VALUE
#   launch ARGS       starts the trainer
# Environment variables count more than the recipe, ARGS more than both, also where two flags exclude each other.
# NPROC_PER_NODE and HOSTFILE say on how many processes and machines: scripts/environment.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

# Flags that an environment variable with their name in capitals sets: SEED=3 REWARD_MODEL=hpsv2 bash scripts/finetune/...
FROM_ENVIRONMENT="
  pretrained_model_name_or_path data_json_path prompts_file output_dir experiment_name seed sampler_seed
  algorithm h w sampling_steps shift eta timestep_fraction flow_grpo_fast_steps
  num_generations gradient_accumulation_steps train_batch_size prompts_per_iteration train_micro_batch_size
  max_train_steps checkpointing_steps learning_rate lr_scheduler lr_warmup_steps weight_decay max_grad_norm mixed_precision
  clip_range adv_clip_max kl_coeff multi_reward_mix reward_model image_reward_mode
  group_size sample_strategy iters_per_group prog_overlap_step
  dpm_algorithm_type dpm_apply_strategy dpm_post_compress_ratio dpm_solver_order dpm_solver_type
  entropy_threshold eta_step_list eta_step_merge_list granular_list
  tree_split_points tree_split_noise_scale tree_fusion tree_width_prune depth_pruning
  lora_rank lora_alpha lora_target_modules
"

flag() {
  args+=("--$1" "$2")
}

launch() {
  local name variable
  args+=(--override)
  for name in $FROM_ENVIRONMENT; do
    variable=${name^^}
    [ -z "${!variable:-}" ] || echo "--$name ${!variable}, from the environment variable $variable" >&2 # H may be another's
    given "$name" "$variable"
  done
  mention_hostfile
  run_distributed fastvideo/train_grpo_flux.py "${args[@]}" --override "$@"
}

# cached INDEX   prompts that are embedded beforehand, unless --prompts_file names others
cached() {
  [[ " $arguments" == *" --prompts"[_-]"file"* ]] || flag data_json_path "$1"
}

arguments="$*" # of the recipe, which sources this file
cached data/rl_embeddings/prompt.json # by scripts/preprocess/preprocess_flux_rl_embeddings.sh
