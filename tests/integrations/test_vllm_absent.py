"""Without vLLM the adapter says in one line what to install."""

import subprocess
import sys
from importlib.util import find_spec

import pytest


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_import_names_the_package_to_install():
    done = subprocess.run(
        [sys.executable, "-c", "import vmalloc.integrations.vllm"], capture_output=True, text=True
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: vmalloc.integrations.vllm needs vLLM: pip install 'vllm==")


def test_the_package_of_adapters_loads_none():
    code = "import sys, vmalloc.integrations; print('vllm' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "False"
