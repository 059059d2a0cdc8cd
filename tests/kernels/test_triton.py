"""Triton kernels without a GPU: interpreted, and compiled for sm_90, each in its own process.

Owns: nothing.  Thread-safety: every test starts a process.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "tests/kernels/on_device"
LONGEST = [f"{FOLDER}/test_attention.py", f"{FOLDER}/test_slots.py"]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run_python(*arguments: str, **environment: str) -> str:
    """What a Python process printed; it must succeed."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TRITON_", "PYTEST_"))
    }
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, f"ended with {result.returncode}: {result.stdout}"
    return result.stdout


@needs_triton
@pytest.mark.parametrize(
    "paths",
    [*([path] for path in LONGEST), [FOLDER, *(f"--ignore={path}" for path in LONGEST)]],
)
def test_kernels_are_right_under_the_interpreter(paths: list[str]) -> None:
    text = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", *paths, TRITON_INTERPRET="1")
    assert " passed" in text
    assert " skipped" not in text


@needs_triton
def test_memory_behind_a_sequence_is_not_touched() -> None:
    cases = ["decode", "decode-window", "prefill", "empty-slot", "wide-rows"]
    text = run_python("-m", "tests.kernels.guarded", *cases, TRITON_INTERPRET="1")
    assert text.count("safe ") == len(cases)


@needs_triton
@pytest.mark.parametrize("case", ["decode-past-the-end", "prefill-past-the-end"])
def test_touching_it_would_end_the_process(case: str) -> None:
    with pytest.raises(AssertionError, match=f"ended with {-signal.SIGSEGV}"):
        run_python("-m", "tests.kernels.guarded", case, TRITON_INTERPRET="1")


@needs_triton
def test_every_kernel_compiles_for_sm_90(tmp_path: Path) -> None:
    text = run_python("-m", "tests.kernels.compile_kernels", TRITON_CACHE_DIR=str(tmp_path))
    for kernel in ("append", "decode", "join_splits", "prefill", "copy", "decode_rows"):
        assert f"\n{kernel}_kernel " in f"\n{text}"
    assert "compiled " in text


REFUSED_COPY = """
import torch
from vmalloc.errors import ConfigError
import vmalloc.factory, vmalloc.kernels.cpu
from vmalloc.kernels.paged_gpu import copy_blocks
try:
    copy_blocks(torch.zeros(1, 1, 1, 1), torch.zeros(0, 2, dtype=torch.int32))
except ConfigError as error:
    print(error)
"""


@needs_triton
def test_cpu_tensors_are_refused_without_the_interpreter() -> None:
    assert "blocks is on cpu, must be on cuda" in run_python("-c", REFUSED_COPY)


def test_all_but_launches_work_without_triton_and_those_say_what_to_install() -> None:
    no_triton = 'import sys; sys.modules["triton"] = None'  # importing it raises ImportError
    assert "pip install 'vmalloc[gpu]'" in run_python("-c", no_triton + REFUSED_COPY)
