#!/usr/bin/env bash
# E-GRPO's name and defaults for preprocess_flux_rl_embeddings.sh; also writes videos2caption.json, the index its commands read.
#   MODEL_PATH=ckpt/flux PROMPT_FILE=data/prompts.txt OUTPUT_DIR=data/rl_embeddings NPROC_PER_NODE=8
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
export MODEL_PATH=${MODEL_PATH:-ckpt/flux} OUTPUT_DIR=${OUTPUT_DIR:-data/rl_embeddings} PYTHON_BIN
bash scripts/preprocess/preprocess_flux_rl_embeddings.sh "$@"
exec "$PYTHON_BIN" scripts/preprocess/generate_json_index.py --embedding_dir "$OUTPUT_DIR"
