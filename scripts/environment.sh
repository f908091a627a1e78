# shellcheck shell=bash
# Sourced by the scripts that run Python: the repository's root as working directory, and the environment's interpreter.
# PYTHON_BIN overrides the choice: .venv if env_setup.sh has made it, else python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # this checkout's modules, also if PYTHON_BIN's environment has another's
if [ -z "${PYTHON_BIN:-}" ]; then
  PYTHON_BIN=python3
  [ -x .venv/bin/python ] && PYTHON_BIN=$PWD/.venv/bin/python
fi

command -v "$PYTHON_BIN" > /dev/null || { echo "PYTHON_BIN=$PYTHON_BIN: no such program" >&2 && exit 2; }
if [ "$PYTHON_BIN" = python3 ] && ! python3 -c 'import argparse_dataclass' 2> /dev/null; then
  echo "python3 lacks the packages of requirements.txt; run bash env_setup.sh first, or set PYTHON_BIN" >&2
  exit 2
fi
# With HOSTFILE, launch.py checks it. The words are torchrun's.
if [ -z "${HOSTFILE:-}" ] && ! [[ ${NPROC_PER_NODE:-1} =~ ^([1-9][0-9]*|gpu|cpu|auto)$ ]]; then
  echo "NPROC_PER_NODE=$NPROC_PER_NODE: give a number of processes, at least 1" >&2
  exit 2
fi

# given FLAG VARIABLE: adds --FLAG to the list `args`, with the value of the environment variable, if it has one.
args=()
given() {
  [ -z "${!2:-}" ] || args+=("--$1" "${!2}")
}

# mention_hostfile: a recipe without HOSTFILE says that the hostfile names other machines and isn't used.
mention_hostfile() {
  [ -n "${HOSTFILE:-}" ] || ! grep -qsvE '^[[:space:]]*(#|$|localhost|127\.)' data/hosts/hostfile ||
    echo "data/hosts/hostfile isn't used; HOSTFILE=data/hosts/hostfile starts all its machines" >&2
}

# run_distributed SCRIPT ARGS, or -m MODULE ARGS: runs it on NPROC_PER_NODE (default 1) processes, one per GPU, of this
# machine; with HOSTFILE (relative to the root) on every machine in it, see docs/distributed.md, "Several nodes".
run_distributed() {
  if [ -n "${HOSTFILE:-}" ]; then
    exec "$PYTHON_BIN" scripts/finetune/launch.py "$@"
  fi
  if [[ " $* " =~ \ (-h|--help|--dry[-_]run|dry_run=[Tt]rue)\  ]]; then # describes the run of all processes in one
    local processes=${NPROC_PER_NODE:-1}
    processes=${processes//[!0-9]/}
    WORLD_SIZE=${processes:-1} LOCAL_WORLD_SIZE=${processes:-1} exec "$PYTHON_BIN" "$@"
  fi
  if [ "${NPROC_PER_NODE:-1}" = 1 ]; then
    exec "$PYTHON_BIN" "$@"
  fi
  exec "$PYTHON_BIN" -m fastvideo.torchrun --standalone --nproc_per_node "$NPROC_PER_NODE" "$@"
}
