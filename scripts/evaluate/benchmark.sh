#!/usr/bin/env bash
# Samples and scores a published benchmark on NPROC_PER_NODE processes, one per GPU; with HOSTFILE on all its machines,
# which then share the folder of the results. NAME: hpsv2, partiprompts, drawbench, geneval, dpg, t2i_compbench.
#   the prompts, once:  bash scripts/huggingface/download_checkpoints.sh prompts
#   the base model:     bash scripts/evaluate/benchmark.sh NAME --baseline
#   a tuned model:      bash scripts/evaluate/benchmark.sh NAME --model_path outputs/mixgrpo/checkpoint-300-0 \
#                         --baseline_manifest outputs/benchmarks/NAME/base/manifest.json
# Any flag of sampling and of the rewards can follow. The same command goes on with what an interrupted one left.
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
  set -- --benchmark "$@"
fi
given pretrained_model_name_or_path BASE_MODEL_PATH
given model_path MODEL_PATH
run_distributed -m fastvideo.eval.run_benchmark "${args[@]}" --override "$@"
