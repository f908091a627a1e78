# Sourced by E-GRPO's recipes, train_*.sh. A recipe is one `train key=value ... "$@"`: arguments come last and override.
# NPROC_PER_NODE (default 1) is the number of processes, one a GPU; MODEL_PATH and DATA_PATH are what all recipes share.
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

train() {
  exec "$PYTHON_BIN" -m torch.distributed.run --standalone --nproc_per_node "${NPROC_PER_NODE:-1}" fastvideo/train.py \
    model.pretrained_model_name_or_path="${MODEL_PATH:-ckpt/flux}" \
    data.json_path="${DATA_PATH:-data/rl_embeddings/videos2caption.json}" \
    training.max_train_steps=300 wandb.enabled=false "$@"
}
