"""Two ranks write what one does, and their caches hold the same, page for page."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.agreement import (
    BLOCK,
    KERNELS,
    KINDS,
    MAX_SEQS,
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
from tests.engine.running import PAGE, assert_no_page_is_lost, run_out
from vmalloc.engine import EngineConfig, LLMEngine, SamplingParams
from vmalloc.engine.loading import load_engine
from vmalloc.errors import ConfigError

SHAPE = "4x2x16"
SEEDS = range(2)
RANKS = 2
SMALL_POOL = 160  # tokens: too few for a workload at once


SETTINGS = [(kind, mode) for kind in KINDS for mode in ("swap", "recompute")]


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    tiny_model(SHAPES[SHAPE][0]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=SETTINGS, ids=" by ".join)
def shared_engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[LLMEngine]:
    """Two ranks; a process can have one such engine at a time."""
    kind, mode = request.param
    config = EngineConfig(
        tensor_parallel_size=RANKS,
        kv_backend=kind,
        preemption_mode=mode,
        page_size=PAGE,
        layers_per_group=4,
        block_size=BLOCK,
        max_num_seqs=MAX_SEQS,
        max_num_batched_tokens=30,
        batch_invariant=True,
    )
    with load_engine(folder, None, config, skip_tokenizer_init=True) as engine:
        assert engine.kernel_name.startswith(KERNELS[kind])
        assert engine.fused_refusal == f"its weights are sharded over {RANKS} ranks"
        yield engine


@pytest.fixture
def engine(shared_engine: LLMEngine) -> Iterator[LLMEngine]:
    shared_engine.flush_prefix_cache()
    yield shared_engine
    check_ledgers(shared_engine)


@pytest.fixture(scope="module")
def one_rank(tiny_model: Any) -> Iterator[Engines]:
    engines = Engines(tiny_model)
    yield engines
    engines.close()


@pytest.fixture(scope="module")
def reference(tiny_model: Any) -> Reference:
    return make_reference(tiny_model)


def check_ledgers(engine: LLMEngine) -> None:
    """Those of all ranks are equal, and so are their sums."""
    assert engine.leader is not None
    engine.leader.check_ledgers()
    first, *others = engine.leader.reports()
    assert len(others) == RANKS - 1
    for report in others:
        assert report.kv_stats.committed_bytes == first.kv_stats.committed_bytes
        assert report.kv_stats.num_live_seqs == first.kv_stats.num_live_seqs


def checking(every: int = 4) -> Callable[[LLMEngine], None]:
    """Compares the ledgers before every few steps."""
    num_steps = 0

    def disturb(engine: LLMEngine) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps % every == 0:
            check_ledgers(engine)

    return disturb


@pytest.mark.parametrize("seed", SEEDS)
def test_two_ranks_write_what_one_does(
    seed: int, engine: LLMEngine, one_rank: Engines, reference: Reference
) -> None:
    """Ragged greedy, sampled, n=4, best_of and beams at once, then prompts that hit prefixes."""
    first = workload(seed)
    second = with_common_starts(seed, first)
    ours = run(engine, [first, second], steps_between=9, disturb=checking())
    assert ours.num_cut_prompts > 0
    assert max(ours.cached_tokens.values()) > 0
    assert_shared(ours)
    alone = one_rank(SHAPE, engine.backend.name, max_num_batched_tokens=30)
    theirs = run(alone, [first, second], steps_between=9)
    if engine.backend.name == "paged":  # pages hold more tokens of fewer heads, blocks do not
        assert ours.cached_tokens == theirs.cached_tokens
    runs = {"2 ranks": ours, "1 rank": theirs}
    assert_agree(runs, reference(SHAPES[SHAPE][0], {**first, **second}))


def test_forced_preemption(engine: LLMEngine, reference: Reference) -> None:
    """Random requests lose their memory at random steps."""
    rng, check = random.Random(7), checking()

    def disturb(engine: LLMEngine) -> None:
        running = engine.scheduler.running
        if running and rng.random() < 0.4:
            engine.scheduler.preempt(rng.choice(running))
        check(engine)

    first = workload(0)
    second = with_common_starts(0, first)
    result = run(engine, [first, second], steps_between=9, disturb=disturb)
    if engine.config.preemption_mode == "swap":
        assert result.preempt_swap > 2
        assert result.swap_in_pages > 0
    else:
        assert result.preempt_recompute > 2
        assert result.preempt_swap == 0
    assert_agree({"2 ranks": result}, reference(SHAPES[SHAPE][0], {**first, **second}))


def test_a_pool_too_small_for_all(engine: LLMEngine, reference: Reference) -> None:
    """The scheduler preempts because pages run out, and evicts what is cached."""
    cap = engine.config.kv_cache_memory_bytes
    assert cap is not None
    first = workload(3)
    second = with_common_starts(3, first)
    engine.resize_kv_cache(SMALL_POOL * engine.backend.config.token_bytes)
    before, evicted = engine.stats(), engine.prefix_stats().evicted_pages
    results = [run(engine, [wave], disturb=checking(3)) for wave in (first, second)]
    after = engine.stats()
    engine.resize_kv_cache(cap)
    swapped = after.preempt_swap - before.preempt_swap
    recomputed = after.preempt_recompute - before.preempt_recompute
    assert (swapped if engine.config.preemption_mode == "swap" else recomputed) > 0
    assert engine.prefix_stats().evicted_pages > evicted
    for wave, result in zip((first, second), results, strict=True):
        assert_agree({"2 ranks": result}, reference(SHAPES[SHAPE][0], wave))


def test_sleep_trim_and_pins_reach_every_rank(engine: LLMEngine) -> None:
    is_virtual = engine.backend.name == "virtual"
    assert engine.leader is not None
    prompt = list(range(40))
    engine.add_request("a", prompt, SamplingParams(temperature=0.0, max_tokens=8))
    expected = run_out(engine)["a"].outputs[0].token_ids
    assert engine.pin_prefix(prompt) == len(prompt)
    check_ledgers(engine)
    engine.add_request("b", prompt, SamplingParams(temperature=0.0, max_tokens=8))
    for _ in range(4):
        engine.step()
    engine.sleep()
    num_left = [report.kv_stats.created_pages for report in engine.leader.reports()]
    pinned = engine.prefix_stats().pinned_pages
    with pytest.raises(ConfigError, match="asleep"):
        engine.leader.check_ledgers()
    assert num_left == [pinned if is_virtual else 0] * RANKS
    assert engine.wake()
    check_ledgers(engine)
    assert run_out(engine)["b"].outputs[0].token_ids == expected
    assert engine.unpin_prefix(prompt) == len(prompt)
    assert_no_page_is_lost(engine)
    for report in engine.leader.reports():
        assert report.kv_stats.created_pages == report.kv_stats.in_use_pages
