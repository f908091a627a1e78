#!/usr/bin/env bash
# Sets up the environment, checks lint and format, and runs the tests that .ci/run runs. `--long` runs the rest instead:
# the tests marked `long`, which take minutes to hours. Both together are all tests; a release needs both.
# Other arguments go to pytest, e.g. scripts/test.sh -k window
#   TEST_PROCESSES  how many tests run side by side, one thread each (default: 3: some wait more than they compute)
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^cd /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;; esac
cd "$(dirname "$0")/.." && bash env_setup.sh
source scripts/environment.sh
export HF_HUB_OFFLINE=1 WANDB_MODE=${WANDB_MODE:-offline} TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset PYTHONDONTWRITEBYTECODE # else each of some hundred processes translates the package's modules anew
which="not long"
if [ "${1:-}" = --long ]; then
  which=long
  shift
fi
sync # gigabytes of packages that were just installed would hold up tests that wait for the disk
"$PYTHON_BIN" -m ruff check .
"$PYTHON_BIN" -m ruff format --check .
exec "$PYTHON_BIN" -m pytest -q -m "$which" -n "${TEST_PROCESSES:-3}" --dist loadgroup --durations=15 "$@"
