"""The engine's page map names requests, and can be asked while the engine sleeps."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.running import run_out
from tests.kv.page_maps import check_page_map
from vmalloc import ClosedError
from vmalloc.engine import SamplingParams

PROMPT = [5, 17, 3, 88, 41, 2, 60, 9, 33, 71, 12, 8, 54]


def requests_of(engine: Any) -> dict[str, int]:
    """How many rows of the map each request has."""
    if not engine.is_asleep:
        engine.backend.wait_worker()
    page_map = engine.page_map()
    check_page_map(page_map, engine.kv_stats())
    names = [slot.request_id for slot in page_map.slots if slot.seq_id is not None]
    return {name: names.count(name) for name in names}


def test_rows_are_named_after_their_requests(make_engine: Any) -> None:
    engine = make_engine("llama-4x2x16")
    engine.add_request("three", PROMPT * 3, SamplingParams(n=3, seed=1, max_tokens=20))
    engine.add_request("one", PROMPT[3:], SamplingParams(max_tokens=20, temperature=0.0))
    assert requests_of(engine) == {}
    for _ in range(4):
        engine.step()
    assert requests_of(engine) == {"three": 3, "one": 1}
    assert engine.page_map().num_pages("shared") > 0
    engine.abort_request("three")
    assert requests_of(engine) == {"one": 1}
    run_out(engine)
    assert requests_of(engine) == {}


def test_asleep_and_closed(make_engine: Any) -> None:
    engine = make_engine()
    engine.add_request("one", PROMPT, SamplingParams(max_tokens=20, temperature=0.0))
    for _ in range(3):
        engine.step()
    engine.sleep()
    assert engine.page_map().is_asleep
    assert requests_of(engine) == {}
    assert engine.wake()
    assert requests_of(engine) == {"one": 1}
    run_out(engine)


def test_a_closed_engine_has_no_map(make_engine: Any) -> None:
    engine = make_engine()
    engine.add_request("one", PROMPT, SamplingParams(max_tokens=20, temperature=0.0))
    engine.step()
    engine.close()
    with pytest.raises(ClosedError):
        engine.page_map()
