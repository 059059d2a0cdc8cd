"""Runs engines to their end with the books checked after every step."""

from __future__ import annotations

from typing import Any

from vmalloc.engine import LLMEngine

PAGE = 4096


def run_out(
    engine: LLMEngine, finished: dict[str, Any] | None = None, max_steps: int = 5000
) -> dict[str, Any]:
    """Step until nothing is left; finished outputs by name, added to ``finished``."""
    finished = {} if finished is None else finished
    for _ in range(max_steps):
        if not engine.has_unfinished_requests():
            stats = engine.kv_stats()
            assert (stats.num_live_seqs, stats.swapped_bytes) == (0, 0)
            return finished
        step(engine, finished)
    raise AssertionError("the engine never came to an end")


def step(engine: LLMEngine, finished: dict[str, Any]) -> list[Any]:
    """One step; its outputs, the finished ones noted in ``finished``."""
    outputs = engine.step()
    for output in outputs:
        if output.is_finished:
            assert output.request_id not in finished
            finished[output.request_id] = output
    engine.backend.check_invariants()
    return outputs


def assert_no_page_is_lost(engine: LLMEngine) -> None:
    """All memory goes back to the system once nothing runs and nothing is cached."""
    engine.flush_prefix_cache()
    engine.backend.trim()
    engine.backend.check_invariants()
    stats = engine.kv_stats()
    assert stats.created_pages == stats.in_use_pages == engine.prefix_stats().pinned_pages
    assert (stats.num_live_seqs, stats.swapped_bytes, stats.retired_pages) == (0, 0, 0)


def token_ids(output: Any) -> list[list[int]]:
    """Tokens of each completion."""
    return [completion.token_ids for completion in output.outputs]


def all_tokens(outputs: dict[str, Any]) -> dict[str, list[list[int]]]:
    """Tokens of each completion, by request; none may have failed."""
    assert not [output.error for output in outputs.values() if output.error is not None]
    return {name: token_ids(output) for name, output in outputs.items()}
