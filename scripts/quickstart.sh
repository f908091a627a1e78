#!/usr/bin/env bash
# The whole pipeline on the tiny FLUX in data/tiny_flux, on any machine: embed prompts, train MixGRPO-Flash with the
# granular reward, draw the withheld scenes with base and tuned model from the same noise, score both, write a report.
# Arguments go to the trainer, except --output_dir and --pretrained_model_name_or_path.
# `--resume_from_checkpoint latest` goes on with the last quickstart under outputs/, or in OUTPUT_DIR; repeat your flags.
#   OUTPUT_DIR   folder for everything; it must not hold a run already (default: a new folder under outputs/)
#   PYTHON_BIN   Python of your own environment; without it env_setup.sh makes .venv
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_PROGRESS_BARS=1
out=${OUTPUT_DIR:-outputs/quickstart-$(date +%Y%m%d-%H%M%S)}
given=" $* " && given=${given//-/_} # the trainer takes --output-dir as well
case $given in *" __resume_from_checkpoint latest "* | *" __resume_from_checkpoint=latest "*)
  earlier=$(compgen -G "outputs/quickstart-*/run" | tail -n 1) # the names hold the time
  out=${OUTPUT_DIR:-$(dirname "${earlier:-$out/run}")}
  ;;
esac
unset OUTPUT_DIR # the recipe would read it too
for flag in "$@"; do # before the installation
  flag=${flag%%=*}
  case ${flag//-/_} in
    __output_dir) problem="put OUTPUT_DIR=… before the command instead, for a folder for everything" ;;
    __pretrained_model_name_or_path) problem="the quickstart works only with the tiny FLUX; the recipes in scripts/finetune take any model" ;;
    *) continue ;;
  esac
  echo "quickstart.sh: error: $flag: $problem" >&2
  exit 2
done
[ -n "${PYTHON_BIN:-}" ] || bash env_setup.sh
source scripts/environment.sh
case $given in *" _h "* | *" __help "* | *" __dry_run "*)
  sed -n '2,/^cd /{/^#/s/^# \{0,1\}//p}' scripts/quickstart.sh
  exec bash scripts/finetune/finetune_tiny_flux.sh --prompts_file data/tiny_prompts.txt --output_dir "$out/run" "$@"
  ;;
esac
# As the trainer does, but before anything is written. A run in run/ may be continued.
for folder in "$out" "$out/run"; do
  [ "$folder" = "$out" ] || [[ $given != *" __resume_from_checkpoint"* ]] || break
  if [ -e "$folder/metrics.jsonl" ] || compgen -G "$folder/checkpoint-*" > /dev/null; then
    echo "quickstart.sh: error: OUTPUT_DIR $out: $folder holds a run already; choose another folder" >&2
    exit 2
  fi
done
model=data/tiny_flux
last() { compgen -G "$out/run/checkpoint-*" | sort -V | tail -n 1 || true; }
before=$(last)
run() {
  printf '\n== %s\n' "$1"
  shift
  OMP_NUM_THREADS=1 "$PYTHON_BIN" -m "$@" # starting Python takes most of these seconds; threads would not help
}

printf '\n== 1/4 embed the training prompts, train MixGRPO-Flash\n'
bash scripts/finetune/finetune_tiny_flux.sh --prompts_file data/tiny_prompts.txt --output_dir "$out/run" \
  --experiment_name quickstart "$@"
tuned=$(last)
# The pictures of a run that was continued stay, under the name of the checkpoint that drew them.
[ "$tuned" = "$before" ] || [ ! -d "$out/tuned" ] || mv "$out/tuned" "$out/tuned-${before##*/}"
trained=$("$PYTHON_BIN" -c 'import json, sys; print(json.load(open(sys.argv[1]))["reward_model"])' "$out/run/args.json")

draw() { # NAME, flags that say which model
  run "2/4 draw the withheld scenes with the $1 model" fastvideo.sample.sample_flux \
    --pretrained_model_name_or_path $model "${@:2}" --prompts_file data/tiny_prompts_test.txt --output_dir "$out/$1" \
    --seed 42 --images_per_prompt 2 --batch_size 64 --h 32 --w 32 --total_sampling_steps 10
}
# Both at once, with one thread each.
set -m # the first job gets its own process group, which ends with this script: Ctrl-C doesn't reach background jobs
draw base --baseline 2>"$out/base.log" & # one progress bar is enough
base=$!
set +m
trap 'kill -- -$base 2>/dev/null' EXIT
draw tuned --model_path "$tuned"
wait $base || { status=$? && cat "$out/base.log" >&2 && exit $status; }
trap - EXIT

run "3/4 score both, and look for signs of reward hacking" fastvideo.eval.eval_reward --manifest "$out/tuned/manifest.json" \
  --baseline_manifest "$out/base/manifest.json" --reward_model_type shapes,jpeg_compressibility \
  --trained_rewards "$trained" --output_json "$out/tuned/scores.json"

run "4/4 report" fastvideo.eval.report --run_dir "$out/run" \
  --baseline_scores "$out/tuned/scores_baseline.json" --tuned_scores "$out/tuned/scores.json" --output_dir "$out/report"
cat <<TXT

Look at
  $out/report/report.html      curves, granular weights, pictures before and after (open it in a browser)
  $out/report/before_after.png the first withheld scenes, base above, tuned below, wrong pictures marked
  $out/report/summary.json     share right before and after, seconds, iterations
  $out/run/metrics.jsonl       one line per iteration
  $tuned   the tuned transformer, for FluxTransformer2DModel.from_pretrained
TXT
