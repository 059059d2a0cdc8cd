"""One page map for all who watch: computed while somebody does, and when something changed.

Owns: the newest frame, and the task that makes the next one.
Thread-safety: none; one event loop. What touches the engine runs on its thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace

from ..engine import (
    AsyncLLMEngine,
    EngineSnapshot,
    EngineUnavailableError,
    KVCacheStats,
    LLMEngine,
    PageMap,
    PrefixCacheStats,
    RankReport,
    SchedulerStats,
    VmallocError,
    page_map_of_all,
    stats_of_all,
)
from .page_map_bodies import page_map_body, rank_entry
from .protocol.page_map import PageMapFrame, PageMapState, PageMapTotals

PERIOD_SECONDS = 0.25
"""Least time from one frame to the next."""

REPEAT_SECONDS = 5.0
"""A frame is sent again after so long without a new one, as a sign of life."""

RATE_SECONDS = 2.0
"""Rates are those of this much time."""


RANK_REPORT_SECONDS = 2.0
"""Longest wait for the ranks' figures; those of the last time then have to do."""


@dataclass(frozen=True, slots=True)
class _Look:
    """What one look at the engine, between two steps, found; with ranks ``ranks`` has each."""

    page_map: PageMap
    kv: KVCacheStats
    scheduler: SchedulerStats
    prefix: PrefixCacheStats
    generated_tokens: int
    ranks: tuple[RankReport, ...]

    @classmethod
    def at(cls, engine: LLMEngine) -> _Look:
        return cls(
            page_map_of_all(engine.page_map(), engine.num_ranks),
            stats_of_all(engine.kv_stats(), engine.num_ranks),
            engine.stats(),
            engine.prefix_stats(),
            engine.token_stats().generation_tokens,
            tuple(engine.rank_reports()),
        )

    @property
    def mapped_pages(self) -> int:
        return self.kv.critical_pages + self.kv.background_pages


_Inbox = asyncio.Queue[PageMapFrame | PageMapState | None]
"""The newest frame that one watcher has not seen, and after it None if there will be no more."""


class PageMapFeed:
    """Frames of the page map.

    An engine that does nothing is left alone: it would never be idle for long enough to give free
    pages back if it were asked all the time.

    Args:
        engine: its engine, started or not.
        model: the name that frames report.

    Attributes:
        num_looks: times the engine was asked so far.
    """

    def __init__(self, engine: AsyncLLMEngine, model: str) -> None:
        self._engine = engine
        self._model = model
        self.num_looks = 0
        self._inboxes: list[_Inbox] = []
        self._task: asyncio.Task[None] | None = None
        self._newest: PageMapFrame | PageMapState | None = None
        self._published = 0.0
        self._lock = asyncio.Lock()
        self._look: _Look | None = None
        self._seen: EngineSnapshot | None = None
        self._frame: PageMapFrame | None = None
        self._frame_time = 0.0
        self._samples: deque[tuple[float, int, int]] = deque()

    @property
    def num_watchers(self) -> int:
        """How many watch; frames are made while somebody does."""
        return len(self._inboxes)

    async def frame(self) -> PageMapFrame:
        """The page map now, at most ``PERIOD_SECONDS`` old.

        Raises ``EngineUnavailableError`` while the engine does not run.
        """
        async with self._lock:
            now = time.monotonic()
            if self._frame is None or now - self._frame_time >= PERIOD_SECONDS:
                look = await self._look_again()
                self._frame = self._make_frame(look)
                self._frame_time = now
            return self._frame

    async def rank_reports(self) -> tuple[RankReport, ...]:
        """How every rank's memory is; empty for an engine of one process.

        What was seen last, where the engine is in the middle of something or does not run.
        """
        snapshot = self._engine.snapshot
        if snapshot is None or snapshot.num_ranks == 1:
            return ()
        with suppress(VmallocError, asyncio.TimeoutError):
            await asyncio.wait_for(self._look_in_turn(), RANK_REPORT_SECONDS)
        return () if self._look is None else self._look.ranks

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[AsyncIterator[PageMapFrame | PageMapState]]:
        """Frames as they are made; who is slow misses some. They end with the engine."""
        inbox: _Inbox = asyncio.Queue()
        self._inboxes.append(inbox)
        if self._task is None:
            self._newest = None
            self._task = asyncio.create_task(self._run())
        elif self._newest is not None:
            inbox.put_nowait(self._newest)
        try:
            yield _read(inbox)
        finally:
            self._inboxes.remove(inbox)
            if not self._inboxes and self._task is not None:
                self._task.cancel()
                self._task = None

    async def _run(self) -> None:
        try:
            while self._engine.state in ("starting", "running"):
                began = time.monotonic()
                self._publish(await self._next_in_time())
                await asyncio.sleep(max(0.0, began + PERIOD_SECONDS - time.monotonic()))
            self._publish(self._state())
        finally:
            if self._task is asyncio.current_task():  # else others watch another one
                self._task = None
                for inbox in self._inboxes:
                    inbox.put_nowait(None)  # a watcher who does not read is not waited for

    async def _next_in_time(self) -> PageMapFrame | PageMapState:
        """The next one; while the engine is long at one step, the last one is sent again."""
        task = asyncio.ensure_future(self._next())
        try:
            while not (await asyncio.wait({task}, timeout=REPEAT_SECONDS))[0]:
                self._send(self._newest or self._state())
            return task.result()
        finally:
            task.cancel()

    async def _next(self) -> PageMapFrame | PageMapState:
        try:
            return await self.frame()
        except VmallocError:
            return self._state()

    def _state(self) -> PageMapState:
        engine = self._engine
        detail = engine.failure or engine.startup_phase or ""
        return PageMapState(state=engine.state, detail=detail)

    def _publish(self, frame: PageMapFrame | PageMapState) -> None:
        if self._is_news(frame):
            self._send(frame)

    def _send(self, frame: PageMapFrame | PageMapState) -> None:
        self._newest = frame
        self._published = time.monotonic()
        for inbox in self._inboxes:
            while not inbox.empty():
                inbox.get_nowait()
            inbox.put_nowait(frame)

    def _is_news(self, frame: PageMapFrame | PageMapState) -> bool:
        last = self._newest
        if last is None or type(last) is not type(frame):
            return True
        if time.monotonic() - self._published >= REPEAT_SECONDS:
            return True
        if isinstance(frame, PageMapState) or isinstance(last, PageMapState):
            return frame != last
        return frame.model_copy(update={"time": last.time}) != last

    async def _look_in_turn(self) -> None:
        async with self._lock:
            await self._look_again()

    async def _look_again(self) -> _Look:
        """Ask the engine, unless it did nothing since it was asked last."""
        snapshot = self._engine.snapshot
        if snapshot is None or self._engine.state != "running":
            raise EngineUnavailableError(
                self._engine.state, f"there is no page map: the engine is {self._engine.state}", 1.0
            )
        seen = replace(snapshot, time=0.0)
        if self._look is None or seen != self._seen:
            self.num_looks += 1
            self._look = await self._engine.call(_Look.at)
            self._seen = seen
        return self._look

    def _make_frame(self, look: _Look) -> PageMapFrame:
        tokens_per_s, pages_per_s = self._rates(look)
        kv, scheduler, prefix = look.kv, look.scheduler, look.prefix
        return PageMapFrame(
            time=time.time(),
            state=self._engine.state,
            model=self._model,
            map=page_map_body(look.page_map),
            totals=PageMapTotals(
                reserved_bytes=kv.reserved_bytes,
                capacity_bytes=kv.capacity_bytes,
                committed_bytes=kv.committed_bytes,
                live_bytes=kv.live_bytes,
                ahead_bytes=kv.ahead_bytes,
                parked_bytes=kv.parked_bytes,
                cached_bytes=kv.cached_bytes,
                shared_bytes=kv.shared_bytes,
                swapped_bytes=kv.swapped_bytes,
                free_pages=kv.free_pages,
                retired_pages=kv.retired_pages,
                running_seqs=scheduler.num_running_seqs,
                running=scheduler.num_running,
                waiting=scheduler.num_waiting,
                swapped=scheduler.num_swapped,
                preemptions=scheduler.preempt_swap + scheduler.preempt_recompute,
                prefix_hit_tokens=prefix.hit_tokens,
                prefix_queried_tokens=prefix.queried_tokens,
                cow_copies=kv.cow_copies,
                generated_tokens=look.generated_tokens,
                mapped_pages=look.mapped_pages,
                tokens_per_s=tokens_per_s,
                pages_mapped_per_s=pages_per_s,
            ),
            ranks=[rank_entry(report) for report in look.ranks],
        )

    def _rates(self, look: _Look) -> tuple[float, float]:
        """Tokens and mapped pages a second over the last ``RATE_SECONDS``."""
        now = time.monotonic()
        samples = self._samples
        if samples and now - samples[-1][0] > 2 * RATE_SECONDS:
            samples.clear()  # nobody looked for a while
        samples.append((now, look.generated_tokens, look.mapped_pages))
        while len(samples) > 2 and samples[1][0] <= now - RATE_SECONDS:
            samples.popleft()
        began, tokens, pages = samples[0]
        if now <= began:
            return 0.0, 0.0
        seconds = now - began
        return (
            round((look.generated_tokens - tokens) / seconds, 2),
            round((look.mapped_pages - pages) / seconds, 2),
        )


async def _read(inbox: _Inbox) -> AsyncIterator[PageMapFrame | PageMapState]:
    while (frame := await inbox.get()) is not None:
        yield frame
