"""Seeded requests and caches that the memory benchmarks share; no model runs on them.

Lengths are lognormal with the means that the PagedAttention paper (Kwon et al., SOSP 2023, figure
11) gives for its Alpaca and ShareGPT traces. It gives no deviations; all are drawn with a standard
deviation of 1 in the logarithm (uncut: 1.31 times the mean) and cut to a range. The location
is chosen so that the mean after the cut is the paper's.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vmalloc import KVCacheConfig, LayerKVSpec, VirtualKVCache, create_kv_backend
from vmalloc.backend import KVBackend
from vmalloc.measuring.lengths import LOG_STD, draw_lengths

LAYERS = (LayerKVSpec(num_kv_heads=2, k_head_dim=64, v_head_dim=64),) * 4
ROW_BYTES = 4096  # what a token stores in LAYERS
TOKENS_PER_PAGE = 16
PAGE_BYTES = TOKENS_PER_PAGE * ROW_BYTES
MAX_SEQ_LEN = 2048
MIN_TOKENS = 4
MAX_TOKENS = MAX_SEQ_LEN // 2  # of a prompt, and of an output


@dataclass(frozen=True)
class Lengths:
    """How long prompts and outputs are, in tokens."""

    name: str
    prompt_mean: int
    output_mean: int


SHAREGPT = Lengths("ShareGPT-like", 161, 338)
ALPACA = Lengths("Alpaca-like", 19, 58)


@dataclass(frozen=True)
class Request:
    """One request, in tokens."""

    num_prompt: int
    num_output: int


@dataclass
class ByteSteps:
    """Byte counts of a cache, summed over steps."""

    num_steps: int = 0
    live: int = 0
    logical: int = 0
    committed: int = 0
    shared: int = 0
    ahead: int = 0
    retired: int = 0
    parked: int = 0

    def add(self, cache: KVBackend) -> None:
        """Count a step, once the background worker is done, so that its timing does not matter."""
        if isinstance(cache, VirtualKVCache):
            cache.wait_worker()
        stats = cache.stats()
        self.num_steps += 1
        self.live += stats.live_bytes
        self.logical += stats.logical_bytes
        self.committed += stats.committed_bytes
        self.shared += stats.shared_bytes
        self.ahead += stats.ahead_bytes
        self.retired += stats.retired_pages * stats.page_bytes
        self.parked += stats.parked_bytes


def make_trace(lengths: Lengths, num_requests: int, seed: int) -> list[Request]:
    """Requests that arrive together; the same ones for the same seed."""
    rng = np.random.default_rng([seed, lengths.prompt_mean, lengths.output_mean])
    prompts, outputs = (
        draw_lengths(rng, mean, num_requests, minimum=MIN_TOKENS, maximum=MAX_TOKENS)
        for mean in (lengths.prompt_mean, lengths.output_mean)
    )
    return [Request(*pair) for pair in zip(prompts, outputs, strict=True)]


def describe_trace(lengths: Lengths, trace: list[Request]) -> dict[str, Any]:
    """What was asked for and what was drawn, for the result file."""
    prompts = [request.num_prompt for request in trace]
    outputs = [request.num_output for request in trace]
    return {
        **asdict(lengths),
        "log_std": LOG_STD,
        "num_requests": len(trace),
        "prompt_drawn": {"mean": float(np.mean(prompts)), "std": float(np.std(prompts))},
        "output_drawn": {"mean": float(np.mean(outputs)), "std": float(np.std(outputs))},
    }


def make_cache(
    kind: str, max_num_seqs: int, capacity_bytes: int | None = None, **settings: Any
) -> KVBackend:
    """A cache that counts without memory: rows of 4 KiB, 16 tokens a page and a block.

    Without ``capacity_bytes`` it never runs out. Prefix caching is off: what a figure says of
    sharing or of waste is then due to the sequences alone.
    """
    config = KVCacheConfig(
        layers=LAYERS,
        max_num_seqs=max_num_seqs,
        max_seq_len=MAX_SEQ_LEN,
        capacity_bytes=capacity_bytes or 2 * max_num_seqs * MAX_SEQ_LEN * ROW_BYTES,
        driver="null",
        page_bytes=PAGE_BYTES,
        block_size=TOKENS_PER_PAGE,
        prefix_caching=False,
        **settings,
    )
    return create_kv_backend(config, kind)
