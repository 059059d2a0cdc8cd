"""One computation for all who watch, none for nobody, and an idle engine is left alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from vmalloc.engine import (
    AsyncLLMEngine,
    EngineConfig,
    EngineRequest,
    EngineUnavailableError,
    LLMEngine,
    RequestOutputKind,
    SamplingParams,
    StartupPhases,
    load_engine,
)
from vmalloc.server import page_map_feed
from vmalloc.server.page_map_feed import PageMapFeed
from vmalloc.server.protocol.page_map import PageMapFrame, PageMapState

HANG_SECONDS = 60.0
PROMPT = "def quicksort(items):\n"


@asynccontextmanager
async def running_engine(**settings: Any) -> AsyncIterator[AsyncLLMEngine]:
    # Without the fused forward pass, so that a request lasts while its pages are looked at.
    small: dict[str, Any] = {"kv_cache_memory_bytes": 32 << 20, "max_num_seqs": 8, "fused": "off"}
    config = EngineConfig(**{**small, **settings})

    def load(phases: StartupPhases) -> LLMEngine:
        return load_engine("demo", None, config, phases=phases)

    engine = AsyncLLMEngine(load)
    engine.start()
    await engine.wait_started()
    try:
        yield engine
    finally:
        await engine.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(test(), HANG_SECONDS)

    asyncio.run(limited())


async def generate(engine: AsyncLLMEngine, name: str, max_tokens: int, n: int = 1) -> None:
    params = SamplingParams(
        n=n,
        max_tokens=max_tokens,
        ignore_eos=True,
        seed=1,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    async with await engine.submit(name, [EngineRequest(PROMPT, params)]) as stream:
        async for _ in stream:
            pass


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("backend", ["virtual", "paged"])
def test_frames_show_a_request_come_and_go(backend: str) -> None:
    async def test() -> None:
        async with running_engine(kv_backend=backend) as engine:
            feed = PageMapFeed(engine, "name")
            async with feed.watch() as frames:
                first = await anext(frames)
                assert isinstance(first, PageMapFrame)
                assert (first.model, first.state, first.map.backend) == ("name", "running", backend)
                assert first.map.slots == []
                work = asyncio.create_task(generate(engine, "mine", 1500, n=2))
                seen = []
                async for frame in frames:
                    assert isinstance(frame, PageMapFrame)
                    seen.append(frame)
                    if work.done() and frame.totals.running_seqs == 0:
                        break
                busy = [frame for frame in seen if frame.totals.running_seqs]
                assert busy
                names = {slot.request_id for frame in busy for slot in frame.map.slots}
                assert any(name.startswith("mine-") for name in names)
                assert max(frame.totals.tokens_per_s for frame in seen) > 0
                assert seen[-1].totals.generated_tokens == 3000
                assert [slot for slot in seen[-1].map.slots if slot.seq_id is not None] == []
                await work

    run(test)


def test_one_who_does_not_read_keeps_nobody_from_the_end() -> None:
    async def test() -> None:
        async with running_engine() as engine:
            feed = PageMapFeed(engine, "name")
            before = asyncio.all_tasks()
            async with feed.watch() as stuck, feed.watch() as other, feed.watch() as third:
                assert isinstance(await anext(other), PageMapFrame)
                await engine.close()
                for frames in (other, third):
                    last = [frame async for frame in frames][-1]
                    assert isinstance(last, PageMapState)
                    assert last.state == "stopped"
                await until(lambda: not asyncio.all_tasks() - before)
                assert [frame.state async for frame in stuck] == ["stopped"]

    run(test)


def test_watchers_share_one_computation_and_it_ends_with_the_last() -> None:
    async def test() -> None:
        async with running_engine() as engine:
            feed = PageMapFeed(engine, "name")
            before = asyncio.all_tasks()
            async with feed.watch() as one, feed.watch() as other:
                assert feed.num_watchers == 2
                assert len(asyncio.all_tasks() - before) == 1
                mine, theirs = await anext(one), await anext(other)
                assert mine is theirs
                async with feed.watch() as late:
                    assert await anext(late) is mine
                assert feed.num_looks == 1
            assert feed.num_watchers == 0
            await until(lambda: not asyncio.all_tasks() - before)
            num_looks = feed.num_looks
            await generate(engine, "unseen", 200)
            assert feed.num_looks == num_looks
            async with feed.watch() as again:  # and it starts anew
                # The first may be one that was made just before: it is younger than a period.
                while (frame := await anext(again)).totals.generated_tokens != 200:
                    assert isinstance(frame, PageMapFrame)

    run(test)


def test_somebody_who_comes_as_the_last_one_leaves_gets_frames() -> None:
    async def test() -> None:
        async with running_engine() as engine:
            feed = PageMapFeed(engine, "name")
            for _ in range(20):
                async with feed.watch() as frames:
                    assert isinstance(await anext(frames), PageMapFrame)

    run(test)


def test_an_idle_engine_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_map_feed, "PERIOD_SECONDS", 0.01)
    monkeypatch.setattr(page_map_feed, "REPEAT_SECONDS", 0.05)

    async def test() -> None:
        async with running_engine() as engine:
            await generate(engine, "first", 30)
            feed = PageMapFeed(engine, "name")
            async with feed.watch() as frames:
                for _ in range(8):  # repeated, as signs of life
                    await anext(frames)
                # The first look may have been at an engine about to become idle.
                assert feed.num_looks <= 2
                await generate(engine, "second", 30)
                async for frame in frames:
                    assert isinstance(frame, PageMapFrame)
                    if frame.totals.generated_tokens == 60:
                        break
                assert feed.num_looks > 1

    run(test)


def test_frames_keep_their_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    sleeps: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        sleeps.append(seconds)
        await sleep(0)

    async def test() -> None:
        async with running_engine() as engine:
            feed = PageMapFeed(engine, "name")
            async with feed.watch() as frames:
                await anext(frames)
                await sleep(0)
            first = await feed.frame()
            assert await feed.frame() is first  # not older than a period

    monkeypatch.setattr(page_map_feed.asyncio, "sleep", note)
    run(test)
    assert 0 < sleeps[0] <= page_map_feed.PERIOD_SECONDS == 0.25


def test_a_long_step_does_not_silence_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_map_feed, "REPEAT_SECONDS", 0.05)

    async def test() -> None:
        async with running_engine() as engine:
            feed = PageMapFeed(engine, "name")
            is_over = threading.Event()
            step = asyncio.create_task(engine.call(lambda _: is_over.wait(HANG_SECONDS)))
            await asyncio.sleep(0)  # it is asked for before the page map is
            async with feed.watch() as frames:
                for _ in range(3):
                    state = await anext(frames)
                    assert isinstance(state, PageMapState)
                    assert state.state == "running"
                is_over.set()
                assert await step
                async for frame in frames:
                    if isinstance(frame, PageMapFrame):
                        break

    run(test)


def test_what_is_no_frame_is_a_state() -> None:
    async def test() -> None:
        engine = AsyncLLMEngine(
            lambda phases: load_engine(
                "demo", None, EngineConfig(kv_cache_memory_bytes=8 << 20), phases=phases
            )
        )
        feed = PageMapFeed(engine, "name")
        with pytest.raises(EngineUnavailableError, match="starting"):
            await feed.frame()
        async with feed.watch() as frames:
            state = await anext(frames)
            assert isinstance(state, PageMapState)
            assert state.state == "starting"
            engine.start()
            await engine.wait_started()
            seen = [state]
            while not isinstance(seen[-1], PageMapFrame):
                seen.append(await anext(frames))
            await engine.drain()
            left = [frame async for frame in frames]  # it ends by itself
            assert isinstance(left[-1], PageMapState)
            assert left[-1].state == "draining"
        await engine.close()
        with pytest.raises(EngineUnavailableError, match="stopped"):
            await feed.frame()

    run(test)


@pytest.mark.parametrize("backend", ["virtual", "paged"])
def test_a_sleeping_engine_lives_and_says_that_it_sleeps(backend: str) -> None:
    async def test() -> None:
        async with running_engine(kv_backend=backend) as engine:
            feed = PageMapFeed(engine, "name")
            await generate(engine, "first", 10)
            await engine.call(LLMEngine.sleep)
            async with feed.watch() as frames:
                async for frame in frames:
                    assert isinstance(frame, PageMapFrame)
                    if frame.map.is_asleep:
                        break
                assert await engine.call(LLMEngine.wake)
                async for frame in frames:
                    assert isinstance(frame, PageMapFrame)
                    if not frame.map.is_asleep:
                        break
            await generate(engine, "second", 10)

    run(test)
