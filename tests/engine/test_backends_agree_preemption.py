"""Both backends write the same tokens when requests are preempted at random steps."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.engine.agreement import (
    KINDS,
    SEEDS,
    SHAPES,
    Engines,
    Reference,
    assert_agree,
    assert_shared,
    make_reference,
    run,
    with_common_starts,
    workload,
)
from vmalloc.engine import LLMEngine


@pytest.fixture(scope="module")
def engines(tiny_model: Any) -> Iterator[Engines]:
    engines = Engines(tiny_model)
    yield engines
    engines.close()


@pytest.fixture(scope="module")
def reference(tiny_model: Any) -> Reference:
    return make_reference(tiny_model)


def preempting(seed: int, preempted: Counter[str]) -> Callable[[LLMEngine], None]:
    """Preempts a random request before every other step or so; counts them by what they had."""
    rng = random.Random(seed)

    def disturb(engine: LLMEngine) -> None:
        running = engine.scheduler.running
        if running and rng.random() < 0.4:
            group = rng.choice(running)
            preempted["several" if sum(seq.has_kv for seq in group.seqs) > 1 else "one"] += 1
            engine.scheduler.preempt(group)

    return disturb


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["swap", "recompute"])
@pytest.mark.parametrize("seed", SEEDS)
def test_preemption_at_random_steps(
    mode: str, seed: int, shape: str, engines: Engines, reference: Reference
) -> None:
    """With all methods, shared prefixes and chunks at once."""
    first = workload(seed)
    second = with_common_starts(seed, first)
    runs = {}
    for kind in KINDS:
        preempted: Counter[str] = Counter()
        engine = engines(
            shape, kind, preemption_mode=mode, max_num_batched_tokens=30, max_num_seqs=14
        )
        result = run(engine, [first, second], steps_between=9, disturb=preempting(seed, preempted))
        runs[kind] = result
        assert result.num_cut_prompts > 0
        assert max(result.cached_tokens.values()) > 0
        assert_shared(result)
        assert preempted["several"] > 0
        assert preempted["one"] > 0
        if mode == "swap":
            assert result.preempt_swap > 2
            assert result.swap_in_pages > 0
        else:
            assert result.preempt_recompute > 2
            assert result.preempt_swap == 0
    assert_agree(runs, reference(SHAPES[shape][0], {**first, **second}))
