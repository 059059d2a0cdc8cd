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


SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 2048,
    "max_position_embeddings": 1024,
}


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """A Llama of 4 layers with random weights, wide enough apart for greedy decoding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, num_hidden_layers=4, initializer_range=0.2)
    return saved(LlamaForCausalLM, config, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def mixed_model_path(tmp_path_factory):
    """A Gemma of 4 layers with sliding windows and 2 with full attention."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **SIZES,
        num_hidden_layers=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        sliding_window=128,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return saved(Gemma3ForCausalLM, config, tmp_path_factory.mktemp("mixed"))


def saved(model_class, config, path):
    import torch

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "engine" / "demo_model" / name, path)
    torch.manual_seed(0)
    model_class(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def served(model_path, mixed_model_path):
    """Run a workload of serving.py once and remember what it returned."""
    results = {}

    def run(workload, kind):
        if (workload, kind) not in results:
            path = mixed_model_path if workload == "mixed" else model_path
            results[workload, kind] = run_engine(str(path), workload, kind)
        result = results[workload, kind]
        assert isinstance(result, dict), result  # a failed run fails each test that needs it
        return result

    return run


def run_engine(path, workload, kind):
    """What the process returned, or the end of what it printed."""
    command = [sys.executable, "-m", "tests.integrations.vllm.serving", path, workload, kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if lines:
        return json.loads(lines[-1].removeprefix("RESULT "))
    return done.stdout[-4000:] + done.stderr[-8000:]
