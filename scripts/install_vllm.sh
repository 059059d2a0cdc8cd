#!/usr/bin/env bash
# Puts vLLM's CPU build into an environment of its own, about 2.5 GB, unless it is there already.
#
# install_vllm.sh VENV; PYTHON is an interpreter whose version is the environment's (default:
# .venv/bin/python). Ends with 1 where the packages cannot be had.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
venv=$1
stamp="$venv/.installed-$(sha256sum scripts/requirements-vllm.txt | cut -c1-16)"

if [ ! -e "$stamp" ]; then
  echo "Setting up $venv: vLLM's CPU build, about 2.5 GB; several minutes the first time."
  test -x "$venv/bin/python" || "$("$python" -c 'import sys; print(sys._base_executable)')" -m venv "$venv"
  if ! "$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps -r scripts/requirements-vllm.txt; then
    echo "The packages of scripts/requirements-vllm.txt cannot be installed here."
    exit 1
  fi
  touch "$stamp"
fi
