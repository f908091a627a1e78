#!/usr/bin/env bash
# Makes (or reuses) the virtual environment .venv with the pinned packages and this project in editable mode.
#   PYTHON           interpreter to use, 3.10 or newer (default: python3)
#   TORCH_INDEX_URL  package index of another build of torch and torchvision, e.g. a CPU-only or an older-CUDA one
# After it: source .venv/bin/activate
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")"
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed, $PYTHON is older; set PYTHON=/path/to/python3" >&2; exit 1; }

# The stamp names everything the environment depends on, this folder too, whose package it imports: as long as the stamp
# matches, a second call does nothing.
stamp=.venv/.complete
want=$(cat requirements.txt pyproject.toml env_setup.sh | sha256sum; "$PYTHON" --version; echo "${TORCH_INDEX_URL:-}"; pwd)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
  exit 0
fi
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
rm -f "$stamp"
pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
echo "Installing the environment into .venv (some minutes the first time) ..."
# Of one index: a torchvision of another build can't be imported beside torch.
mapfile -t torch < <(grep -E '^torch(vision)?==' requirements.txt)
"${pip[@]}" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "${torch[@]}"
DS_BUILD_OPS=0 "${pip[@]}" -r requirements.txt
"${pip[@]}" --no-build-isolation -e '.[ocr]' # the extras are its only dependencies; the tests need them
# Where torch is a CPU-only build and torchvision isn't, `import diffusers` works all the same: see the module imported.
for folder in .venv/lib/python3*/site-packages; do
  echo 'import importlib.util; importlib.util.find_spec("fastvideo") and __import__("fastvideo.torchvision_repair")' > "$folder/torchvision_repair.pth"
done
printf '%s' "$want" > "$stamp"
