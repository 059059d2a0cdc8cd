"""``virtual`` and ``paged`` write the same tokens as each other and as the model without a cache.

Every case also asserts that what it is about did happen (design.md section 9, item 10).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.engine.agreement import (
    BLOCK,
    KINDS,
    MAX_SEQS,
    METHODS,
    ROW_SHAPES,
    SEEDS,
    SHAPES,
    Engines,
    Reference,
    assert_agree,
    assert_shared,
    chosen_logprobs,
    make_reference,
    run,
    run_alone,
    with_common_starts,
    workload,
)

PLAIN = {"enable_prefix_caching": False, "max_num_batched_tokens": 512}


@pytest.fixture(scope="module")
def engines(tiny_model: Any) -> Iterator[Engines]:
    engines = Engines(tiny_model)
    yield engines
    engines.close()


@pytest.fixture(scope="module")
def reference(tiny_model: Any) -> Reference:
    return make_reference(tiny_model)


@pytest.mark.parametrize("seed", SEEDS)
class TestMethods:
    @pytest.mark.parametrize("shape", ROW_SHAPES)
    def test_one_at_a_time_without_caching_or_chunks(
        self, shape: str, seed: int, engines: Engines, reference: Reference
    ) -> None:
        requests = workload(seed)
        runs = {kind: run_alone(engines(shape, kind, **PLAIN), requests) for kind in KINDS}
        assert_agree(runs, reference(SHAPES[shape][0], requests))
        for result in runs.values():
            assert result.num_cut_prompts == 0
            assert set(result.cached_tokens.values()) == {0}

    @pytest.mark.parametrize("shape", ROW_SHAPES)
    @pytest.mark.parametrize("method", METHODS)
    def test_one_method(
        self, method: str, shape: str, seed: int, engines: Engines, reference: Reference
    ) -> None:
        requests = workload(seed, [method])
        runs = {kind: run(engines(shape, kind), [requests]) for kind in KINDS}
        assert_agree(runs, reference(SHAPES[shape][0], requests))
        for result in runs.values():
            if METHODS[method](0).width > 1:
                assert_shared(result)
            else:
                assert result.aliased_pages == 0

    @pytest.mark.parametrize("shape", SHAPES)
    def test_all_methods_in_one_batch(
        self, shape: str, seed: int, engines: Engines, reference: Reference
    ) -> None:
        requests = workload(seed)
        runs = {kind: run(engines(shape, kind), [requests]) for kind in KINDS}
        assert_agree(runs, reference(SHAPES[shape][0], requests))
        for result in runs.values():
            assert_shared(result)


@pytest.mark.parametrize("shape", ROW_SHAPES)
@pytest.mark.parametrize("num_tokens", [8, 19, 40])
@pytest.mark.parametrize("seed", SEEDS)
def test_prompts_in_chunks(
    seed: int, num_tokens: int, shape: str, engines: Engines, reference: Reference
) -> None:
    requests = workload(seed)
    settings = {"max_num_seqs": 8, "max_num_batched_tokens": num_tokens}
    runs = {kind: run(engines(shape, kind, **settings), [requests]) for kind in KINDS}
    assert_agree(runs, reference(SHAPES[shape][0], requests))
    for result in runs.values():
        assert result.num_cut_prompts > 0
        assert_shared(result)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("is_live", [False, True], ids=["ended", "live"])
def test_prefixes_of_requests_that_ended_or_still_run(
    is_live: bool, seed: int, shape: str, engines: Engines, reference: Reference
) -> None:
    first = workload(seed)
    second = with_common_starts(seed, first)
    runs = {}
    for kind in KINDS:
        engine = engines(shape, kind, max_num_seqs=2 * MAX_SEQS)
        runs[kind] = run(engine, [first, second], steps_between=3 if is_live else 20)
        cached = {name: num for name, num in runs[kind].cached_tokens.items() if name in second}
        assert min(cached.values()) > 0
        # To the token where the whole prefix was left by one that ended.
        assert is_live or any(num % BLOCK for num in cached.values())
        assert_shared(runs[kind])
    assert_agree(runs, reference(SHAPES[shape][0], {**first, **second}))


@pytest.mark.parametrize("shape", ROW_SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_seeded_request_writes_the_same_alone_and_in_a_crowd(
    kind: str, shape: str, engines: Engines
) -> None:
    engine = engines(shape, kind, **PLAIN)
    requests = workload(7)
    alone = run_alone(engine, requests)
    crowd = run(engine, [requests])
    assert_shared(crowd)
    for name in requests:
        ours, theirs = crowd.outputs[name].outputs, alone.outputs[name].outputs
        assert [one.token_ids for one in ours] == [one.token_ids for one in theirs]
        # Rows of a batch do not depend on each other, so not even the last bit differs.
        assert [chosen_logprobs(one) for one in ours] == [chosen_logprobs(one) for one in theirs]
