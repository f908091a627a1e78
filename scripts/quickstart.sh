#!/usr/bin/env bash
# The whole pipeline on the tiny FLUX in data/tiny_flux, on any machine: embed prompts, train MixGRPO with the granular
# reward, sample base and tuned model with the same seeds, score both, write a report. Arguments go to the trainer.
#   OUTPUT_DIR   where everything goes (default: a new folder under outputs/)
cd "$(dirname "$0")/.." && bash env_setup.sh
source scripts/environment.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_PROGRESS_BARS=1
out=${OUTPUT_DIR:-outputs/quickstart-$(date +%Y%m%d-%H%M%S)}
model=data/tiny_flux
reward=shapes
run() {
  printf '\n== %s\n' "$1"
  shift
  "$PYTHON_BIN" -m "$@"
}

run "1/5 embed the training prompts" fastvideo.data_preprocess.preprocess_flux_embedding \
  --model_path $model --prompt_dir data/prompts.txt --output_dir "$out/rl_embeddings"

run "2/5 train MixGRPO" fastvideo.train_grpo_flux \
  --pretrained_model_name_or_path $model --data_json_path "$out/rl_embeddings/prompt.json" --output_dir "$out/run" \
  --experiment_name quickstart --no_use_wandb --mixed_precision no --no_gradient_checkpointing --dataloader_num_workers 0 \
  --h 32 --w 32 --sampling_steps 10 --train_batch_size 24 --train_micro_batch_size 72 \
  --iters_per_group 10 --max_train_steps 46 --learning_rate 1e-4 --reward_model $reward "$@"
tuned=$(ls -d "$out"/run/checkpoint-* | sort -V | tail -n 1)

for which in base tuned; do
  [ $which = base ] && weights=(--baseline) || weights=(--model_path "$tuned")
  run "3/5 sample the $which model on held-out prompts" fastvideo.sample.sample_flux \
    --pretrained_model_name_or_path $model "${weights[@]}" --prompts_file data/prompts_test.txt --output_dir "$out/$which" \
    --seed 42 --images_per_prompt 4 --batch_size 64 --h 32 --w 32 --total_sampling_steps 10
  run "4/5 score them" fastvideo.eval.eval_reward --manifest "$out/$which/manifest.json" \
    --reward_model_type $reward,jpeg_compressibility --output_json "$out/$which/scores.json"
done

run "5/5 report" fastvideo.eval.report --run_dir "$out/run" \
  --baseline_scores "$out/base/scores.json" --tuned_scores "$out/tuned/scores.json" --output_dir "$out/report"
cat <<TXT

Look at
  $out/report/report.html      curves, granular weights, pictures before and after (open it in a browser)
  $out/run/metrics.jsonl       one line an iteration
  $out/run/images/             sample grids during training
  $tuned   the tuned transformer, for FluxTransformer2DModel.from_pretrained
TXT
