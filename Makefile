# One entry point for people and CI. Every target sets up .venv by itself when it is missing or stale.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# libgomp reads this when it loads: spinning workers on a busy small machine turn 25 ms steps into 380 ms.
export GOMP_SPINCOUNT ?= 0
export HF_HUB_OFFLINE ?= 1
JOBS ?= $(shell nproc)
PYTHON_SOURCES := vmalloc engine server tests benchmarks scripts
CXX_SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*.inl tests/core/*.cpp tests/fakecuda/*.cpp tests/fakecuda/*.h)

.PHONY: demo serve test test-vllm check format docs docs-serve asan tsan fakecuda mutations soak bench bench-docs bench-peers bench-gpu clean build

demo: build
	$(BIN)/vmalloc generate --model demo --prompt "def " --prompt "import " --prompt "class Stack:" \
		--max-tokens 96 --temperature 0.6 --top-p 0.95 --seed 1

serve: build
	$(BIN)/vmalloc serve demo

# One torch thread a worker: two workers with two threads each would fight for two cores.
test: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) tests

# vLLM's CPU build, stock and with our KV memory, in an environment of its own (.venv-vllm, 2.5 GB).
test-vllm: build
	PYTHON=$(BIN)/python scripts/test_vllm.sh

check: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p vmalloc
	$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)
	$(BIN)/python scripts/docs_site.py

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

# The docs as a site below build/site; a link or an anchor that leads nowhere is an error.
docs: build
	$(BIN)/python scripts/docs_site.py

docs-serve: build
	$(BIN)/python scripts/docs_site.py --serve

# Sanitizer runs are native (no Python), so they need nothing but a compiler and CMake.
asan: $(VENV)/.deps
	$(BIN)/cmake -S . -B build/asan -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DVMALLOC_PYTHON=OFF -DVMALLOC_NATIVE_TESTS=ON -DVMALLOC_FAKE_CUDA=ON -DVMALLOC_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=RelWithDebInfo
	$(BIN)/cmake --build build/asan
	build/asan/core_stress --rounds $(STRESS_ROUNDS)
	build/asan/core_stress --rounds $(STRESS_ROUNDS) --cuda build/asan/tests/fakecuda/libcuda.so.1

tsan: $(VENV)/.deps
	$(BIN)/cmake -S . -B build/tsan -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DVMALLOC_PYTHON=OFF -DVMALLOC_NATIVE_TESTS=ON -DVMALLOC_FAKE_CUDA=ON -DVMALLOC_SANITIZE=thread -DCMAKE_BUILD_TYPE=RelWithDebInfo
	$(BIN)/cmake --build build/tsan
	build/tsan/core_stress --rounds $(STRESS_ROUNDS)
	build/tsan/core_stress --rounds $(STRESS_ROUNDS) --cuda build/tsan/tests/fakecuda/libcuda.so.1

# The stand-in CUDA driver; the tests build it by themselves when they need it.
fakecuda: $(VENV)/.deps
	$(BIN)/python -c "from tests.fakecuda import library_path; print(library_path())"

# Proves the tests: each named mistake in a scratch copy must turn a named test red. Not part of CI.
mutations: build
	$(BIN)/python scripts/mutations.py

STRESS_ROUNDS ?= 200

# Long runs of the same: not part of CI.
soak:
	$(MAKE) asan STRESS_ROUNDS=20000
	$(MAKE) tsan STRESS_ROUNDS=20000
	$(BIN)/env HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest -q tests/kv tests/core

bench: build
	$(BIN)/python benchmarks/alloc.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/sharing.py
	$(BIN)/python benchmarks/waste.py
	$(BIN)/python benchmarks/preemption.py
	$(BIN)/python benchmarks/hf_cache.py
	$(BIN)/python benchmarks/linear.py
	$(BIN)/python benchmarks/layout.py
	$(BIN)/python benchmarks/step.py

# All figures of the docs again, from the committed results: measures nothing.
bench-docs: build
	$(BIN)/python benchmarks/figures.py

# Other engines on the same work, an environment each below .peers: an hour on a quiet machine.
# PEERS_ARGS=--build-llama-cpp builds llama.cpp's server first, a quarter hour more.
bench-peers: build
	$(BIN)/python benchmarks/peers.py --shapes tiny --json benchmarks/results/peers-tiny.json --figure docs/figures/peers-tiny.svg $(PEERS_ARGS)
	$(BIN)/python benchmarks/peers.py --shapes small --json benchmarks/results/peers-small.json --figure docs/figures/peers-small.svg $(PEERS_ARGS)

# For a machine with a GPU and its own Python, torch and compilers: sets up no .venv, takes nothing from
# the network. GPU_ARGS=--dry-run checks it without a GPU.
bench-gpu:
	PYTHON=$(PYTHON) benchmarks/gpu/run.sh $(GPU_ARGS)

build: $(VENV)/.built

$(VENV)/.deps: constraints.txt pyproject.toml
	@echo "Setting up $(VENV): torch, transformers and build tools; a minute or two the first time."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt scikit-build-core pybind11 cmake ninja
	touch $@

$(VENV)/.built: $(VENV)/.deps CMakeLists.txt $(wildcard csrc/*)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf build dist .cache $(VENV) .venv-vllm .peers
