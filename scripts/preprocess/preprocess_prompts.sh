#!/usr/bin/env bash
# E-GRPO's name and defaults for preprocess_flux_rl_embeddings.sh; also writes videos2caption.json, the index its commands read.
#   MODEL_PATH=ckpt/flux PROMPT_FILE=data/prompts.txt OUTPUT_DIR=data/rl_embeddings NPROC_PER_NODE=8
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
export MODEL_PATH=${MODEL_PATH:-ckpt/flux} OUTPUT_DIR=${OUTPUT_DIR:-data/rl_embeddings} PYTHON_BIN
for ((i = 1; i <= $#; i++)); do # a flag counts more than the environment
  next=$((i + 1))
  case ${!i} in
    --output[_-]dir) OUTPUT_DIR=${!next:-} ;;
    --output[_-]dir=*) OUTPUT_DIR=${!i#*=} ;;
  esac
done
bash scripts/preprocess/preprocess_flux_rl_embeddings.sh "$@"
case " $* " in *" --help "* | *" -h "*) exit 0 ;; esac
exec "$PYTHON_BIN" scripts/preprocess/generate_json_index.py --embedding_dir "$OUTPUT_DIR"
