#!/usr/bin/env bash
# Runs vLLM's CPU build with stock and with swapped-in KV memory, in an environment of its own.
#
# PYTHON is one where vmalloc._core can be imported (default: .venv/bin/python); its version of
# Python is the environment's. VLLM_OPTIONAL=1: where the packages cannot be had, say so and succeed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
venv=${VLLM_VENV:-.venv-vllm}

if ! PYTHON=$python scripts/install_vllm.sh "$venv"; then
  [ "${VLLM_OPTIONAL:-0}" = 1 ] && echo "Skipped: the tests with vLLM." && exit 0
  exit 1
fi

# The extension alone; the Python files are the working tree's.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
mkdir -p "$site/vmalloc"
cp --remove-destination "$("$python" -c 'import vmalloc._core as core; print(core.__file__)')" "$site/vmalloc/"

export PYTHONPATH="$PWD" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-0}
export VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-ERROR}
# vLLM warns a lot; its warnings are not ours to make errors of.
exec "$venv/bin/python" -m pytest -q -s -p no:cacheprovider -o filterwarnings=default \
  tests/integrations/vllm "$@"
