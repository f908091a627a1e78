#!/usr/bin/env bash
# Engines on real GPUs: the same first iterations from DDP (or one process), FSDP2, ZeRO-2 and ZeRO-3 on FLUX blocks of full width, a kill
# and a resume, and LoRA on all 12 B parameters at 720x720 on one GPU. Random weights, no downloads.
#   bash benchmarks/engines_gpu.sh agree 4     processes (default 2), 2+4 blocks, 10 iterations an engine; more flags go on
#   bash benchmarks/engines_gpu.sh lora        one GPU, 19+38 blocks, the recipe's G 12 and T 25
#   bash benchmarks/engines_gpu.sh full 8      full fine-tuning under FSDP2, 19+38 blocks, G 4, T 8, window 2
# Metrics go to $OUT (default outputs/engines_gpu); print them with `python benchmarks/compare_runs.py $OUT/*/metrics.jsonl`.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
what=${1:-agree} nproc=${2:-2}
more=("${@:3}") # flags for the trainer
OUT=${OUT:-outputs/engines_gpu}
mkdir -p "$OUT"

model() { # folder, double blocks, single blocks
  [ -f "$1/prompt.json" ] || "$PYTHON_BIN" - "$@" <<'P'
import sys
from pathlib import Path

sys.path.insert(0, "benchmarks")
from bench_iteration import BenchmarkConfig, make_inputs

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
make_inputs(folder, BenchmarkConfig(double_blocks=int(sys.argv[2]), single_blocks=int(sys.argv[3])))
P
}

train() { # name, model folder, processes, flags
  local name=$1 folder=$2 n=$3
  shift 3
  "$PYTHON_BIN" -m torch.distributed.run --standalone --nproc_per_node "$n" fastvideo/train_grpo_flux.py \
    --pretrained_model_name_or_path "$folder" --init_random_flux --data_json_path "$folder/prompt.json" --output_dir "$OUT/$name" \
    --reward_model jpeg_compressibility --no_use_wandb --dataloader_num_workers 0 --image_log_steps 0 "$@" "${more[@]}"
}

small="--h 256 --w 256 --num_generations 4 --sampling_steps 8 --group_size 2 --gradient_accumulation_steps 2"
case $what in
agree)
  model "$OUT/blocks6" 2 4
  common="$small --max_train_steps 10 --checkpointing_steps 5 --learning_rate 1e-6 --prompts_per_iteration $nproc"
  plain=$([ "$nproc" = 1 ] && echo none || echo ddp)
  train "$plain" "$OUT/blocks6" "$nproc" --parallel "$plain" $common
  train fsdp "$OUT/blocks6" "$nproc" --parallel fsdp $common
  train resumed "$OUT/blocks6" "$nproc" --parallel fsdp $common --resume_from_checkpoint "$(echo "$OUT/$plain"/checkpoint-5-*)"
  train zero2 "$OUT/blocks6" "$nproc" --parallel deepspeed --zero_stage 2 $common
  train zero3 "$OUT/blocks6" "$nproc" --parallel deepspeed --zero_stage 3 $common
  train lora_fsdp "$OUT/blocks6" "$nproc" --parallel fsdp --use_lora $common
  ;;
lora)
  model "$OUT/flux12b" 19 38
  train lora "$OUT/flux12b" 1 --use_lora --learning_rate 3e-4 --max_train_steps 2 --num_generations 12 --sampling_steps 25 \
    --train_micro_batch_size "${MICRO:-4}"
  ;;
full)
  model "$OUT/flux12b" 19 38
  train full "$OUT/flux12b" "$nproc" --parallel fsdp $small --h 720 --w 720 --max_train_steps 3 --prompts_per_iteration "$nproc"
  ;;
*) echo "engines_gpu.sh $what: choose from agree, lora, full" >&2; exit 2 ;;
esac
"$PYTHON_BIN" benchmarks/compare_runs.py "$OUT"/*/metrics.jsonl
