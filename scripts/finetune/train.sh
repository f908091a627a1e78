# shellcheck shell=bash
# Sourced by E-GRPO's recipes, train_*.sh. A recipe is one `train key=value ... "$@"`: arguments come last and override.
# NPROC_PER_NODE and HOSTFILE as in scripts/environment.sh; MODEL_PATH and DATA_PATH are what all recipes share. What a
# recipe leaves out is E-GRPO's configuration: DEFAULTS and E_GRPO in fastvideo/train.py.
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

train() {
  mention_hostfile
  [[ " $* " != *prompts_file=* ]] || DATA_PATH= # the prompts given by hand count
  run_distributed fastvideo/train.py \
    ${MODEL_PATH:+model.pretrained_model_name_or_path="$MODEL_PATH"} ${DATA_PATH:+data.json_path="$DATA_PATH"} "$@"
}
