"""Adapters stay apart: none loads another, and none touches the engine that it is for."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


def python(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    lines = [f"sys.path.insert(0, {str(path)!r})" for path in paths]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(["import sys", *lines, code])],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_the_library_and_the_package_of_adapters_load_no_engine() -> None:
    done = python(
        "import vmalloc, vmalloc.integrations\n"
        "print(sorted({'torch', 'transformers', 'vllm', 'vattention'} & set(sys.modules)))"
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_one_adapter_loads_no_other_and_registers_nothing() -> None:
    done = python(
        "import torch\n"
        "before = dict(vars(torch)), dict(vars(torch.Tensor))\n"
        "import vmalloc.integrations.vattention\n"
        "assert before == (dict(vars(torch)), dict(vars(torch.Tensor)))\n"
        "print(sorted({'transformers', 'vllm', 'vattention'} & set(sys.modules)))\n"
        "loaded = [name for name in sys.modules if name.startswith('vmalloc.integrations.')]\n"
        "print(sorted(name.split('.')[-1] for name in loaded))"
    )
    assert done.stdout == "[]\n['vattention', 'vattention_cache', 'vattention_layout']\n", (
        done.stderr
    )


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
@pytest.mark.parametrize("found", ["0.31.4", "0.33.0", "1.0.0"])
def test_another_vllm_is_named_and_not_loaded(tmp_path: Path, found: str) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('loaded')\n")
    info = tmp_path / f"vllm-{found}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found}\n")
    done = python("import vmalloc.integrations.vllm", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: vmalloc.integrations.vllm supports vLLM 0.32.*; installed is {found}"
    )
