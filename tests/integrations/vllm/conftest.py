"""What tests with vLLM share: a tiny model, and runs of engines in their own processes."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

if find_spec("vllm") is None:
    # vLLM pins versions that the rest does not; scripts/test_vllm.sh has it in its own environment.
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """A Llama of 4 layers with random weights, wide enough apart for greedy decoding."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("model") / "tiny"
    path.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "engine" / "demo_model" / name, path)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=2048,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def served(model_path):
    """Run a workload of serving.py once and remember what it returned."""
    results = {}

    def run(workload, kind):
        if (workload, kind) not in results:
            command = [sys.executable, "-m", "tests.integrations.vllm.serving"]
            done = subprocess.run(
                [*command, str(model_path), workload, kind],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=900,
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            assert lines, done.stdout[-4000:] + done.stderr[-8000:]
            results[workload, kind] = json.loads(lines[-1].removeprefix("RESULT "))
        return results[workload, kind]

    return run
