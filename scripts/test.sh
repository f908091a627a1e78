#!/usr/bin/env bash
# Sets up the environment and runs all checks: lint, format, tests. `--long` adds those that take minutes to hours.
# Other arguments go to pytest, e.g. scripts/test.sh -k window
cd "$(dirname "$0")/.." && bash env_setup.sh
source scripts/environment.sh
export HF_HUB_OFFLINE=1 WANDB_MODE=${WANDB_MODE:-offline} TOKENIZERS_PARALLELISM=false
"$PYTHON_BIN" -m ruff check .
"$PYTHON_BIN" -m ruff format --check .
if [ "${1:-}" = --long ]; then
  shift
  exec "$PYTHON_BIN" -m pytest -q "$@"
fi
# Tests use one thread each, TEST_PROCESSES of them at a time; who is done takes over half of what another still has.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON_BIN" -m pytest -q -m "not long" -n "${TEST_PROCESSES:-2}" --dist worksteal --durations=15 "$@"
