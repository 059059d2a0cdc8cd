"""Too little memory, aborts and interruptions at every moment: everybody gets what is theirs."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

import vmalloc.engine.generation as generation
from tests.engine.running import PAGE, all_tokens, run_out, step, token_ids
from vmalloc import DriverError, KVCacheConfig, VirtualKVCache, _core, factory
from vmalloc.core_setup import make_driver
from vmalloc.engine import ConfigError, LLMEngine, SamplingParams, VmallocError
from vmalloc.engine.preemption_cost import FIRST_PREFILL_SECONDS, FIRST_SWAP_BANDWIDTH

PROMPT = [5, 17, 3, 88, 41, 2, 60, 9, 33, 71, 12, 8, 54]


def sampled(n: int = 3, **settings: Any) -> SamplingParams:
    return SamplingParams(**{"n": n, "seed": 3, "max_tokens": 20, **settings})


def beams(width: int = 3, **settings: Any) -> SamplingParams:
    return SamplingParams(
        **{"n": width, "use_beam_search": True, "temperature": 0.0, "max_tokens": 16, **settings}
    )


class TestAborts:
    """A request may be aborted in every state; the others write what they would have."""

    @pytest.fixture
    def engine(self, make_engine: Any) -> Any:
        engine = make_engine(max_num_seqs=8, max_num_batched_tokens=8)
        engine.add_request("other", PROMPT, sampled(2))
        self.expected = token_ids(run_out(engine)["other"])
        engine.add_request("other", PROMPT, sampled(2, use_prefix_cache=False))
        return engine

    def ends_well(self, engine: LLMEngine, finished: dict[str, Any] | None = None) -> None:
        engine.abort_request("0")
        engine.backend.check_invariants()
        outputs = run_out(engine, finished)
        assert list(outputs) == ["other"]
        assert token_ids(outputs["other"]) == self.expected
        engine.add_request("0", PROMPT, sampled(1, max_tokens=1))  # the name is free again
        assert list(run_out(engine)) == ["0"]

    def until(self, engine: LLMEngine, is_reached: Callable[[Any], bool]) -> None:
        group = engine._requests["0"]
        for _ in range(50):
            if is_reached(group):
                return
            step(engine, {})
        raise AssertionError(f"never reached: {group}")

    def test_waiting(self, engine: LLMEngine) -> None:
        engine.add_request("0", PROMPT, sampled(7))
        step(engine, {})
        assert engine.stats().num_waiting == 1
        self.ends_well(engine)

    def test_mid_prefill(self, engine: LLMEngine) -> None:
        engine.add_request("0", PROMPT * 4, sampled())
        self.until(engine, lambda group: 0 < group.root.num_computed_tokens < 40)
        self.ends_well(engine)

    def test_before_the_first_fork(self, engine: LLMEngine) -> None:
        engine.add_request("0", PROMPT, sampled())
        self.until(engine, lambda group: len(group.seqs) == 3)
        assert [seq.has_kv for seq in engine._requests["0"].seqs] == [True, False, False]
        self.ends_well(engine)

    def test_decoding(self, engine: LLMEngine) -> None:
        engine.add_request("0", PROMPT, sampled())
        self.until(engine, lambda group: group.root.num_output_tokens == 4)
        self.ends_well(engine)

    def test_with_a_reorder_pending(self, engine: LLMEngine) -> None:
        engine.add_request("0", PROMPT, beams())
        self.until(engine, lambda group: group.pending_parents is not None)
        self.ends_well(engine)

    @pytest.mark.parametrize("mode", ["swap", "recompute"])
    def test_preempted(self, mode: str, engine: LLMEngine) -> None:
        engine.scheduler._preemptor._mode = mode  # type: ignore[assignment]
        engine.add_request("0", PROMPT, beams())
        self.until(engine, lambda group: group.pending_parents is not None)
        engine.scheduler.preempt(engine._requests["0"])
        stats = engine.stats()
        assert (stats.num_swapped, stats.num_waiting) == ((1, 0) if mode == "swap" else (0, 1))
        self.ends_well(engine)

    def test_being_computed_again(self, engine: LLMEngine) -> None:
        engine.scheduler._preemptor._mode = "recompute"
        engine.add_request("0", PROMPT, sampled(use_prefix_cache=False))
        self.until(engine, lambda group: group.root.num_output_tokens == 9)
        engine.scheduler.preempt(engine._requests["0"])
        self.until(engine, lambda group: [seq.has_kv for seq in group.seqs] == [True, False, False])
        self.ends_well(engine)

    def test_asleep(self, engine: LLMEngine) -> None:
        engine.add_request("0", PROMPT, sampled())
        self.until(engine, lambda group: group.root.num_output_tokens == 4)
        engine.sleep()
        engine.abort_request("0")
        assert engine.wake()
        self.ends_well(engine)


def test_a_thousand_requests_on_a_tiny_pool_all_end_right(make_engine: Any) -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(97) for _ in range(rng.randint(1, 12))] for _ in range(1000)]
    kinds = [
        SamplingParams(temperature=0.0, max_tokens=3),
        sampled(2, max_tokens=4),
        sampled(1, best_of=2, max_tokens=2),
        SamplingParams(seed=9, max_tokens=6),
        beams(2, max_tokens=3),
    ]
    answers = []
    for settings in ({}, {"kv_cache_memory_bytes": 14 * PAGE, "swap_space_bytes": 6 * PAGE}):
        engine = make_engine(max_num_seqs=24, **settings)
        for idx, prompt in enumerate(prompts):
            engine.add_request(str(idx), prompt, kinds[idx % len(kinds)])
        answers.append(all_tokens(run_out(engine)))
    assert len(answers[0]) == 1000
    assert answers[0] == answers[1]
    assert engine.scheduler.num_preemptions > 0
    assert engine.kv_stats().created_pages <= 14


def test_what_cannot_fit_fails_alone_with_its_own_error(make_engine: Any) -> None:
    engine = make_engine(kv_cache_memory_bytes=12 * PAGE, block_size=4)
    limit = engine.backend.max_seq_tokens()
    engine.add_request("long prompt", [1] * (limit + 1), sampled(1))
    engine.add_request("long answer", [2] * 10, sampled(1, max_tokens=None))
    engine.add_request("wide", [3] * 4, sampled(8, max_tokens=40))
    engine.add_request("beams", [3] * 4, beams(8, max_tokens=40))
    engine.add_request("fits", [4] * 10, sampled(2, max_tokens=12))
    outputs = run_out(engine)
    assert "does not fit the KV cache" in outputs["long prompt"].error
    assert f"{engine.kv_stats().capacity_bytes} bytes holds {limit}" in outputs["long prompt"].error
    assert "nothing left to preempt" in outputs["long answer"].error
    assert "in each of 8 sequences" in outputs["wide"].error
    assert [one.index for one in outputs["wide"].outputs] == list(range(8))
    assert len(outputs["wide"].outputs[0].token_ids) > 0
    assert outputs["beams"].error is not None
    assert outputs["fits"].error is None
    assert len(outputs["fits"].outputs) == 2


def test_a_full_swap_space_turns_swaps_into_recomputes(
    make_engine: Any, prompts: list[list[int]]
) -> None:
    answers = []
    for settings in (
        {},
        {"kv_cache_memory_bytes": 40 * PAGE, "swap_space_bytes": 12 * PAGE},
        {"kv_cache_memory_bytes": 40 * PAGE, "swap_space_bytes": 0},
    ):
        engine = make_engine(preemption_mode="swap", **settings)
        for idx, prompt in enumerate(prompts):
            engine.add_request(str(idx), prompt, sampled(1, max_tokens=30))
        answers.append(all_tokens(run_out(engine)))
        stats = engine.stats()
        if not settings:
            assert engine.scheduler.num_preemptions == 0
        else:
            assert stats.preempt_recompute > 0
            assert (stats.preempt_swap > 0) == (settings["swap_space_bytes"] > 0)
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_each_preemption_is_one_line_and_one_count(
    mode: str, make_engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vmalloc.engine.preemption")
    engine = make_engine(kv_cache_memory_bytes=16 * PAGE, preemption_mode=mode, block_size=4)
    for idx in range(4):
        engine.add_request(f"r{idx}", [idx] * 12, sampled(1, max_tokens=20, ignore_eos=True))
    outputs = run_out(engine)
    lines = [text for record in caplog.records if "preempt" in (text := record.getMessage())]
    stats = engine.stats()
    assert len(lines) == (stats.preempt_swap if mode == "swap" else stats.preempt_recompute) > 0
    assert sum(output.metrics.num_preemptions for output in outputs.values()) == len(lines)
    words = "bytes moved" if mode == "swap" else "computed tokens dropped"
    assert all(f"by {mode}, " in line and words in line for line in lines)
    for line in lines:
        before, after = map(
            int, re.findall(r"others could take (\d+) pages before, (\d+)", line)[0]
        )
        assert before < after
    assert outputs["r0"].metrics.num_preemptions == 0
    if mode == "swap":
        moved = sum(int(line.split("swap, ")[1].split(" bytes")[0]) for line in lines)
        assert moved == stats.swapped_bytes > 0
    else:
        dropped = sum(int(line.split("recompute, ")[1].split(" computed")[0]) for line in lines)
        assert dropped == stats.preempted_tokens > 0


def test_what_a_swapped_group_still_holds_is_freed_before_the_last_one_fails(
    make_engine: Any,
) -> None:
    engine = make_engine(preemption_mode="swap", block_size=4, swap_space_bytes=100 * PAGE)
    common = PROMPT * 5 + PROMPT[:5]
    engine.add_request("grows", [1], sampled(1, max_tokens=60))
    engine.add_request("goes", common, sampled(1, max_tokens=30))
    engine.add_request("swapped", [*common, 7], sampled(1, max_tokens=4))
    finished: dict[str, Any] = {}
    while engine.stats().num_running < 3:
        step(engine, finished)
    assert engine._requests["swapped"].num_cached_tokens > 0
    engine.scheduler.preempt(engine._requests["swapped"])
    engine.abort_request("goes")  # now the shared pages are those of the swapped one alone
    engine.resize_kv_cache(12 * PAGE)
    outputs = run_out(engine, finished)
    assert [output.error for output in outputs.values()] == [None, None]
    assert list(outputs) == ["grows", "swapped"]


def test_rows_that_were_never_computed_are_not_copied(make_engine: Any) -> None:
    engine = make_engine(preemption_mode="swap", max_num_batched_tokens=16, block_size=4)
    engine.add_request("0", PROMPT * 5, sampled(1))
    step(engine, {})
    (group,) = engine.scheduler.running
    engine.scheduler.schedule()  # backs 16 more rows for a step that does not come
    assert (group.root.num_computed_tokens, group.root.num_rows) == (16, 32)
    engine.scheduler.preempt(group)
    # 16 rows of 576 bytes, in whole pages.
    assert 16 * 576 <= engine.stats().swapped_bytes < 16 * 576 + PAGE
    assert run_out(engine)["0"].error is None


@pytest.mark.parametrize("prompt", [[5], PROMPT], ids=len)
def test_a_group_that_chose_nothing_yet_starts_anew(
    prompt: list[int], make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    answers = []
    for is_interrupted in (False, True):
        engine = make_engine(preemption_mode="recompute")
        engine.add_request("a", prompt, sampled(3))
        if is_interrupted:
            with monkeypatch.context() as patch:
                patch.setattr(generation, "sample", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    engine.step()
            (group,) = engine.scheduler.running
            assert len(group.seqs) == 3
            engine.scheduler.preempt(group)
            assert len(group.seqs) == 1
        answers.append(all_tokens(run_out(engine)))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("is_copying_cheap", [False, True])
def test_auto_takes_what_costs_less_time(is_copying_cheap: bool, make_engine: Any) -> None:
    engine = make_engine(preemption_mode="auto", swap_space_bytes=100 * PAGE)
    engine.add_request("0", PROMPT, sampled(2))
    for _ in range(4):
        step(engine, {})
    cost = engine.scheduler.cost
    cost.prefill_seconds, cost.swap_bandwidth = 1e-3, 1e12 if is_copying_cheap else 1.0
    engine.scheduler.preempt(engine._requests["0"])
    stats = engine.stats()
    assert (stats.preempt_swap, stats.preempt_recompute) == ((1, 0) if is_copying_cheap else (0, 1))
    run_out(engine)


def test_steps_and_copies_are_measured(make_engine: Any) -> None:
    engine = make_engine(preemption_mode="swap")
    cost = engine.scheduler.cost
    assert (cost.prefill_seconds, cost.swap_bandwidth) == (
        FIRST_PREFILL_SECONDS,
        FIRST_SWAP_BANDWIDTH,
    )
    engine.add_request("0", PROMPT, sampled(2))
    step(engine, {})
    assert cost.prefill_seconds != FIRST_PREFILL_SECONDS
    engine.scheduler.preempt(engine._requests["0"])
    assert cost.swap_bandwidth != FIRST_SWAP_BANDWIDTH
    run_out(engine)


@pytest.mark.parametrize("policy", ["on_demand", "max_length", "power_of_two", "oracle"])
def test_a_commit_policy_changes_memory_and_no_output(policy: str, make_engine: Any) -> None:
    answers = []
    for settings in ({}, {"commit_policy": policy, "kv_cache_memory_bytes": 80 * PAGE}):
        engine = make_engine(**{"kv_backend": "virtual", **settings})
        engine.add_request("a", PROMPT, sampled(3))
        engine.add_request("b", PROMPT[:4], beams(2))
        engine.add_request("c", PROMPT[::-1], sampled(1))
        answers.append(all_tokens(run_out(engine)))
    assert answers[0] == answers[1]


class TestBrokenBackend:
    """A call of the backend that raises loses no request."""

    @pytest.mark.parametrize(
        ("name", "at"),
        [
            *((name, 0) for name in ("try_swap_out", "try_swap_in", "try_admit", "match_prefix")),
            *(("try_fork", at) for at in (0, 1)),
            *(("try_extend", at) for at in (0, 1, 5)),
            *(("try_reorder", at) for at in (0, 3)),
            *(("register_tokens", at) for at in (0, 1, 2)),
            *(("batch_view", at) for at in (0, 4)),
            *(("stats", at) for at in (0, 1)),
        ],
    )
    def test_the_next_step_goes_on(
        self, name: str, at: int, make_engine: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answers = []
        for is_broken in (False, True):
            engine = make_engine(
                kv_cache_memory_bytes=26 * PAGE,
                swap_space_bytes=40 * PAGE,
                preemption_mode="swap",
                max_num_batched_tokens=20,
            )
            original, calls = getattr(engine.backend, name), iter(range(10**6))

            def breaks(*args: Any, original: Any = original, calls: Any = calls) -> Any:
                if next(calls) == at:
                    raise KeyboardInterrupt
                return original(*args)

            for idx in range(3):
                params = beams(3) if idx == 1 else sampled(3, seed=idx)
                engine.add_request(str(idx), [*PROMPT, *PROMPT, idx], params)
            finished: dict[str, Any] = {}
            if is_broken:
                monkeypatch.setattr(engine.backend, name, breaks)
                with pytest.raises(KeyboardInterrupt):
                    run_out(engine, finished)
                engine.backend.check_invariants()
            answers.append(all_tokens(run_out(engine, finished)))
        assert answers[0] == answers[1]


class TestSleep:
    @pytest.mark.parametrize("swap_pages", [0, 200])
    def test_requests_go_on_after_it_as_if_nothing_was(
        self, swap_pages: int, make_engine: Any
    ) -> None:
        requests = {"a": sampled(3), "b": beams(3), "c": sampled(1)}
        answers = []
        for sleeps in (False, True):
            engine = make_engine(swap_space_bytes=swap_pages * PAGE)
            for name in ("a", "b"):
                engine.add_request(name, PROMPT, requests[name])
            finished: dict[str, Any] = {}
            for _ in range(5):
                step(engine, finished)
            if sleeps:
                engine.sleep()
                assert engine.is_asleep
                assert engine.kv_stats().created_pages == 0
                with pytest.raises(VmallocError, match="sleeps"):
                    engine.step()
            engine.add_request("c", PROMPT, requests["c"])
            if sleeps:
                assert engine.has_unfinished_requests()
                assert engine.wake()
                assert not engine.is_asleep
            answers.append(all_tokens(run_out(engine, finished)))
        assert answers[0] == answers[1]

    def test_above_a_lowered_cap_all_is_computed_again(self, make_engine: Any) -> None:
        answers = []
        for sleeps in (False, True):
            engine = make_engine(swap_space_bytes=200 * PAGE)
            for name, params in {"a": sampled(3), "b": beams(3)}.items():
                engine.add_request(name, PROMPT, params)
            finished: dict[str, Any] = {}
            for _ in range(5):
                step(engine, finished)
            if sleeps:
                engine.resize_kv_cache(engine.kv_stats().committed_bytes - PAGE)
                engine.sleep()
                assert engine.kv_stats().swapped_bytes == 0
                assert engine.wake()
                assert engine.stats().num_waiting == 2
            answers.append(all_tokens(run_out(engine, finished)))
        assert answers[0] == answers[1]

    def test_pins_above_a_lowered_cap_keep_it_awake(self, make_engine: Any) -> None:
        engine = make_engine()
        engine.add_request("a", PROMPT * 4, sampled(1))
        run_out(engine)
        assert engine.pin_prefix(PROMPT * 4) > 0
        engine.resize_kv_cache(engine.kv_stats().committed_bytes - PAGE)
        with pytest.raises(VmallocError, match="pinned prefixes exceed the cap"):
            engine.sleep()
        assert not engine.is_asleep
        engine.unpin_prefix(PROMPT * 4)
        engine.sleep()
        assert engine.wake()

    @pytest.mark.parametrize("make_engine", ["virtual"], indirect=True)
    def test_a_sleep_that_raises_can_be_woken_from(
        self, make_engine: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def make_cache(config: KVCacheConfig) -> VirtualKVCache:
            self.driver = _core.FaultDriver(make_driver(config))
            return VirtualKVCache(config, driver=self.driver)

        monkeypatch.setattr(factory, "VirtualKVCache", make_cache)
        answers, num_raised = [], 0
        for call in (None, *range(12)):
            engine = make_engine(swap_space_bytes=200 * PAGE)
            engine.add_request("a", PROMPT, sampled(3))
            finished: dict[str, Any] = {}
            for _ in range(5):
                step(engine, finished)
            if call is not None:
                self.driver.fail_release_call(call)
                try:
                    engine.sleep()
                except DriverError:
                    num_raised += 1
                self.driver.fail_release_call(1 << 40)
                assert engine.is_asleep
                assert engine.wake()
            answers.append(all_tokens(run_out(engine, finished)))
        assert all(answer == answers[0] for answer in answers)
        assert num_raised >= 2

    def test_waking_twice_and_sleeping_twice_is_told_apart(self, make_engine: Any) -> None:
        engine = make_engine()
        assert engine.wake()
        engine.sleep()
        with pytest.raises(VmallocError, match="wake"):
            engine.sleep()
        assert engine.wake()


def test_the_cap_moves_while_requests_run(make_engine: Any) -> None:
    answers = []
    for moves in (False, True):
        engine = make_engine(kv_cache_memory_bytes=100 * PAGE, block_size=4)
        for idx in range(6):
            engine.add_request(str(idx), [idx] * 20, sampled(1, max_tokens=20))
        finished: dict[str, Any] = {}
        for _ in range(4):
            step(engine, finished)
        if moves:
            engine.resize_kv_cache(14 * PAGE)
        answers.append(all_tokens(run_out(engine, finished)))
        if moves:
            assert engine.scheduler.num_preemptions > 0
            stats = engine.kv_stats()
            assert 13 * PAGE < stats.capacity_bytes <= 14 * PAGE
            assert stats.created_pages * stats.page_bytes <= stats.capacity_bytes
    assert answers[0] == answers[1]


def test_a_pinned_prefix_stays_when_others_are_forgotten(make_engine: Any) -> None:
    engine = make_engine(block_size=4)
    prompts = [[idx, *PROMPT * 3] for idx in range(2)]
    assert engine.pin_prefix(prompts[0]) == 0  # nothing of it was computed yet
    for act in (engine.pin_prefix, engine.unpin_prefix):
        with pytest.raises(ConfigError, match="cache_salt has 1025 characters"):
            act(prompts[0], "s" * 1025)

    def num_cached(idx: int) -> int:
        engine.add_request("0", prompts[idx], sampled(1, max_tokens=1))
        num_tokens: int = run_out(engine)["0"].num_cached_tokens
        return num_tokens

    assert [num_cached(0), num_cached(1)] == [0, 0]
    num_pinned = engine.pin_prefix(prompts[0])
    assert num_pinned > 20
    assert engine.flush_prefix_cache() > 0
    assert num_cached(0) >= num_pinned - 1
    assert num_cached(1) == 0
    assert engine.unpin_prefix(prompts[0]) == num_pinned
    engine.flush_prefix_cache()
    assert num_cached(0) == 0


class TestPriority:
    def names(self, engine: LLMEngine) -> list[str]:
        return [group.request_id for group in engine.scheduler.running]

    def test_a_lower_number_goes_first_and_ties_go_by_arrival(self, make_engine: Any) -> None:
        engine = make_engine(max_num_seqs=1, scheduling_policy="priority")
        for name, priority in (("a", 0), ("b", 5), ("c", -1), ("d", 5), ("e", -1)):
            engine.add_request(name, PROMPT, sampled(1, max_tokens=2), priority=priority)
        assert list(run_out(engine)) == ["c", "e", "a", "b", "d"]

    def test_the_least_urgent_gives_up_its_memory(self, make_engine: Any) -> None:
        engine = make_engine(
            kv_cache_memory_bytes=14 * PAGE, scheduling_policy="priority", block_size=4
        )
        for name, priority in (("late", 9), ("soon", 0), ("now", -3)):
            params = sampled(1, max_tokens=30, ignore_eos=True)
            engine.add_request(name, [len(name)] * 12, params, priority=priority)
        outputs = run_out(engine)
        assert list(outputs) == ["now", "soon", "late"]
        assert outputs["late"].metrics.num_preemptions > 0
        assert outputs["now"].metrics.num_preemptions == 0

    def test_nobody_waits_for_ever(self, make_engine: Any) -> None:
        engine = make_engine(max_num_seqs=1, scheduling_policy="priority")
        engine.add_request("patient", PROMPT, sampled(1, max_tokens=1), priority=1)
        finished: dict[str, Any] = {}
        for idx in range(600):  # more urgent ones come without end
            engine.add_request(f"urgent {idx}", [1, 2], sampled(1, max_tokens=1))
            step(engine, finished)
            if "patient" in finished:
                break
        assert 100 < idx < 400
        for name in list(engine._requests):
            engine.abort_request(name)

    def test_a_priority_needs_the_policy_and_a_number(self, make_engine: Any) -> None:
        engine = make_engine()
        with pytest.raises(ConfigError, match="scheduling_policy"):
            engine.add_request("0", PROMPT, priority=1)
        with pytest.raises(ConfigError, match="priority is 'x'"):
            engine.add_request("0", PROMPT, priority="x")
        assert not engine.has_unfinished_requests()


KINDS: list[Callable[[int], SamplingParams]] = [
    lambda seed: SamplingParams(temperature=0.0, max_tokens=1 + seed % 20, logprobs=1),
    lambda seed: sampled(2 + seed % 3, seed=seed, stop_token_ids=list(range(8))),
    lambda seed: sampled(2, best_of=4, seed=seed, max_tokens=1 + seed % 9),
    lambda seed: beams(2 + seed % 3, max_tokens=1 + seed % 14, stop_token_ids=[1, 2, 3]),
    lambda seed: sampled(1, seed=seed, top_k=9, prompt_logprobs=seed % 2),
    lambda seed: sampled(3, seed=seed, repetition_penalty=1.3, use_prefix_cache=False),
]


class TestChaos:
    """Random requests, and at random moments aborts, preemptions, sleep and exceptions."""

    @pytest.mark.parametrize("seed", range(6))
    def test_whatever_happens_everybody_gets_what_is_theirs(
        self, seed: int, make_engine: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rng = random.Random(seed)
        common = [rng.randrange(97) for _ in range(40)]
        requests = {}
        for idx in range(10):
            prompt = common[: rng.randint(0, 40)] + [rng.randrange(97) for _ in range(8)]
            requests[str(idx)] = prompt, rng.choice(KINDS)(rng.randrange(100))
        calm = make_engine(max_num_seqs=64, enable_prefix_caching=False)
        for name, (prompt, params) in requests.items():
            calm.add_request(name, prompt, params)
        expected = all_tokens(run_out(calm))
        seats = rng.randint(5, 10)
        engine = make_engine(
            max_num_seqs=seats,
            max_num_batched_tokens=rng.choice([seats, 30, 200]),
            block_size=rng.choice([4, 16]),
            kv_cache_memory_bytes=rng.choice([40, 60]) * PAGE,
            swap_space_bytes=rng.choice([10, 100]) * PAGE,
            preemption_mode=rng.choice(["swap", "recompute"]),
        )
        finished: dict[str, Any] = {}
        aborted: set[str] = set()
        waiting = list(requests.items())
        while waiting or engine.has_unfinished_requests():
            if waiting and rng.random() < 0.5:
                name, (prompt, params) = waiting.pop()
                engine.add_request(name, prompt, params)
            self.disturb(engine, rng, aborted)
            with monkeypatch.context() as patch:
                if rng.random() < 0.05:
                    self.break_something(patch, rng)
                try:
                    step(engine, finished)
                except KeyboardInterrupt:
                    engine.backend.check_invariants()
        assert engine.scheduler.num_preemptions > 0
        run_out(engine)
        assert set(finished) == set(requests) - aborted
        for name, tokens in all_tokens(finished).items():
            assert tokens == expected[name], requests[name]

    def disturb(self, engine: LLMEngine, rng: random.Random, aborted: set[str]) -> None:
        chance = rng.random()
        if chance < 0.02 and engine._requests:
            aborted.add(rng.choice(list(engine._requests)))
            engine.abort_request(aborted)
        elif chance < 0.14 and engine.scheduler.running:
            engine.scheduler.preempt(rng.choice(engine.scheduler.running))
        elif chance < 0.16:
            engine.sleep()
            assert engine.wake()
        elif chance < 0.18:
            engine.flush_prefix_cache()

    def break_something(self, patch: pytest.MonkeyPatch, rng: random.Random) -> None:
        name = rng.choice(["sample", "check_stop", "advance_beams", "score_beams"])
        original, calls, at = getattr(generation, name), iter(range(99)), rng.randrange(3)

        def breaks(*args: Any) -> Any:
            if next(calls) == at:
                raise KeyboardInterrupt
            return original(*args)

        patch.setattr(generation, name, breaks)
