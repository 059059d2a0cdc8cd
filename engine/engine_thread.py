"""The one thread that loads an engine and steps it.

Owns: the engine, and the requests that it works on.
Thread-safety: ``post`` and the attributes may be used from any thread; the engine belongs to the
thread alone.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..backend import KVCacheStats, PrefixCacheStats
from .errors import RankLostError
from .llm_engine import LLMEngine
from .outputs import RequestOutput
from .sampling_params import SamplingParams
from .schedule import SchedulerStats
from .tensor_parallel.rank_report import stats_of_all
from .token_counts import TokenStats

if TYPE_CHECKING:
    from .tensor_parallel.leader import PlanTimes

logger = logging.getLogger(__name__)

Command = Callable[[LLMEngine], None]

MAX_FAILED_STEPS = 2
"""Steps in a row that may fail before the requests that run are given up."""

MAX_FAILED_ROUNDS = 3
"""Times in a row that requests are given up before it is asked whether the engine works at all."""

MAX_PROBE_STEPS = 32
"""Steps that it gets to compute one token, waiting for pages included."""

RANK_CHECK_SECONDS = 1.0
"""Between two looks at the other ranks while there is nothing to do."""

_PROBE = "probe"

SNAPSHOT_SECONDS = 0.05
"""Least time between snapshots while steps go on."""


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine's figures at one moment.

    Attributes:
        time: seconds of ``time.monotonic()``.
        scheduler, kv, prefix, tokens: its counters.
        num_steps: steps so far.
        last_step_time: when the last one ended, in seconds of ``time.monotonic()``; None: none yet.
        is_asleep: whether its memory was given back for now.
        num_live_requests: requests that have not ended.
        num_queued: of those, ones that no step has taken up yet.
        num_ranks: processes that compute together; bytes of ``kv`` are those of all of them.
        plan_times: what it took to have them do the same; None for one alone.
    """

    time: float
    scheduler: SchedulerStats
    kv: KVCacheStats
    prefix: PrefixCacheStats
    tokens: TokenStats
    num_steps: int
    last_step_time: float | None
    is_asleep: bool
    num_live_requests: int
    num_queued: int
    num_ranks: int = 1
    plan_times: PlanTimes | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What one step changed.

    Attributes:
        started: names of requests that wait no more: they got into a step, or ended without one.
        outputs: what requests have to say.
        failed: names of requests that were given up, and why.
    """

    started: list[str]
    outputs: list[RequestOutput]
    failed: list[tuple[str, str]]


class EngineThread:
    """Steps an engine while there is work, and runs commands between steps.

    A step that raises is tried again; if that fails too, the requests that were running end with
    an error and the others go on. If that happens again and again, all requests end so; then an
    engine that cannot even compute one token alone is dead, and the thread ends with the error. An
    engine that lost a rank is dead at once, also while it has nothing to do.

    Args:
        make_engine: loads the engine, on the thread.
        on_started: called on the thread once it is loaded.
        on_report: called on the thread after each step that has something to report.
        on_ended: called on the thread when it ends, with the exception that ended it, or None.
        release_idle_after_s: seconds without work after which free KV pages go back to the system.

    Attributes:
        snapshot: the latest figures, None before the engine was loaded.
        busy_since: since when the thread has been working without coming back to its queue, in
            seconds of ``time.monotonic()``; None while it waits for work.
        is_stopping: whether it was told to end.
    """

    def __init__(
        self,
        make_engine: Callable[[], LLMEngine],
        *,
        on_started: Callable[[LLMEngine], None],
        on_report: Callable[[Report], None],
        on_ended: Callable[[BaseException | None], None],
        release_idle_after_s: float | None = None,
    ) -> None:
        self._make_engine = make_engine
        self._on_started = on_started
        self._on_report = on_report
        self._on_ended = on_ended
        self._release_idle_after_s = release_idle_after_s
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="vmalloc-engine", daemon=True)
        # Live requests, and those of them that no step has taken up.
        self._live: dict[str, None] = {}
        self._unstarted: dict[str, None] = {}
        self._num_steps = 0
        self._last_step_time: float | None = None
        self._num_failed_steps = 0
        self._num_failed_rounds = 0
        self._release_time: float | None = None
        self.snapshot: EngineSnapshot | None = None
        self.busy_since: float | None = None
        self.is_stopping = False

    def start(self) -> None:
        """Start to load."""
        self._thread.start()

    def post(self, command: Command) -> None:
        """Have a command run on the thread, between two steps. It must not raise."""
        self._commands.put(command)

    def stop(self) -> None:
        """Have the thread drop every request, close the engine and end."""
        self.is_stopping = True
        self._commands.put(lambda engine: None)

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for its end; whether it ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def note_live(self, names: list[str]) -> None:
        """On the thread: these requests were added."""
        self._live.update(dict.fromkeys(names))
        self._unstarted.update(dict.fromkeys(names))

    def note_gone(self, names: list[str]) -> None:
        """On the thread: these requests were aborted."""
        for name in names:
            self._live.pop(name, None)
            self._unstarted.pop(name, None)

    def take_snapshot(self, engine: LLMEngine) -> None:
        """On the thread: bring ``snapshot`` up to date."""
        self.snapshot = EngineSnapshot(
            time=time.monotonic(),
            scheduler=engine.stats(),
            kv=stats_of_all(engine.kv_stats(), engine.num_ranks),
            prefix=engine.prefix_stats(),
            tokens=engine.token_stats(),
            num_steps=self._num_steps,
            last_step_time=self._last_step_time,
            is_asleep=engine.is_asleep,
            num_live_requests=len(self._live),
            num_queued=len(self._unstarted),
            num_ranks=engine.num_ranks,
            plan_times=None if engine.leader is None else replace(engine.leader.times),
        )

    def _run(self) -> None:
        ended_by: BaseException | None = None
        engine: LLMEngine | None = None
        try:
            self.busy_since = time.monotonic()
            engine = self._make_engine()
            self.take_snapshot(engine)
            self._on_started(engine)
            self._loop(engine)
        except BaseException as error:
            ended_by = error
        try:
            if engine is not None:
                engine.close()
        except Exception:
            logger.exception("closing the engine failed")
        self.busy_since = None
        self._on_ended(ended_by)

    def _loop(self, engine: LLMEngine) -> None:
        while not self.is_stopping:
            has_work = engine.has_unfinished_requests() and not engine.is_asleep
            self._run_commands(engine, may_wait=not has_work)
            if self.is_stopping:
                return
            self.busy_since = time.monotonic()
            if engine.has_unfinished_requests() and not engine.is_asleep:
                self._step(engine)

    def _run_commands(self, engine: LLMEngine, *, may_wait: bool) -> None:
        """Run what was posted; ``may_wait``: wait for the first."""
        if may_wait:
            self.take_snapshot(engine)
            command = self._wait_for_command(engine)
            self.busy_since = time.monotonic()
            command(engine)
        while not self.is_stopping:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command(engine)

    def _wait_for_command(self, engine: LLMEngine) -> Command:
        self.busy_since = None
        while True:
            if engine.leader is not None:
                engine.leader.check()
            try:
                command = self._commands.get(timeout=self._patience_s(engine))
            except queue.Empty:
                self._release_if_due(engine)
                continue
            if not self._is_release_pending(engine):  # else whoever looks would put it off
                self._release_later()
            return command

    def _is_release_pending(self, engine: LLMEngine) -> bool:
        return self._release_time is not None and not engine.is_asleep

    def _patience_s(self, engine: LLMEngine) -> float | None:
        """How long to wait for a command before something else is due; None: for ever."""
        due_s = [] if engine.leader is None else [RANK_CHECK_SECONDS]
        if self._release_time is not None and not engine.is_asleep:
            due_s.append(max(0.0, self._release_time - time.monotonic()))
        return min(due_s, default=None)

    def _release_if_due(self, engine: LLMEngine) -> None:
        if self._release_time is None or engine.is_asleep:
            return
        if time.monotonic() >= self._release_time:
            self._release_time = None
            engine.trim_kv_cache()
            self.take_snapshot(engine)

    def _release_later(self) -> None:
        if self._release_idle_after_s is not None:
            self._release_time = time.monotonic() + self._release_idle_after_s

    def _step(self, engine: LLMEngine) -> None:
        try:
            outputs = engine.step()
        except RankLostError:
            raise  # no step can mend it
        except Exception as error:
            self._num_failed_steps += 1
            logger.exception("a step failed")
            if self._num_failed_steps >= MAX_FAILED_STEPS:
                self._give_up_running(engine, error)
            return
        now = time.monotonic()
        self._num_steps += 1
        self._last_step_time = now
        self._num_failed_steps = self._num_failed_rounds = 0
        self._release_later()
        started = [name for name in self._unstarted if engine.is_started(name)]
        for name in started:
            del self._unstarted[name]
        for output in outputs:
            if output.is_finished:
                self.note_gone([output.request_id])
        if self.snapshot is None or now - self.snapshot.time >= SNAPSHOT_SECONDS:
            self.take_snapshot(engine)
        if started or outputs:
            self._on_report(Report(started, outputs, []))

    def _give_up_running(self, engine: LLMEngine, error: Exception) -> None:
        """End the requests that a failing step worked on, so that the others can go on."""
        self._num_failed_rounds += 1
        self._num_failed_steps = 0
        is_last = self._num_failed_rounds > MAX_FAILED_ROUNDS
        running = [] if is_last else [group.request_id for group in engine.scheduler.running]
        names = running or list(self._live)
        engine.abort_request(names)
        self.note_gone(names)
        reason = f"the engine could not compute it: {type(error).__name__}: {error}"
        self._on_report(Report([], [], [(name, reason) for name in names]))
        if is_last:
            self._probe(engine, error)
            self._num_failed_rounds = 0

    def _probe(self, engine: LLMEngine, error: Exception) -> None:
        """Raise ``error`` if the engine, with nothing else to do, cannot compute a token.

        If it can, the requests were at fault, and it serves others.
        """
        params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
        try:
            engine.add_request(_PROBE, [0], params)
            for _ in range(MAX_PROBE_STEPS):
                if any(output.is_finished for output in engine.step()):
                    return
        except Exception:
            logger.exception("the engine cannot compute a single token")
        raise error
