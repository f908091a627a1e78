# shellcheck shell=bash
# Sourced by E-GRPO's recipes, train_*.sh. A recipe is one `train key=value ... "$@"`: arguments come last and override.
# NPROC_PER_NODE and HOSTFILE as in scripts/environment.sh; MODEL_PATH and DATA_PATH are what all recipes share.
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

train() {
  run_distributed fastvideo/train.py \
    model.pretrained_model_name_or_path="${MODEL_PATH:-ckpt/flux}" \
    data.json_path="${DATA_PATH:-data/rl_embeddings/videos2caption.json}" \
    wandb.enabled=false "$@"
}
