#!/usr/bin/env bash
# One command for a machine with a GPU: build, tests, kernel probes and timings, in under nine minutes.
#
#   benchmarks/gpu/run.sh                     everything; results under $OUT (default benchmarks/results)
#   benchmarks/gpu/run.sh --dry-run           checks itself where there is no GPU; measures nothing
#   benchmarks/gpu/run.sh --sections a,b      only these; --help lists them
#
# It needs what the machine has: Python 3.10+, torch, triton, transformers, pytest, hypothesis, pybind11,
# cmake, ninja and a C++ compiler; no network. A folder .gpu with prebuilt libraries is used where it
# exists: flash_attn with its library, wheels/ of other allocators, and a file "commit" that names the
# commit where the tree is a copy without git. The GPU's settings are left as they are.
set -euo pipefail
cd "$(dirname "$0")/../.."
export GOMP_SPINCOUNT=0 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD:$PWD/.gpu${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu.run "$@"
