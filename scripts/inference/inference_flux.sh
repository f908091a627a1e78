#!/usr/bin/env bash
# Samples a prompt file, NPROC_PER_NODE processes, one a GPU. Values come from the environment, any flag can follow:
#   the base model:      bash scripts/inference/inference_flux.sh --baseline --output_dir outputs/base
#   a tuned model:       MODEL_PATH=outputs/mixgrpo/checkpoint-300-0 bash scripts/inference/inference_flux.sh
#   hybrid inference:    MODEL_PATH=... bash scripts/inference/inference_flux.sh --mix_sampling_steps 40
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
exec "$PYTHON_BIN" -m torch.distributed.run --standalone --nproc_per_node "${NPROC_PER_NODE:-1}" -m fastvideo.sample.sample_flux \
  --pretrained_model_name_or_path "${BASE_MODEL_PATH:-data/flux}" \
  --model_path "${MODEL_PATH:-None}" \
  --prompts_file "${PROMPT_FILE:-data/prompts_test.txt}" \
  --output_dir "${OUTPUT_DIR:-outputs/samples}" \
  "$@"
