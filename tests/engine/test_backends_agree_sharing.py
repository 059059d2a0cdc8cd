"""What many requests have in common takes memory once, on both backends."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.engine.agreement import BLOCK, KERNELS, SHAPES, random_tokens
from tests.engine.running import run_out
from vmalloc.engine import SamplingParams

NUM_REQUESTS = 32
NUM_COMMON = 512
NUM_OWN = 11  # prompt tokens of each request alone
NUM_NEW = 6


@pytest.mark.parametrize("shape", SHAPES)
def test_a_common_prefix_of_512_tokens_takes_memory_once(shape: str, make_engine: Any) -> None:
    name, settings = SHAPES[shape]
    engine = make_engine(
        name,
        max_num_seqs=NUM_REQUESTS,
        max_num_batched_tokens=1024,
        block_size=BLOCK,
        commit_ahead_tokens=0,
        **settings,
    )
    backend = engine.backend
    rng = random.Random(0)
    common = random_tokens(rng, NUM_COMMON)
    for idx in range(NUM_REQUESTS):
        # The first computes the prefix while the others wait, so it starts a step ahead of them.
        params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW + (idx == 0))
        prompt = common + random_tokens(rng, NUM_OWN)
        engine.add_request(str(idx), prompt, params)
    outputs = run_out(engine)
    assert all(outputs[str(idx)].error is None for idx in range(NUM_REQUESTS))
    assert all(outputs[str(idx)].num_cached_tokens > NUM_COMMON - 2 * BLOCK for idx in range(1, 32))
    stats = engine.kv_stats()
    assert engine.kernel_name.startswith(KERNELS[backend.name])
    assert stats.peak_live_seqs == NUM_REQUESTS
    assert stats.aliased_pages > 0
    # The last token is never computed. A tail also holds the rest of the page where the prefix
    # ends, in each of the cache's buffers.
    tail = backend.bytes_for(NUM_COMMON + NUM_OWN + NUM_NEW - 1) - full_page_bytes(backend)
    most = full_page_bytes(backend) + NUM_REQUESTS * tail + backend.bytes_for(1)
    least = backend.bytes_for(NUM_COMMON) + NUM_REQUESTS * NUM_OWN * backend.config.token_bytes
    assert least <= stats.peak_committed_bytes <= most
    assert stats.created_pages * stats.page_bytes <= most  # nor did anything else take memory
    assert most < NUM_REQUESTS * backend.bytes_for(NUM_COMMON) / 8


def full_page_bytes(backend: Any) -> int:
    """Pages or blocks that are full of the prefix."""
    page_bytes: int = backend.stats().page_bytes
    if backend.name == "paged":
        return NUM_COMMON // BLOCK * page_bytes
    rows: list[int] = backend.layout.row_bytes
    return sum(NUM_COMMON * row // page_bytes for row in rows) * page_bytes
