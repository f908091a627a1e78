#!/usr/bin/env bash
# Samples a prompt file, NPROC_PER_NODE processes, one per GPU; with HOSTFILE on all its machines, which then share
# OUTPUT_DIR. Values come from the environment, any flag can follow:
#   MixGRPO's published weights, if they are in mix_grpo_ckpt (download_checkpoints.sh mixgrpo), as MixGRPO samples them:
#                        bash scripts/inference/inference_flux.sh --mix_sampling_steps 30 --seed 617
#   the base model:      bash scripts/inference/inference_flux.sh --baseline --output_dir outputs/base
#   a tuned model:       MODEL_PATH=outputs/mixgrpo/checkpoint-300-0 bash scripts/inference/inference_flux.sh
#   hybrid inference:    MODEL_PATH=... bash scripts/inference/inference_flux.sh --mix_fraction 0.8
#   a sweep:             MODEL_PATH=... bash scripts/inference/inference_flux.sh --mix_fraction 0.2,0.5,0.8
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
published=mix_grpo_ckpt/diffusion_pytorch_model.safetensors
[ -n "${MODEL_PATH:-}" ] || [ ! -f $published ] || MODEL_PATH=$published # --model_path and --baseline override it
given pretrained_model_name_or_path BASE_MODEL_PATH
given model_path MODEL_PATH
given prompts_file PROMPT_FILE
given output_dir OUTPUT_DIR
run_distributed -m fastvideo.sample.sample_flux "${args[@]}" --override "$@"
