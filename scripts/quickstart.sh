#!/usr/bin/env bash
# The whole pipeline on the tiny FLUX in data/tiny_flux, on any machine: embed prompts, train MixGRPO with the granular
# reward, sample base and tuned model with the same seeds, score both, write a report. Arguments go to the trainer.
#   OUTPUT_DIR   where everything goes (default: a new folder under outputs/)
#   PYTHON_BIN   interpreter of an environment of your own; without it env_setup.sh makes .venv
cd "$(dirname "$0")/.."
[ -n "${PYTHON_BIN:-}" ] || bash env_setup.sh
source scripts/environment.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_PROGRESS_BARS=1
out=${OUTPUT_DIR:-outputs/quickstart-$(date +%Y%m%d-%H%M%S)}
model=data/tiny_flux
run() {
  printf '\n== %s\n' "$1"
  shift
  "$PYTHON_BIN" -m "$@"
}

run "1/5 embed the training prompts" fastvideo.data_preprocess.preprocess_flux_embedding \
  --model_path $model --prompt_dir data/prompts.txt --output_dir "$out/rl_embeddings"

printf '\n== 2/5 train MixGRPO\n'
bash scripts/finetune/finetune_tiny_flux.sh --data_json_path "$out/rl_embeddings/prompt.json" --output_dir "$out/run" \
  --experiment_name quickstart "$@"
tuned=$(ls -d "$out"/run/checkpoint-* | sort -V | tail -n 1)

sample_and_score() { # NAME, flags that say which model
  run "3/5 sample the $1 model on held-out prompts" fastvideo.sample.sample_flux \
    --pretrained_model_name_or_path $model "${@:2}" --prompts_file data/prompts_test.txt --output_dir "$out/$1" \
    --seed 42 --images_per_prompt 2 --batch_size 64 --h 32 --w 32 --total_sampling_steps 10
  run "4/5 score what the $1 model made" fastvideo.eval.eval_reward --manifest "$out/$1/manifest.json" \
    --reward_model_type shapes,jpeg_compressibility --output_json "$out/$1/scores.json"
}
# Both at once, a thread each: most of these seconds start Python. One progress bar is enough.
set -m # the first in a process group of its own, which ends with this script: Ctrl-C doesn't reach a job in the background
OMP_NUM_THREADS=1 TQDM_DISABLE=1 sample_and_score base --baseline &
base=$!
set +m
trap 'kill -- -$base 2>/dev/null' EXIT
OMP_NUM_THREADS=1 sample_and_score tuned --model_path "$tuned"
wait $base
trap - EXIT

run "5/5 report" fastvideo.eval.report --run_dir "$out/run" \
  --baseline_scores "$out/base/scores.json" --tuned_scores "$out/tuned/scores.json" --output_dir "$out/report"
cat <<TXT

Look at
  $out/report/report.html      curves, granular weights, pictures before and after (open it in a browser)
  $out/run/metrics.jsonl       one line an iteration
  $out/run/images/             sample grids during training
  $tuned   the tuned transformer, for FluxTransformer2DModel.from_pretrained
TXT
