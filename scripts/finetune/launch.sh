# shellcheck shell=bash
# Sourced by the recipes. A recipe is a list of `flag NAME VALUE` and one `launch "$@"`.
#   flag NAME VALUE   passes --NAME VALUE; an environment variable of the name in capitals overrides the value
#   launch ARGS       starts the trainer; ARGS come last, so they override everything
# NPROC_PER_NODE and HOSTFILE say on how many processes and machines: scripts/environment.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

args=() told=" "
flag() {
  local name=${1^^}
  if [ -n "${!name:-}" ] && [[ $told != *" $name "* ]]; then # H and SEED may be there for something else
    echo "--$1 ${!name}, from the environment variable $name" >&2
    told+="$name "
  fi
  args+=("--$1" "${!name:-$2}")
}

launch() {
  run_distributed fastvideo/train_grpo_flux.py "${args[@]}" "$@"
}

# What all recipes for FLUX.1-dev share. Prompts are embedded beforehand: scripts/preprocess/preprocess_flux_rl_embeddings.sh
flag pretrained_model_name_or_path data/flux
flag data_json_path data/rl_embeddings/prompt.json
flag seed 714
flag sampler_seed 7144
flag h 720
flag w 720
flag sampling_steps 25
flag shift 3
flag eta 0.7
flag num_generations 12
flag gradient_accumulation_steps 3
flag train_batch_size 1
flag max_train_steps 300
flag checkpointing_steps 50
flag learning_rate 1e-5
flag lr_warmup_steps 0
flag weight_decay 1e-4
flag max_grad_norm 1.0
flag clip_range 1e-4
flag adv_clip_max 5.0
flag kl_coeff 0.0
flag multi_reward_mix advantage_aggr
# Hier-ImageReward. The paper's mix instead: REWARD_MODEL=multi_reward IMAGE_REWARD_MODE=overall
flag reward_model image_reward
flag image_reward_mode granular
flag mixed_precision bf16
