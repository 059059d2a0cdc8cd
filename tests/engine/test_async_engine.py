"""The engine for asyncio: what is submitted ends, whatever happens to it, and leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vmalloc.engine import (
    AsyncLLMEngine,
    ConfigError,
    EngineConfig,
    EngineRequest,
    EngineUnavailableError,
    LLMEngine,
    QueueFullError,
    RequestAbortedError,
    RequestOutputKind,
    RequestStream,
    RequestTimeoutError,
    SamplingParams,
    StartupPhases,
    load_engine,
)
from vmalloc.engine.engine_thread import MAX_FAILED_ROUNDS, MAX_FAILED_STEPS
from vmalloc.engine.model_loader import load_model, resolve_model_name
from vmalloc.engine.tokenizer import load_tokenizer

HANG_SECONDS = 60.0
PROMPTS = ["def ", "import ", "class Stack:", "for "]
POISON = 7
"""A token; prompts that start with it make steps raise."""


class FaultyEngine(LLMEngine):
    """A real engine whose steps raise, after they were scheduled, when ``fails(seqs)`` says so."""

    fails: Callable[[list[Any]], bool] = staticmethod(lambda seqs: False)

    def _compute(self, batch: Any) -> Any:
        if batch.seqs and self.fails(batch.seqs):
            raise RuntimeError("injected fault")
        return super()._compute(batch)


def is_poisoned(seqs: list[Any]) -> bool:
    return any(seq.token_ids[0] == POISON for seq in seqs)


def params(max_tokens: int = 12, **kwargs: Any) -> SamplingParams:
    kwargs = {"temperature": 0.0, "ignore_eos": True, **kwargs}
    return SamplingParams(max_tokens=max_tokens, output_kind=RequestOutputKind.DELTA, **kwargs)


def request(prompt: Any = "def ", max_tokens: int = 12, **kwargs: Any) -> EngineRequest:
    return EngineRequest(prompt, params(max_tokens, **kwargs))


LONG = request("import ", 1900)


def load(phases: StartupPhases, **kwargs: Any) -> FaultyEngine:
    config = EngineConfig(**{"max_num_seqs": 8, "batch_invariant": True, **kwargs})
    name = resolve_model_name("demo")
    return FaultyEngine(load_model(name, "auto", torch.device("cpu")), load_tokenizer(name), config)


@contextlib.asynccontextmanager
async def running(
    *, front: dict[str, Any] | None = None, **kwargs: Any
) -> AsyncIterator[AsyncLLMEngine]:
    """A started engine; ``front``: settings of ``AsyncLLMEngine``, the rest of ``EngineConfig``."""
    engine = AsyncLLMEngine(lambda phases: load(phases, **kwargs), **(front or {}))
    engine.start()
    await engine.wait_started()
    try:
        yield engine
    finally:
        await engine.close()


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine; a callback that raises fails the test."""

    async def supervised() -> None:
        unhandled: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, told: unhandled.append(told))
        await asyncio.wait_for(work, HANG_SECONDS)
        assert unhandled == []

    asyncio.run(supervised())


async def read(stream: RequestStream) -> list[str]:
    """The whole text of every prompt."""
    texts = ["" for _ in stream.names]
    async with stream:
        async for prompt_idx, output in stream:
            assert output.error is None
            for completion in output.outputs:
                texts[prompt_idx] += completion.text
    return texts


async def until(is_reached: Callable[[], bool | Awaitable[bool]]) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while True:
        reached = is_reached()
        if reached if isinstance(reached, bool) else await reached:
            return
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def assert_nothing_is_left(engine: AsyncLLMEngine) -> None:
    """Neither the front, nor the thread, nor the engine knows of any request or page in use."""
    assert (engine.num_live, engine.num_queued) == (0, 0)
    assert engine._streams == {}
    assert not await engine.call(LLMEngine.has_unfinished_requests)
    await engine.call(LLMEngine.flush_prefix_cache)
    # A slot may be getting its first page for a request that is gone again.
    await engine.call(lambda engine: engine.backend.wait_worker())
    await engine.call(LLMEngine.trim_kv_cache)
    await engine.call(lambda engine: engine.backend.check_invariants())
    snapshot = engine.snapshot
    assert snapshot is not None
    assert (snapshot.num_live_requests, snapshot.num_queued) == (0, 0)
    assert (snapshot.kv.num_live_seqs, snapshot.kv.created_pages) == (0, 0)


async def first_output(stream: RequestStream) -> None:
    assert await stream.next_outputs()


@cache
def reference(max_tokens: int = 12) -> list[str]:
    """What an engine on the caller's own thread writes after each prompt, one after another."""
    config = EngineConfig(max_num_seqs=8, batch_invariant=True)
    texts = []
    with load_engine("demo", config=config) as engine:
        for prompt in PROMPTS:
            engine.add_request("0", prompt, params(max_tokens))
            text = ""
            while engine.has_unfinished_requests():
                for output in engine.step():
                    text += "".join(completion.text for completion in output.outputs)
            texts.append(text)
    return texts


class TestSubmit:
    def test_streams_write_what_the_engine_writes(self) -> None:
        async def work() -> None:
            async with running() as engine:
                together = await engine.submit("all", [request(prompt) for prompt in PROMPTS])
                alone = [
                    await engine.submit(str(idx), [request(prompt)])
                    for idx, prompt in enumerate(PROMPTS)
                ]
                texts = await asyncio.gather(*(read(stream) for stream in [together, *alone]))
                assert texts[0] == reference()
                assert [text for (text,) in texts[1:]] == reference()
                await assert_nothing_is_left(engine)

        run(work())

    @pytest.mark.parametrize("bad", [[10**6], [], 12, [1] * 4000, "x" * 100_000])
    def test_one_bad_prompt_takes_none(self, bad: Any) -> None:
        async def work() -> None:
            async with running() as engine:
                with pytest.raises(ConfigError):
                    await engine.submit("0", [request(), request(), request(bad), request()])
                await assert_nothing_is_left(engine)
                assert await read(await engine.submit("0", [request()])) == reference()[:1]

        run(work())

    def test_a_prompt_larger_than_the_cache_is_refused(self) -> None:
        async def work() -> None:
            async with running(kv_cache_memory_bytes=8 * 65536) as engine:
                most = await engine.call(lambda engine: engine.backend.max_seq_tokens())
                with pytest.raises(ConfigError, match=f"holds {most} tokens of one sequence"):
                    await engine.submit("0", [request([1] * (most + 1))])
                await assert_nothing_is_left(engine)

        run(work())

    def test_a_live_name_is_refused_until_all_its_prompts_ended(self) -> None:
        async def work() -> None:
            async with running() as engine:
                stream = await engine.submit("0", [request("def ", 1), LONG])
                await until(lambda: engine.num_live == 1)
                with pytest.raises(ConfigError, match="a live request has that name"):
                    await engine.submit("0", [request()])
                assert engine.abort("0")
                with pytest.raises(RequestAbortedError):
                    await read(stream)
                assert await read(await engine.submit("0", [request()])) == reference()[:1]
                assert not engine.abort("0")
                await assert_nothing_is_left(engine)

        run(work())

    def test_a_name_that_is_used_again_hears_nothing_of_its_predecessor(self) -> None:
        async def work() -> None:
            async with running() as engine:
                for _ in range(30):
                    stream = await engine.submit("0", [request("import ", 500)])
                    await first_output(stream)
                    time.sleep(0.003)  # an output is on its way while nobody takes it
                    stream.abort()
                    assert await read(await engine.submit("0", [request()])) == reference()[:1]
                await assert_nothing_is_left(engine)

        run(work())

    def test_an_abort_wakes_its_reader(self) -> None:
        async def work() -> None:
            async with running(max_num_seqs=1) as engine:
                blocker = await engine.submit("blocker", [LONG])
                await first_output(blocker)
                stream = await engine.submit("0", [request()])
                reader = asyncio.create_task(read(stream))
                await asyncio.sleep(0)
                stream.abort()
                assert await reader == [""]
                blocker.abort()
                await assert_nothing_is_left(engine)

        run(work())


class TestQueue:
    def test_it_is_bounded_and_room_comes_back(self) -> None:
        async def work() -> None:
            async with running(max_num_seqs=1, front={"max_queued_requests": 2}) as engine:
                blocker = await engine.submit("blocker", [LONG])
                await first_output(blocker)
                with pytest.raises(ConfigError, match="max_queued_requests is 2"):
                    await engine.submit("0", [request()] * 3)
                queued = [await engine.submit(str(idx), [request()]) for idx in range(2)]
                assert engine.num_queued == 2
                with pytest.raises(QueueFullError, match="2 requests are queued; the limit is 2"):
                    await engine.submit("3", [request()])
                assert engine.abort("0")
                assert engine.num_queued == 1
                with pytest.raises(QueueFullError):
                    await engine.submit("4", [request()] * 2)
                queued.append(await engine.submit("5", [request()]))
                blocker.abort()
                with pytest.raises(RequestAbortedError):
                    await read(queued[0])
                assert await read(queued[1]) == await read(queued[2]) == reference()[:1]
                await assert_nothing_is_left(engine)

        run(work())

    def test_requests_that_end_without_a_step_leave_it(self) -> None:
        async def work() -> None:
            async with running(
                kv_cache_memory_bytes=8 * 65536, front={"max_queued_requests": 3}
            ) as engine:
                most = await engine.call(lambda engine: engine.backend.max_seq_tokens())
                for idx in range(5):
                    stream = await engine.submit(str(idx), [request([1] * most)] * 3)
                    async for _, output in stream:
                        assert output.error is not None
                        assert output.metrics.first_scheduled_time is None
                    assert engine.num_queued == 0
                await assert_nothing_is_left(engine)

        run(work())

    def test_a_request_that_waits_too_long_ends(self) -> None:
        async def work() -> None:
            async with running(max_num_seqs=1, front={"queue_timeout_s": 0.1}) as engine:
                blocker = await engine.submit("blocker", [LONG])
                await first_output(blocker)
                stream = await engine.submit("0", [request()])
                with pytest.raises(
                    RequestTimeoutError, match=r"did not start within 0\.1"
                ) as caught:
                    await read(stream)
                assert caught.value.kind == "queue"
                assert (engine.num_live, engine.num_queued) == (1, 0)
                await first_output(blocker)  # which started in time, and goes on
                blocker.abort()
                await assert_nothing_is_left(engine)

        run(work())

    def test_a_request_that_takes_too_long_ends(self) -> None:
        async def work() -> None:
            async with running() as engine:
                stream = await engine.submit("0", [LONG], timeout_s=0.2)
                await first_output(stream)
                with pytest.raises(RequestTimeoutError, match=r"did not end within 0\.2") as caught:
                    await read(stream)
                assert caught.value.kind == "request"
                await assert_nothing_is_left(engine)
                in_time = await engine.submit("0", [request()], timeout_s=HANG_SECONDS)
                assert await read(in_time) == reference()[:1]

        run(work())


class TestEnd:
    def test_a_drain_lets_live_requests_end_and_takes_no_more(self) -> None:
        async def work() -> None:
            async with running(max_num_seqs=2) as engine:
                streams = [
                    await engine.submit(str(idx), [request(prompt)])
                    for idx, prompt in enumerate(PROMPTS)
                ]
                drain = asyncio.create_task(engine.drain(HANG_SECONDS))
                await asyncio.sleep(0)
                with pytest.raises(EngineUnavailableError) as caught:
                    await engine.submit("late", [request()])
                assert (caught.value.state, engine.state) == ("draining", "draining")
                assert caught.value.retry_after_s is not None
                assert await drain
                assert [(await read(stream))[0] for stream in streams] == reference()

        run(work())

    def test_a_drain_wakes_a_sleeper_for_those_who_wait(self) -> None:
        async def work() -> None:
            async with running() as engine:
                stream = await engine.submit("0", [request(PROMPTS[0])])
                await engine.call(LLMEngine.sleep)
                assert await engine.drain(HANG_SECONDS)
                assert (await read(stream))[0] == reference()[0]

        run(work())

    def test_a_drain_ends_in_time_and_a_close_tells_who_is_left(self) -> None:
        async def work() -> None:
            async with running() as engine:
                streams = [await engine.submit(str(idx), [LONG]) for idx in range(3)]
                readers = [asyncio.create_task(read(stream)) for stream in streams]
                assert not await engine.drain(0.1)
                await engine.close()
                for result in await asyncio.gather(*readers, return_exceptions=True):
                    assert isinstance(result, EngineUnavailableError)
                    assert result.state == "stopped"
                assert (engine.num_live, engine.num_queued, engine.state) == (0, 0, "stopped")
                await engine.close()  # again
                for refused in (engine.submit("0", [request()]), engine.call(lambda engine: 0)):
                    with pytest.raises(EngineUnavailableError, match="stopped"):
                        await refused

        run(work())

    def test_a_close_fails_calls_that_wait(self) -> None:
        async def work() -> None:
            async with running() as engine:
                first = asyncio.create_task(engine.call(lambda engine: time.sleep(0.2)))
                await asyncio.sleep(0.05)
                calls = [asyncio.create_task(engine.call(lambda engine: 1)) for _ in range(3)]
                await asyncio.sleep(0)
                await engine.close()
                results = await asyncio.gather(first, *calls, return_exceptions=True)
                assert all(isinstance(result, EngineUnavailableError) for result in results[1:])

        run(work())

    def test_a_close_while_it_loads_complains_to_nobody(self) -> None:
        async def work() -> None:
            engine = AsyncLLMEngine(load)
            engine.start()
            await engine.close()
            await asyncio.sleep(0.05)
            assert engine.state == "stopped"

        run(work())

    def test_a_load_that_fails_fails_every_waiter(self) -> None:
        def fail(phases: StartupPhases) -> LLMEngine:
            with phases.phase("load weights"):
                time.sleep(0.1)
                raise ConfigError("model is 'x'; there is none")

        async def work() -> None:
            engine = AsyncLLMEngine(fail)
            engine.start()
            with pytest.raises(EngineUnavailableError) as caught:
                await engine.submit("0", [request()])
            assert caught.value.state == "starting"
            call = asyncio.create_task(engine.call(lambda engine: 1))
            with pytest.raises(ConfigError, match="there is none"):
                await engine.wait_started()
            with pytest.raises(EngineUnavailableError, match="there is none"):
                await call
            assert engine.state == "dead"
            assert engine.failure == "ConfigError: model is 'x'; there is none"
            await engine.close()
            assert engine.state == "dead"

        run(work())


class TestFaults:
    """Steps that raise: tried again, then blamed on who runs, at last on the engine."""

    @staticmethod
    async def inject(engine: AsyncLLMEngine, fails: Callable[[list[Any]], bool]) -> None:
        await engine.call(lambda engine: setattr(engine, "fails", fails))

    @pytest.mark.parametrize("num_faults", [1, MAX_FAILED_STEPS - 1])
    def test_one_fault_changes_nothing(self, num_faults: int) -> None:
        async def work() -> None:
            async with running() as engine:
                steps = iter(range(1000))
                await self.inject(engine, lambda seqs: 5 <= next(steps) < 5 + num_faults)
                stream = await engine.submit("0", [request(prompt) for prompt in PROMPTS])
                assert await read(stream) == reference()
                assert next(steps) > 5 + num_faults
                await assert_nothing_is_left(engine)

        run(work())

    def test_two_in_a_row_end_who_runs_and_nobody_else(self) -> None:
        async def work() -> None:
            async with running(max_num_seqs=2) as engine:
                steps = iter(range(10_000))
                # Steps of two sequences count: a fast engine has the first one alone for some.
                await self.inject(
                    engine,
                    lambda seqs: len(seqs) == 2 and 1 <= next(steps) < 1 + MAX_FAILED_STEPS,
                )
                streams = await asyncio.gather(
                    *(
                        engine.submit(str(idx), [request(prompt)])
                        for idx, prompt in enumerate(PROMPTS)
                    )
                )
                results = await asyncio.gather(*map(read, streams), return_exceptions=True)
                for failed in results[:2]:
                    assert isinstance(failed, EngineUnavailableError)
                    assert "could not compute it: RuntimeError: injected fault" in str(failed)
                assert [result[0] for result in results[2:]] == reference()[2:]
                assert engine.state == "running"
                await assert_nothing_is_left(engine)

        run(work())

    def test_a_step_that_always_raises_ends_the_engine_and_fails_every_waiter(self) -> None:
        async def work() -> None:
            async with running(max_num_seqs=2) as engine:
                await self.inject(engine, lambda seqs: True)

                async def use(idx: int) -> list[str]:
                    return await read(await engine.submit(str(idx), [request()]))

                results = await asyncio.gather(*map(use, range(20)), return_exceptions=True)
                assert all(isinstance(result, EngineUnavailableError) for result in results)
                await until(lambda: engine.state == "dead")
                assert engine.failure == "RuntimeError: injected fault"
                assert (engine.num_live, engine.num_queued) == (0, 0)
                assert engine.loop_age_s is None
                for refused in (engine.submit("0", [request()]), engine.call(lambda engine: 0)):
                    with pytest.raises(EngineUnavailableError, match="injected fault") as caught:
                        await refused
                    assert caught.value.state == "dead"
                assert not await engine.drain(1.0) or engine.num_live == 0

        run(work())

    def test_requests_that_make_every_step_raise_do_not_end_the_engine(self) -> None:
        async def work() -> None:
            async with running() as engine:
                await self.inject(engine, is_poisoned)
                for idx in range(3 * MAX_FAILED_ROUNDS):
                    with pytest.raises(EngineUnavailableError, match="could not compute it"):
                        await read(await engine.submit(str(idx), [request([POISON, 1, 2])]))
                assert engine.state == "running"
                assert await read(await engine.submit("0", [request()])) == reference()[:1]
                await assert_nothing_is_left(engine)

        run(work())

    def test_what_is_no_exception_ends_the_engine_at_once(self) -> None:
        def exit_thread(seqs: list[Any]) -> bool:
            raise SystemExit("out of here")

        async def work() -> None:
            async with running() as engine:
                await self.inject(engine, exit_thread)
                with pytest.raises(EngineUnavailableError, match="out of here"):
                    await read(await engine.submit("0", [request()]))
                assert engine.state == "dead"

        run(work())


class TestSleep:
    def test_streams_go_on_after_it(self) -> None:
        async def work() -> None:
            async with running() as engine:
                stream = await engine.submit("0", [request(prompt, 60) for prompt in PROMPTS])
                reader = asyncio.create_task(read(stream))
                for _ in range(3):
                    await asyncio.sleep(0.02)
                    await engine.call(LLMEngine.sleep)
                    snapshot = engine.snapshot
                    assert snapshot is not None
                    assert snapshot.is_asleep
                    assert snapshot.kv.created_pages == 0
                    with pytest.raises(EngineUnavailableError, match="sleeps until it is woken"):
                        await engine.submit("1", [request()])
                    assert await engine.call(LLMEngine.wake)
                assert await reader == reference(60)
                await assert_nothing_is_left(engine)

        run(work())

    def test_once_awake_it_takes_requests(self) -> None:
        async def work() -> None:
            async with running() as engine:
                for idx in range(50):
                    await engine.call(LLMEngine.sleep)
                    assert await engine.call(LLMEngine.wake)
                    stream = await engine.submit(str(idx), [request("def ", 1)])
                    stream.abort()
                await assert_nothing_is_left(engine)

        run(work())

    def test_a_stream_may_end_while_it_sleeps(self) -> None:
        async def work() -> None:
            async with running() as engine:
                aborted = await engine.submit("0", [LONG])
                late = await engine.submit("1", [LONG], timeout_s=0.3)
                await first_output(aborted)
                await engine.call(LLMEngine.sleep)
                aborted.abort()
                with pytest.raises(RequestTimeoutError):
                    await read(late)
                assert engine.num_live == 0
                assert await engine.call(LLMEngine.wake)
                await assert_nothing_is_left(engine)

        run(work())


def test_calls_of_many_coroutines_run_one_by_one_while_a_stream_runs() -> None:
    async def work() -> None:
        async with running() as engine:
            seen: list[int] = []

            def note(idx: int) -> int:
                if idx % 7 == 0:
                    raise ConfigError(f"no {idx}")
                seen.append(idx)
                return idx

            stream = await engine.submit("0", [request(prompt) for prompt in PROMPTS])
            reader = asyncio.create_task(read(stream))
            calls = [engine.call(lambda engine, idx=idx: note(idx)) for idx in range(200)]
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert seen == [idx for idx in range(200) if idx % 7]
            for idx, result in enumerate(results):
                assert str(result) == (f"no {idx}" if idx % 7 == 0 else str(idx))
            assert await reader == reference()

    run(work())


def test_free_pages_go_back_to_the_system_although_somebody_looks_all_the_time() -> None:
    async def work() -> None:
        front = {"release_idle_after_s": 0.2}
        async with running(front=front, enable_prefix_caching=False) as engine:
            assert await read(await engine.submit("0", [request()])) == reference()[:1]
            assert await engine.call(lambda engine: engine.kv_stats().created_pages) > 0

            async def is_released() -> bool:
                return await engine.call(lambda engine: engine.kv_stats().created_pages) == 0

            await until(is_released)
            assert await read(await engine.submit("0", [request()])) == reference()[:1]

    run(work())


def test_ages_are_told() -> None:
    async def work() -> None:
        async with running() as engine:
            assert engine.last_step_age_s is None
            await until(lambda: engine.loop_age_s is None)
            call = asyncio.create_task(engine.call(lambda engine: time.sleep(0.2)))
            await until(lambda: engine.loop_age_s is not None and engine.loop_age_s > 0.1)
            await call
            await read(await engine.submit("0", [request()]))
            await until(lambda: engine.loop_age_s is None)
            assert engine.last_step_age_s is not None
            assert engine.config is not None
            assert engine.config.max_model_len == 2048

    run(work())


def test_a_task_may_be_cancelled_at_every_await() -> None:
    async def work() -> None:
        async with running(max_num_seqs=2) as engine:
            for num_turns in range(80):

                async def use(idx: int = num_turns) -> list[str]:
                    return await read(await engine.submit(str(idx), [request("def ", 20)] * 3))

                task = asyncio.create_task(use())
                for _ in range(num_turns):
                    await asyncio.sleep(0)
                if num_turns >= 20:  # while the engine is about to admit it, or computes
                    await asyncio.sleep((num_turns - 20) * 0.0005)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                assert (engine.num_live, engine.num_queued) == (0, 0)
            await assert_nothing_is_left(engine)

    run(work())


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *("submit", "submit long", "submit bad", "cancel", "abort", "leave"),
                *("sleep", "wake", "fault", "turn", "wait"),
            ]
        ),
        st.integers(0, 5),
    ),
    max_size=25,
)


@given(actions=ACTIONS)
@settings(max_examples=40)
def test_whatever_is_done_in_whatever_order_nothing_is_left(
    actions: list[tuple[str, int]],
) -> None:
    async def work() -> None:
        front = {"max_queued_requests": 6, "queue_timeout_s": 0.5}
        async with running(max_num_seqs=2, front=front) as engine:
            tasks: list[asyncio.Task[Any]] = []
            streams: list[RequestStream] = []

            async def use(name: str, requests: list[EngineRequest]) -> None:
                stream = await engine.submit(name, requests, timeout_s=2.0)
                streams.append(stream)
                await read(stream)

            def start(requests: list[EngineRequest]) -> None:
                tasks.append(asyncio.create_task(use(str(len(tasks) % 4), requests)))

            def run_action(action: str, idx: int) -> Awaitable[Any] | None:
                if action == "submit":
                    start([request(PROMPTS[idx % 4], 2 * idx + 1)] * (idx % 3 + 1))
                elif action == "submit long":
                    start([LONG])
                elif action == "submit bad":
                    start([request(), request([10**6])])
                elif action == "cancel" and idx < len(tasks):
                    tasks[-1 - idx].cancel()
                elif action == "abort":
                    engine.abort(str(idx))
                elif action == "leave" and idx < len(streams):
                    streams[-1 - idx].abort()
                elif action == "sleep":
                    return engine.call(lambda engine: engine.is_asleep or engine.sleep())
                elif action == "wake":
                    return engine.call(LLMEngine.wake)
                elif action == "fault":
                    steps = iter(range(10**6))
                    return TestFaults.inject(engine, lambda seqs: next(steps) < idx)
                elif action == "turn":
                    return asyncio.sleep(0)
                elif action == "wait":
                    return asyncio.sleep(0.004 * idx)
                return None

            for action, idx in actions:
                waits = run_action(action, idx)
                if waits is not None:
                    await waits
                assert 0 <= engine.num_queued <= 6
                assert engine.num_queued <= engine.num_live
            assert await engine.call(LLMEngine.wake)
            for name in map(str, range(4)):
                engine.abort(name)
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert result is None or isinstance(
                    result,
                    ConfigError
                    | QueueFullError
                    | EngineUnavailableError
                    | RequestTimeoutError
                    | RequestAbortedError
                    | asyncio.CancelledError,
                )
            await TestFaults.inject(engine, lambda seqs: False)
            assert engine.state == "running"
            await assert_nothing_is_left(engine)

    run(work())
