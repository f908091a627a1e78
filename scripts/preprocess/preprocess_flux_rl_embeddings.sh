#!/usr/bin/env bash
# Prompts to cached embeddings, NPROC_PER_NODE processes, one per GPU; with HOSTFILE on all its machines, which then share
# OUTPUT_DIR. Values come from the environment, any flag can follow:
#   MODEL_PATH=data/flux PROMPT_FILE=data/prompts.txt OUTPUT_DIR=data/rl_embeddings NPROC_PER_NODE=8 \
#     bash scripts/preprocess/preprocess_flux_rl_embeddings.sh --max_sequence_length 256
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
given model_path MODEL_PATH
given prompt_dir PROMPT_FILE
given output_dir OUTPUT_DIR
run_distributed -m fastvideo.data_preprocess.preprocess_flux_embedding "${args[@]}" --override "$@"
