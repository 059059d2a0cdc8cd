"""The engine for asyncio: one thread computes, coroutines submit and listen.

Owns: the engine thread and the streams of live requests.
Thread-safety: none; one event loop. The engine itself is touched by its thread only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ..errors import ConfigError, VmallocError
from .config import EngineConfig
from .engine_thread import EngineSnapshot, EngineThread, Report
from .errors import EngineUnavailableError, QueueFullError, RankLostError, RequestAbortedError
from .llm_engine import LLMEngine
from .request_reader import Prompt
from .request_stream import RequestStream
from .sampling_params import SamplingParams
from .startup import StartupPhase, StartupPhases

logger = logging.getLogger(__name__)

T = TypeVar("T")
EngineState = Literal["starting", "running", "draining", "stopped", "dead"]

DRAIN_POLL_SECONDS = 0.05

LOAD_END_SECONDS = 1.0
"""Longest wait for the end of a load that nobody wants any more; it cannot be interrupted."""

RETRY_SECONDS = 1.0
"""When a client that was turned away may try again; a step or two later things look different."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One prompt and how to go on from it; see ``LLMEngine.add_request``."""

    prompt: Prompt
    params: SamplingParams
    priority: int = 0


class AsyncLLMEngine:
    """An ``LLMEngine`` on a thread of its own.

    Args:
        make_engine: loads the engine, on that thread, timing its phases.
        max_queued_requests: prompts that may wait for their first step; None: any number.
        queue_timeout_s: most seconds that a request waits for its first step.
        release_idle_after_s: seconds without work after which free KV pages go back to the system.
        phases: what times the start.
    """

    def __init__(
        self,
        make_engine: Callable[[StartupPhases], LLMEngine],
        *,
        max_queued_requests: int | None = 512,
        queue_timeout_s: float | None = None,
        release_idle_after_s: float | None = None,
        phases: StartupPhases | None = None,
    ) -> None:
        self._phases = phases or StartupPhases()
        self._max_queued_requests = max_queued_requests
        self._queue_timeout_s = queue_timeout_s
        self._thread = EngineThread(
            lambda: make_engine(self._phases),
            on_started=self._started_on_thread,
            on_report=lambda report: self._tell_loop(self._deliver, report),
            on_ended=lambda error: self._tell_loop(self._end, error),
            release_idle_after_s=release_idle_after_s,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started: asyncio.Future[None] | None = None
        # By the engine's names, and by the caller's: what has not ended.
        self._prompts: dict[str, tuple[RequestStream, int]] = {}
        self._streams: dict[str, RequestStream] = {}
        self._num_streams = 0
        self._calls: set[asyncio.Future[Any]] = set()
        self._num_unstarted = 0
        self._state: EngineState = "starting"
        self._failure: str | None = None
        self._is_rank_lost = False
        self._config: EngineConfig | None = None

    @property
    def state(self) -> EngineState:
        """What it is doing; requests are taken while it is ``"running"``."""
        return self._state

    @property
    def failure(self) -> str | None:
        """Why it is dead."""
        return self._failure

    @property
    def is_rank_lost(self) -> bool:
        """Whether it is dead for the loss of a rank: no process is left that could go on."""
        return self._is_rank_lost

    @property
    def config(self) -> EngineConfig | None:
        """The engine's settings with every default filled in; None before it started."""
        return self._config

    @property
    def snapshot(self) -> EngineSnapshot | None:
        """The engine's latest figures, at most a step old; None before it started."""
        return self._thread.snapshot

    @property
    def startup(self) -> list[StartupPhase]:
        """The finished phases of its start."""
        return list(self._phases.finished)

    @property
    def startup_phase(self) -> str | None:
        """What it is starting with now."""
        return self._phases.current

    @property
    def max_queued_requests(self) -> int | None:
        """Prompts that may wait for their first step."""
        return self._max_queued_requests

    @property
    def num_queued(self) -> int:
        """Prompts that were accepted and that no step has taken up yet."""
        return self._num_unstarted

    @property
    def num_live(self) -> int:
        """Prompts that were accepted and have not ended."""
        return len(self._prompts)

    @property
    def last_step_age_s(self) -> float | None:
        """Seconds since the last step ended; None before the first."""
        snapshot = self.snapshot
        if snapshot is None or snapshot.last_step_time is None:
            return None
        return time.monotonic() - snapshot.last_step_time

    @property
    def loop_age_s(self) -> float | None:
        """Seconds that the engine thread has been at one step or command; None while it waits."""
        since = self._thread.busy_since
        return None if since is None else time.monotonic() - since

    def start(self) -> None:
        """Start the thread, which loads the engine. Call it on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.create_future()
        self._thread.start()

    async def wait_started(self) -> None:
        """Wait until it takes requests. Raises what loading raised."""
        assert self._started is not None, "start() it first"
        await asyncio.shield(self._started)

    async def submit(
        self,
        request_id: str,
        requests: Sequence[EngineRequest],
        *,
        timeout_s: float | None = None,
    ) -> RequestStream:
        """Queue prompts, all of them or none; their outputs come through the stream.

        ``timeout_s``: most seconds until all have ended.

        Raises:
            ConfigError: one of them cannot be honoured, or there are more than the queue holds.
            QueueFullError: too many wait already.
            EngineUnavailableError: the engine takes no requests now.
        """
        self._check_takes_requests()
        self._check_room(len(requests))
        if request_id in self._streams:
            raise ConfigError(f"request_id is {request_id!r}; a live request has that name")
        stream = self._make_stream(request_id, len(requests))
        stream.limit_time("request", timeout_s)
        stream.limit_time("queue", self._queue_timeout_s)
        try:
            await self.call(lambda engine: self._add(engine, stream, requests))
        except BaseException:
            stream.abort()
            raise
        return stream

    def abort(self, request_id: str) -> bool:
        """End a request by the name it was submitted with; False if there is none."""
        stream = self._streams.get(request_id)
        if stream is None:
            return False
        stream.fail(RequestAbortedError(f"request {request_id} was aborted"))
        return True

    async def call(self, function: Callable[[LLMEngine], T]) -> T:
        """Run a function on the engine thread, between two steps; what it returns or raises."""
        self._check_alive()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if future.done():  # nobody waits any more
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def run(engine: LLMEngine) -> None:
            try:
                result, failure = function(engine), None
            except Exception as error:
                result, failure = None, error
            # Whoever waits for a wake sees an engine that is awake.
            self._thread.take_snapshot(engine)
            self._tell_loop(settle, result, failure)

        self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        self._thread.post(run)
        return await future

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Take no more requests and wait for those that there are; whether all ended in time.

        An engine that sleeps is woken for them, as soon as there is memory.
        """
        if self._state in ("starting", "running"):
            self._state = "draining"
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._prompts and self._state == "draining":
            if deadline is not None and time.monotonic() >= deadline:
                return False
            if self.snapshot is not None and self.snapshot.is_asleep:
                with contextlib.suppress(EngineUnavailableError):  # it ended meanwhile
                    await self.call(LLMEngine.wake)
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        return not self._prompts

    def end(self, timeout_s: float) -> bool:
        """Without an event loop: have the thread end, and wait for it; whether it did."""
        self._thread.stop()
        return self._thread.join(timeout_s)

    async def close(self, timeout_s: float = 60.0) -> None:
        """End what runs and give everything back; a load is not waited for. Idempotent."""
        if self._config is None:
            timeout_s = min(timeout_s, LOAD_END_SECONDS)
        if self._state != "dead":
            self._state = "stopped"
        self._thread.stop()
        ended = await asyncio.to_thread(self._thread.join, timeout_s)
        if not ended:
            logger.error("the engine thread did not end within %g seconds", timeout_s)
        self._fail_all(EngineUnavailableError("stopped", "the server stopped"))

    def _add(
        self, engine: LLMEngine, stream: RequestStream, requests: Sequence[EngineRequest]
    ) -> None:
        """On the thread: queue all prompts, or none."""
        added: list[str] = []
        try:
            for name, request in zip(stream.names, requests, strict=True):
                _check_fits(engine, request)
                engine.add_request(name, request.prompt, request.params, request.priority)
                added.append(name)
        except BaseException:
            engine.abort_request(added)
            raise
        self._thread.note_live(added)

    def _make_stream(self, request_id: str, num_prompts: int) -> RequestStream:
        # A name is never used twice: what is still on its way from an aborted request would be
        # taken for its successor's.
        self._num_streams += 1
        names = [f"{request_id}-{self._num_streams}-{idx}" for idx in range(num_prompts)]
        stream = RequestStream(request_id, names, self._abort_stream)
        if names:
            self._streams[request_id] = stream
        self._prompts.update({name: (stream, idx) for idx, name in enumerate(names)})
        self._num_unstarted += num_prompts
        return stream

    def _abort_stream(self, stream: RequestStream) -> None:
        """Forget a stream, and have the engine end what is left of it."""
        del self._streams[stream.request_id]
        names = [name for name in stream.names if self._prompts.pop(name, None) is not None]
        self._num_unstarted -= stream.num_unstarted
        stream.num_unstarted = 0

        def abort(engine: LLMEngine) -> None:
            engine.abort_request(names)
            self._thread.note_gone(names)

        if names and self._thread.is_alive:
            self._thread.post(abort)

    def _deliver(self, report: Report) -> None:
        """Hand what a step changed to the streams."""
        for name in report.started:
            self._note_started(name)
        for output in report.outputs:
            entry = self._prompts.get(output.request_id)
            if entry is None:
                continue
            stream, prompt_idx = entry
            if output.is_finished:
                del self._prompts[output.request_id]
            stream.put(prompt_idx, output)
            if stream.is_ended:
                del self._streams[stream.request_id]
        for name, reason in report.failed:
            entry = self._prompts.get(name)
            if entry is not None:
                entry[0].fail(EngineUnavailableError("running", reason))

    def _note_started(self, name: str) -> None:
        entry = self._prompts.get(name)
        if entry is not None:
            self._num_unstarted -= 1
            entry[0].note_started()

    def _started_on_thread(self, engine: LLMEngine) -> None:
        config = engine.config

        def started() -> None:
            self._config = config
            if self._state == "starting":
                self._state = "running"
            assert self._started is not None
            if not self._started.done():
                self._started.set_result(None)

        self._tell_loop(started)

    def _end(self, error: BaseException | None) -> None:
        """The thread ended; unless it was told to, nothing goes on."""
        if error is None:
            self._state = "stopped"
            reason = EngineUnavailableError("stopped", "the engine was stopped")
        else:
            self._state = "dead"
            self._failure = f"{type(error).__name__}: {error}"
            self._is_rank_lost = isinstance(error, RankLostError)
            # What a load refuses is told by whoever started it.
            is_refused = self._config is None and isinstance(error, VmallocError)
            level = logging.DEBUG if is_refused else logging.CRITICAL
            # Where a rank was lost says nothing: how it ended does, and the failure tells that.
            trace = None if self._is_rank_lost else error
            logger.log(level, "the engine is dead: %s", self._failure, exc_info=trace)
            reason = EngineUnavailableError("dead", f"the engine is dead: {self._failure}")
        assert self._started is not None
        if not self._started.done():
            self._started.set_exception(error or reason)
            self._started.exception()  # asyncio need not complain if nobody waits for it
        self._fail_all(reason)

    def _fail_all(self, error: Exception) -> None:
        for stream in list(self._streams.values()):
            stream.fail(error)
        for future in list(self._calls):
            if not future.done():
                future.set_exception(error)

    def _tell_loop(self, function: Callable[..., None], *args: object) -> None:
        """Have the event loop call a function; nothing once the loop is closed."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    def _check_alive(self) -> None:
        if self._state == "dead":
            raise EngineUnavailableError("dead", f"the engine is dead: {self._failure}")
        if self._state == "stopped":
            raise EngineUnavailableError("stopped", "the engine was stopped")

    def _check_takes_requests(self) -> None:
        self._check_alive()
        if self._state == "starting":
            raise EngineUnavailableError("starting", "the engine is starting", RETRY_SECONDS)
        if self._state == "draining":
            raise EngineUnavailableError("draining", "the server is shutting down", RETRY_SECONDS)
        if self.snapshot is not None and self.snapshot.is_asleep:
            raise EngineUnavailableError("sleeping", "the engine sleeps until it is woken")

    def _check_room(self, num_requests: int) -> None:
        limit = self._max_queued_requests
        if limit is None:
            return
        if num_requests > limit:
            raise ConfigError(f"prompt has {num_requests} entries; max_queued_requests is {limit}")
        if self._num_unstarted + num_requests > limit:
            raise QueueFullError(self._num_unstarted, limit, RETRY_SECONDS)


def _check_fits(engine: LLMEngine, request: EngineRequest) -> None:
    """Raise ``ConfigError`` for a prompt that the whole KV cache could not hold."""
    prompt = request.prompt
    token_ids: object = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else prompt
    if not isinstance(token_ids, list | tuple):
        return  # the engine counts a text's tokens, and refuses what is no prompt
    most = engine.backend.max_seq_tokens()
    if len(token_ids) > most:
        raise ConfigError(
            f"prompt has {len(token_ids)} tokens; the KV cache's cap of "
            f"{engine.kv_stats().capacity_bytes} bytes holds {most} tokens of one sequence"
        )
