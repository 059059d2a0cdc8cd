"""One contender of ``hf_cache.py`` in a process of its own: a model, a filled cache, decode steps.

Reads one JSON line a command on stdin and answers with one on stdout. The process is started anew
for each contender because malloc is set up by its environment, and because the most memory that a
process had is known only for the whole of it.

Owns: the model and the cache.  Thread-safety: single-threaded; sets torch's thread count.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers.cache_utils import DynamicCache, StaticCache

from vmalloc.integrations.transformers import VirtualCache, register

_STATUS = Path("/proc/self/status")
_CHUNK = 512


def make_model(seed: int) -> Any:
    """A small Llama, whose steps are mostly attention and memory: what a cache is about."""
    torch.manual_seed(seed)
    config = hf.LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16384,
    )
    return hf.LlamaForCausalLM(config).eval()


class Worker:
    """Decodes ``batch`` rows after ``num_tokens`` random ones, again and again."""

    def __init__(self, setup: dict[str, Any]) -> None:
        torch.set_num_threads(1)
        self.model = make_model(setup["seed"])
        if setup["attention"] == "vmalloc":
            register(num_threads=1)
            self.model.set_attn_implementation("vmalloc")
        self.batch, self.num_tokens = setup["batch"], setup["num_tokens"]
        self.steps = setup["steps"]
        self.kind = setup["cache"]
        self.cache = self._make_cache()
        self.ids = torch.ones(self.batch, 1, dtype=torch.long)
        # The code and its buffers first, so that what comes on top is the cache's.
        with torch.no_grad():
            self.model(self.ids, use_cache=False)
        self.before_bytes = memory_bytes("VmRSS")
        forget_peak()
        self._fill()

    def run(self) -> dict[str, Any]:
        """Milliseconds of each of the next steps, by the wall and by this process's CPU."""
        wall, cpu = [], []
        with torch.no_grad():
            for _ in range(self.steps):
                start, cpu_start = time.perf_counter(), time.process_time()
                self.model(self.ids, past_key_values=self.cache, use_cache=True)
                wall.append((time.perf_counter() - start) * 1e3)
                cpu.append((time.process_time() - cpu_start) * 1e3)
        self._rewind()
        return {"wall_ms": wall, "cpu_ms": cpu}

    def memory(self) -> dict[str, int]:
        """Bytes above what the process had before its cache, at most, and bytes of the tokens."""
        config = self.model.config
        token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * 64 * 4
        return {
            "peak_bytes": memory_bytes("VmHWM") - self.before_bytes,
            "kv_bytes": self.batch * (self.num_tokens + self.steps) * token_bytes,
        }

    def _make_cache(self) -> Any:
        config = self.model.config
        if self.kind == "dynamic":
            return DynamicCache(config=config)
        if self.kind == "static":
            return StaticCache(config, max_cache_len=self.num_tokens + self.steps)
        layers_per_group = config.num_hidden_layers if self.kind == "interleaved" else None
        return VirtualCache(config, layers_per_group=layers_per_group)

    def _fill(self) -> None:
        config = self.model.config
        shape = (self.batch, config.num_key_value_heads, _CHUNK, 64)
        states = torch.randn(shape), torch.randn(shape)
        for first in range(0, self.num_tokens, _CHUNK):
            count = min(_CHUNK, self.num_tokens - first)
            for layer_idx in range(config.num_hidden_layers):
                self.cache.update(*(state[:, :, :count] for state in states), layer_idx)

    def _rewind(self) -> None:
        """Back to where the steps began, so that all rounds do the same."""
        if self.kind == "static":
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.num_tokens)
        else:
            self.cache.crop(-self.steps)


def memory_bytes(name: str) -> int:
    """``VmRSS`` or ``VmHWM``, the resident memory now or at most."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {name} line")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever libraries print is no answer
    worker = Worker(json.loads(sys.stdin.readline()))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer = worker.run() if command == "run" else worker.memory()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
