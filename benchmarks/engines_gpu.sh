#!/usr/bin/env bash
# Engines on real GPUs, with random weights and no downloads.
#   bash benchmarks/engines_gpu.sh agree 2    the same 10 iterations on 2+4 blocks of full width from each engine: DDP, FSDP2, FSDP2 resumed
#                                             from DDP's checkpoint, killed with -9 and resumed, with CPU offload, ZeRO-2, ZeRO-3, LoRA
#   bash benchmarks/engines_gpu.sh split 2    the same from one process, and from 2 that share each picture (--sp_size 2)
#   bash benchmarks/engines_gpu.sh lora 4     all 12 B parameters at 720x720, G 4, T 8, window 2: seconds by phase and memory
#   bash benchmarks/engines_gpu.sh full 4     the same, all of them trained under FSDP2
# The second word is the number of processes, the third a comma-separated choice of what to run (agree alone). BLOCKS="2 4"
# sets the double and single blocks of agree and split. Results go to $OUT (default outputs/engines_gpu).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
what=${1:-agree} nproc=${2:-2} choice=${3:-plain,fsdp,resumed,killed,offload,zero2,zero3,lora}
OUT=${OUT:-outputs/engines_gpu}
read -r double single <<<"${BLOCKS:-2 4}"
blocks=$OUT/blocks$double+$single
mkdir -p "$OUT"

torchrun() { "$PYTHON_BIN" -m fastvideo.torchrun --standalone --nproc_per_node "$@"; }

model() { # which several of these scripts may share
  mkdir -p "$blocks"
  (
    flock 9
    [ -f "$blocks/prompt.json" ] || PYTHONPATH=benchmarks:${PYTHONPATH:-} "$PYTHON_BIN" -c "
from pathlib import Path
from bench_iteration import BenchmarkConfig, make_inputs
make_inputs(Path('$blocks'), BenchmarkConfig(double_blocks=$double, single_blocks=$single))"
  ) 9>"$blocks.lock"
}

train() { # name, flags
  local name=$1
  shift
  torchrun "$nproc" fastvideo/train_grpo_flux.py --pretrained_model_name_or_path "$blocks" --init_random_flux \
    --data_json_path "$blocks/prompt.json" --output_dir "$OUT/$name" --reward_model jpeg_compressibility --no_use_wandb \
    --dataloader_num_workers 0 --image_log_steps 0 --compile false --h 256 --w 256 --num_generations 4 --sampling_steps 8 \
    --group_size 2 --gradient_accumulation_steps 2 --max_train_steps 10 --checkpointing_steps 5 --learning_rate 1e-6 "$@" \
    >"$OUT/$name.log" 2>&1 || { tail -n 30 "$OUT/$name.log" && return 1; }
}

bench() { # flags
  torchrun "$nproc" benchmarks/bench_iteration.py --double_blocks 19 --single_blocks 38 --windows 0 3 --folder "$OUT/flux12b_$nproc" \
    --json_file "$OUT/$what$nproc.json" --num_generations 4 --sampling_steps 8 --group_size 2 --gradient_accumulation_steps 2 \
    --train_micro_batch_size 2 "$@"
}

killed() { # after the sixth of ten iterations, and resumed
  train killed "$@" &
  local run=$! metrics=$OUT/killed/metrics.jsonl
  until [ "$(grep -c step "$metrics" 2>/dev/null)" -ge 6 ] 2>/dev/null; do kill -0 "$run" && sleep 0.1; done
  pkill -9 -f -- "--output_dir $OUT/killed"
  wait "$run" || true
  train killed "$@" --resume_from_checkpoint latest
}

case $what in
agree)
  model
  plain=ddp
  [ "$nproc" != 1 ] || plain=none
  for name in ${choice//,/ }; do
    case $name in
    plain) train plain --parallel "$plain" ;;
    fsdp) train fsdp --parallel fsdp ;;
    resumed) train resumed --parallel fsdp --resume_from_checkpoint "$(echo "$OUT"/plain/checkpoint-5-*)" ;;
    killed) killed --parallel fsdp ;;
    offload) train offload --parallel fsdp --use_cpu_offload ;;
    zero2) train zero2 --parallel deepspeed --zero_stage 2 ;;
    zero3) train zero3 --parallel deepspeed --zero_stage 3 ;;
    lora) train lora --parallel fsdp --use_lora ;;
    *) echo "engines_gpu.sh agree $nproc $name: choose from plain, fsdp, resumed, killed, offload, zero2, zero3, lora" >&2 && exit 2 ;;
    esac
    "$PYTHON_BIN" benchmarks/compare_runs.py "$OUT/$name/metrics.jsonl"
    rm -rf "$OUT/$name"/checkpoint-10-*
  done
  ;;
split)
  model
  parts=$nproc
  train "split$parts" --parallel ddp --sp_size "$parts"
  nproc=1
  train split1 --parallel none
  "$PYTHON_BIN" benchmarks/compare_runs.py "$OUT"/split*/metrics.jsonl
  ;;
lora) bench --use_lora --learning_rate 3e-4 ;;
full) bench --parallel fsdp ;;
*) echo "engines_gpu.sh $what: choose from agree, split, lora, full" >&2 && exit 2 ;;
esac
