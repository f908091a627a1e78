#!/usr/bin/env bash
# Scores the pictures of a manifest, on NPROC_PER_NODE processes, one per GPU; with HOSTFILE on all its machines. Values
# come from the environment, any flag can follow:
#   MANIFEST=outputs/samples/manifest.json REWARD_MODEL_TYPE=hpsv2,pick_score bash scripts/evaluate/eval_reward.sh
#   bash scripts/evaluate/eval_reward.sh --baseline_manifest outputs/base/manifest.json --trained_rewards hpsv2
#   bash scripts/evaluate/eval_reward.sh --image cat.png --prompt "a cat"        (also --single_img, --single_img_prompt)
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
given reward_model_type REWARD_MODEL_TYPE
[[ " $* " =~ \ --(image|single[-_]img|config)[=\ ] ]] || set -- --manifest "${MANIFEST:-outputs/samples/manifest.json}" "$@"
run_distributed -m fastvideo.eval.eval_reward "${args[@]}" --override "$@"
