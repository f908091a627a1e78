#!/usr/bin/env bash
# Scores the pictures of a manifest. Values come from the environment, any flag can follow:
#   MANIFEST=outputs/samples/manifest.json REWARD_MODEL_TYPE=hpsv2,pick_score bash scripts/evaluate/eval_reward.sh
#   bash scripts/evaluate/eval_reward.sh --baseline_manifest outputs/base/manifest.json
# One picture: python -m fastvideo.eval.eval_reward --image cat.png --prompt "a cat" --reward_model_type image_reward
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
exec "$PYTHON_BIN" -m fastvideo.eval.eval_reward \
  --manifest "${MANIFEST:-outputs/samples/manifest.json}" \
  --reward_model_type "${REWARD_MODEL_TYPE:-all}" \
  "$@"
