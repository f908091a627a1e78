#!/usr/bin/env bash
# Prompts to cached embeddings, one process a GPU. Values come from the environment, any flag can follow:
#   MODEL_PATH=data/flux PROMPT_FILE=data/prompts.txt OUTPUT_DIR=data/rl_embeddings GPU_NUM=8 \
#     bash scripts/preprocess/preprocess_flux_rl_embeddings.sh --max_sequence_length 256
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [ -d .venv/bin ]; then PATH="$PWD/.venv/bin:$PATH"; fi
exec torchrun --standalone --nproc_per_node "${GPU_NUM:-1}" -m fastvideo.data_preprocess.preprocess_flux_embedding \
  --model_path "${MODEL_PATH:-data/flux}" \
  --prompt_dir "${PROMPT_FILE:-data/prompts.txt}" \
  --output_dir "${OUTPUT_DIR:-data/rl_embeddings}" \
  "$@"
