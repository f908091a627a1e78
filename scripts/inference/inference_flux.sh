#!/usr/bin/env bash
# Samples a prompt file, one process a GPU. Values come from the environment, any flag can follow:
#   the base model:      bash scripts/inference/inference_flux.sh --baseline --output_dir outputs/base
#   a tuned model:       MODEL_PATH=outputs/mixgrpo/checkpoint-300-0 bash scripts/inference/inference_flux.sh
#   hybrid inference:    MODEL_PATH=... bash scripts/inference/inference_flux.sh --mix_sampling_steps 40
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [ -d .venv/bin ]; then PATH="$PWD/.venv/bin:$PATH"; fi
exec torchrun --standalone --nproc_per_node "${GPU_NUM:-1}" -m fastvideo.sample.sample_flux \
  --pretrained_model_name_or_path "${BASE_MODEL_PATH:-data/flux}" \
  --model_path "${MODEL_PATH:-None}" \
  --prompts_file "${PROMPT_FILE:-data/prompts_test.txt}" \
  --output_dir "${OUTPUT_DIR:-outputs/samples}" \
  "$@"
