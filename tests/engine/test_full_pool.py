"""Pools that are full to the last page: each request ends with its tokens or with its own error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.engine.running import PAGE, all_tokens, run_out, step, token_ids
from vmalloc.engine import LLMEngine, SamplingParams
from vmalloc.engine.sequence_group import GroupStatus, SequenceGroup

PROMPT = [5, 17, 3, 88, 41, 2, 60, 9, 33, 71, 12, 8, 54]
REQUESTS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=16),
    "n=3": SamplingParams(n=3, seed=1, max_tokens=12),
    "beam": SamplingParams(n=3, use_beam_search=True, temperature=0.0, max_tokens=8),
    "best_of": SamplingParams(n=1, best_of=3, seed=2, max_tokens=10),
}

STAGES: dict[str, Callable[[SequenceGroup], bool]] = {
    "waiting": lambda group: True,
    "under way": lambda group: group.root.num_output_tokens > 4,
    "preempted": lambda group: (
        group.metrics.num_preemptions > 0 and group.status is not GroupStatus.RUNNING
    ),
}


def num_pages_left(engine: LLMEngine) -> int:
    """Pages that nobody needs, cached ones included."""
    stats = engine.kv_stats()
    return (stats.capacity_bytes - stats.committed_bytes) // stats.page_bytes


def add_all(engine: LLMEngine) -> None:
    for idx, (name, params) in enumerate(REQUESTS.items()):
        engine.add_request(name, [*PROMPT, idx], params)


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_pools_of_sizes_down_to_the_last_page(mode: str, make_engine: Any) -> None:
    roomy = make_engine()
    add_all(roomy)
    expected = all_tokens(run_out(roomy))
    num_failed = num_whole = 0
    least = []
    engine = make_engine(
        kv_cache_memory_bytes=18 * PAGE,
        swap_space_bytes=6 * PAGE,
        preemption_mode=mode,
        block_size=4,
        commit_ahead_tokens=0,
    )
    for num_pages in (14, 13, 11, 10, 8, 5):
        engine.flush_prefix_cache()
        engine.resize_kv_cache(num_pages * PAGE)
        add_all(engine)
        outputs: dict[str, Any] = {}
        left = []
        while engine.has_unfinished_requests():
            step(engine, outputs)
            left.append(num_pages_left(engine))
        least.append(min(left))
        assert set(outputs) == set(REQUESTS)
        for name, output in outputs.items():
            if output.error is None:
                assert token_ids(output) == expected[name], f"{name} in {num_pages} pages"
                num_whole += 1
            else:
                assert f"request {name} " in output.error
                assert "KV" in output.error
                num_failed += 1
    # Some pools were too small for some requests, and others were used up to the last page but one.
    assert num_failed > 0
    assert num_whole > num_failed
    assert {0, 1} <= set(least)


@pytest.mark.parametrize("swap_pages", [0, 5])
@pytest.mark.parametrize("aborted", REQUESTS)
def test_an_abort_while_pool_and_swap_space_are_full(
    aborted: str, swap_pages: int, make_engine: Any
) -> None:
    """While it waits, when it is under way, and when it had to give up its memory."""
    roomy = make_engine()
    add_all(roomy)
    expected = all_tokens(run_out(roomy))
    engine = make_engine(
        kv_cache_memory_bytes=16 * PAGE,
        swap_space_bytes=swap_pages * PAGE,
        preemption_mode="swap",
        block_size=4,
    )
    reached = []
    for name, is_reached in STAGES.items():
        engine.flush_prefix_cache()
        add_all(engine)
        group = engine._requests[aborted]
        finished: dict[str, Any] = {}
        while aborted not in finished and not is_reached(group):
            step(engine, finished)
        if aborted not in finished:
            reached.append(name)
            engine.abort_request(aborted)
            engine.backend.check_invariants()
        outputs = all_tokens(run_out(engine, finished))
        assert outputs == {name: expected[name] for name in outputs}
        assert len(outputs) == len(REQUESTS) - (name in reached)
    assert reached[:2] == ["waiting", "under way"]
    if aborted == "best_of":  # the last to come is the first to give up its memory
        assert reached[2:] == ["preempted"]
