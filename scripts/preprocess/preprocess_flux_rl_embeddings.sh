#!/usr/bin/env bash
# Prompts to cached embeddings, NPROC_PER_NODE processes, one a GPU. Values come from the environment, any flag can follow:
#   MODEL_PATH=data/flux PROMPT_FILE=data/prompts.txt OUTPUT_DIR=data/rl_embeddings NPROC_PER_NODE=8 \
#     bash scripts/preprocess/preprocess_flux_rl_embeddings.sh --max_sequence_length 256
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
exec "$PYTHON_BIN" -m torch.distributed.run --standalone --nproc_per_node "${NPROC_PER_NODE:-1}" -m fastvideo.data_preprocess.preprocess_flux_embedding \
  --model_path "${MODEL_PATH:-data/flux}" \
  --prompt_dir "${PROMPT_FILE:-data/prompts.txt}" \
  --output_dir "${OUTPUT_DIR:-data/rl_embeddings}" \
  "$@"
