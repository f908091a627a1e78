# Sourced by the scripts that run Python: the repository's root as working directory, and the environment's interpreter.
# PYTHON_BIN overrides the choice: .venv if env_setup.sh has made it, else python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON_BIN:-}" ]; then
  PYTHON_BIN=python3
  [ -x .venv/bin/python ] && PYTHON_BIN=$PWD/.venv/bin/python
fi
