#!/usr/bin/env bash
# FP8 in untrained steps on a GPU that has FP8 products, with random weights and no downloads.
#   bash benchmarks/fp8_gpu.sh mix flash prefix lora learning    (default: all of them, one after the other)
# mix, flash  seconds per iteration and the error of velocities and final latents, with and without FP8: 4+8 blocks, 720x720, G 12, T 25
# prefix      the same for MixGRPO with FP8 before the window too
# lora        LoRA of all 12 B parameters, window at 0
# learning    what the tiny FLUX learns with and without FP8, 3 seeds
# Each command line is printed before its output. Results go to $OUT (default outputs/fp8_gpu).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
OUT=${OUT:-outputs/fp8_gpu}
mkdir -p "$OUT"

bench() { # NAME FLAGS...
  local name=$1
  shift
  set -- benchmarks/bench_iteration.py --json_file "$OUT/$name.json" "$@"
  echo "# $(date +%H:%M:%S) python $*"
  "$PYTHON_BIN" "$@" 2>"$OUT/$name.err" | tee "$OUT/$name.txt"
}

blocks="--train_micro_batch_size 5 --no_gradient_checkpointing"
parts=("$@")
[ $# -gt 0 ] || parts=(mix flash prefix lora learning)
for name in "${parts[@]}"; do
  case $name in
    mix) bench mix --windows 0 10 19 --fp8 $blocks ;;
    flash) bench flash --windows 0 10 19 --fp8 $blocks --algorithm mix_grpo_flash ;;
    prefix) bench prefix --windows 0 10 19 $blocks --rollout_precision fp8 --fp8_steps all --rollout_drift_steps 2 ;;
    lora)
      bench lora --double_blocks 19 --single_blocks 38 --windows 0 --fp8 --use_lora --learning_rate 3e-4 \
        --train_micro_batch_size 4
      ;;
    learning)
      set -- benchmarks/compare_algorithms.py --studies precision --points 2 --jobs 9 --output_dir "$OUT/learning"
      echo "# $(date +%H:%M:%S) python $*"
      "$PYTHON_BIN" "$@" 2>"$OUT/learning.err" | tee "$OUT/learning.txt"
      ;;
    *) echo "fp8_gpu.sh: error: $name: choose from mix, flash, prefix, lora, learning" >&2 && exit 2 ;;
  esac
done
