"""What a KV backend does while an engine uses it: time in its calls, memory by state.

Owns: wrappers around the calls of one backend, for as long as that lives.
Thread-safety: none; one engine thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ...backend import KVBackend, KVCacheStats
from ..tensor_parallel.rank_report import stats_of_all

N = TypeVar("N", int, float)

MEMORY_CALLS = (
    *("match_prefix", "try_admit", "try_extend", "truncate", "try_fork", "try_reorder"),
    *("register_tokens", "free", "prefetch", "begin_step", "end_step"),
)
"""Calls in which a backend decides what memory a sequence has."""
SWAP_CALLS = ("try_swap_out", "try_swap_in")
"""Calls that mostly copy."""
VIEW_CALLS = ("batch_view",)
"""Calls that tell kernels where the memory is: slots, or block tables."""

WORKER_NAME = "vmalloc-commit"
"""The commit worker's thread, as the core names it."""


@dataclass(slots=True)
class CallTime:
    """How often something was called, and how long that took."""

    num_calls: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0


class StateBytes(NamedTuple):
    """Bytes of KV memory by what they are counted as.

    Attributes:
        held: all that the driver holds: the sum of committed, ahead, parked, cached, retired, free.
        shared: what sharing saves; not among ``held``.
        others: as in ``KVCacheStats``.
    """

    live: int
    committed: int
    ahead: int
    parked: int
    cached: int
    retired: int
    free: int
    held: int
    shared: int


STATES = StateBytes._fields


@dataclass(frozen=True, slots=True)
class MemorySample:
    """Memory while a step ran.

    Attributes:
        time_s: when the step ended, in seconds of ``time.monotonic()``.
        num_seqs: sequences with memory.
        state: bytes by state.
    """

    time_s: float
    num_seqs: int
    state: StateBytes


@dataclass(slots=True)
class Instruments:
    """Times the calls of ``backend`` and samples its memory at the end of every step.

    A step's memory is looked at before the step is closed: that is when a backend holds most. The
    looking itself is in no call's time.

    Attributes:
        num_ranks: ranks that have the same pages; memory is that of all.
        calls: by name.
        samples: one a step, in order.
    """

    backend: KVBackend
    num_ranks: int = 1
    calls: dict[str, CallTime] = field(default_factory=dict)
    samples: list[MemorySample] = field(default_factory=list)
    _depth: int = 0

    def __post_init__(self) -> None:
        for name in (*MEMORY_CALLS, *SWAP_CALLS, *VIEW_CALLS):
            self.calls[name] = CallTime()
            setattr(self.backend, name, self._timed(name))

    def observe(self) -> None:
        """Look at the memory now."""
        stats = stats_of_all(self.backend.stats(), self.num_ranks)
        self.samples.append(
            MemorySample(time.monotonic(), stats.num_live_seqs, _state_bytes(stats))
        )

    def total(self, names: tuple[str, ...]) -> CallTime:
        """The sum over some calls."""
        calls = [self.calls[name] for name in names]
        return CallTime(
            sum(one.num_calls for one in calls),
            sum(one.seconds for one in calls),
            sum(one.cpu_seconds for one in calls),
        )

    def _timed(self, name: str) -> Callable[..., Any]:
        call, spent, is_end = getattr(self.backend, name), self.calls[name], name == "end_step"

        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._depth:  # a call within a call is in the outer one's time
                return call(*args, **kwargs)
            if is_end:
                self.observe()
            self._depth = 1
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                spent.cpu_seconds += time.thread_time() - cpu
                spent.seconds += time.perf_counter() - wall
                spent.num_calls += 1
                self._depth = 0

        return timed


def _state_bytes(stats: KVCacheStats) -> StateBytes:
    page = stats.page_bytes
    return StateBytes(
        live=stats.live_bytes,
        committed=stats.committed_bytes,
        ahead=stats.ahead_bytes,
        parked=stats.parked_bytes,
        cached=stats.cached_bytes,
        retired=stats.retired_pages * page,
        free=stats.free_pages * page,
        held=stats.created_pages * page,
        shared=stats.shared_bytes,
    )


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Memory over a run.

    Attributes:
        mean, peak: bytes by state; means are over time.
        step_mean: bytes by state, averaged over steps: the same however fast they went.
        mean_seqs: sequences with memory, over time.
    """

    mean: dict[str, float]
    peak: dict[str, int]
    step_mean: dict[str, float]
    mean_seqs: float


def memory_use(samples: list[MemorySample], started_s: float) -> MemoryUse:
    """Means and peaks of samples, each of which holds since the one before it.

    Steps are those samples in which a sequence has memory.
    """
    sums, step_sums, peaks = [0.0] * len(STATES), [0] * len(STATES), [0] * len(STATES)
    seq_seconds, num_steps, before = 0.0, 0, started_s
    for sample in samples:
        seconds, before = sample.time_s - before, sample.time_s
        seq_seconds += seconds * sample.num_seqs
        is_step = sample.num_seqs > 0
        num_steps += is_step
        for idx, num_bytes in enumerate(sample.state):
            sums[idx] += seconds * num_bytes
            step_sums[idx] += num_bytes if is_step else 0
            peaks[idx] = max(peaks[idx], num_bytes)
    total = before - started_s
    return MemoryUse(
        mean={name: value / total if total else 0.0 for name, value in _by_state(sums)},
        peak=dict(_by_state(peaks)),
        step_mean={name: value / max(1, num_steps) for name, value in _by_state(step_sums)},
        mean_seqs=seq_seconds / total if total else 0.0,
    )


def _by_state(values: Sequence[N]) -> Iterator[tuple[str, N]]:
    return zip(STATES, values, strict=True)


def worker_cpu_seconds() -> float | None:
    """CPU time of the commit workers that live now; None where the kernel does not tell."""
    total_ns = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            if (task / "comm").read_text().strip() == WORKER_NAME:
                total_ns += int((task / "schedstat").read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            if task.exists():  # a kernel without CONFIG_SCHED_INFO; else the thread ended
                return None
    return total_ns / 1e9
