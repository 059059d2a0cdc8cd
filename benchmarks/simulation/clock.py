"""Simulated time: what the device and the driver take, as far as the engine waits for it.

Owns: the time, and which driver calls were charged already.  Thread-safety: none; one thread.
"""

from __future__ import annotations

from vmalloc import VirtualKVCache, _core
from vmalloc.backend import KVBackend

from .hardware import DriverCalls, DriverLatency

MAX_JOBS = 64
"""Most jobs of the worker between two looks at how long they took."""


class SimulatedClock:
    """Seconds since the start of a simulation.

    Copies to host memory and back take their time when they are made, so that whoever reads the
    clock before and after measures them.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._backend: KVBackend | None = None
        self._host_bandwidth = 1.0

    def watch(self, backend: KVBackend, host_bandwidth: float) -> None:
        """Count the copies of ``backend`` from now on, at so many bytes per second."""
        self._backend = backend if backend.config.swap_bytes else None
        self._host_bandwidth = host_bandwidth

    def __call__(self) -> float:
        return self._seconds + self.swap_seconds()

    def swap_seconds(self) -> float:
        """Seconds of all copies so far."""
        if self._backend is None:
            return 0.0
        stats = self._backend.stats()
        num_bytes = (stats.swap_out_pages + stats.swap_in_pages) * stats.page_bytes
        return num_bytes / self._host_bandwidth

    def advance(self, seconds: float) -> None:
        """So much time passes."""
        self._seconds += seconds

    def wait_until(self, seconds: float) -> None:
        """Nothing happens until then; nothing at all if that is over."""
        self._seconds += max(0.0, seconds - self())


class DriverTime:
    """What the driver calls of a virtual cache cost: the engine's own, and those of its worker.

    The worker's jobs are done by ``run_worker``, as many as there is time for; what it leaves, the
    engine has to do itself once it needs the rows.

    Args:
        cache: its worker is paused from now on. None: a backend without driver calls.
        driver: the one it maps with.

    Attributes:
        stalls: calls that the engine waited for.
        background: calls of the worker.
        is_idle: whether the last step had no driver calls, and left the worker nothing to do.
    """

    def __init__(
        self,
        cache: VirtualKVCache | None,
        driver: _core.Driver | None,
        latency: DriverLatency,
    ) -> None:
        self._cache = cache
        self._driver = driver
        self._latency = latency
        self._seen = DriverCalls()
        self._num_calls = 0
        self._debt_s = 0.0
        self._job_s = 0.0  # what a job takes of late
        self.is_idle = False
        self.stalls = DriverCalls()
        self.background = DriverCalls()
        if cache is not None:
            cache.pause_worker()

    def take_stall_seconds(self) -> float:
        """Time of the calls that the engine made since it last asked."""
        calls = self._take_calls()
        self.is_idle = calls is None
        if calls is None:
            return 0.0
        self.stalls = self.stalls.plus(calls)
        return self._latency.seconds(calls)

    def run_worker(self, seconds: float) -> float:
        """Let the worker work for so long; for how long it had work.

        A job that is begun is finished; what it takes too long is taken off its next time.
        """
        if self._cache is None:
            return 0.0
        left = seconds - self._debt_s
        busy_s = 0.0
        while left > 0 and (num_jobs := self._cache.run_worker(self._jobs_within(left))):
            calls = self._take_calls()
            if calls is not None:  # else the jobs found no pages to be had
                self.is_idle = False
                took = self._latency.seconds(calls)
                self._job_s = took / num_jobs
                self.background = self.background.plus(calls)
                left -= took
                busy_s += took
        if left <= 0:
            self.is_idle = False
        self._debt_s = max(0.0, -left)
        return busy_s

    def _jobs_within(self, seconds: float) -> int:
        if self._job_s == 0.0:
            return 1
        return max(1, min(MAX_JOBS, int(seconds / self._job_s)))

    def _take_calls(self) -> DriverCalls | None:
        """Driver calls since this was last called, None if there were none."""
        if self._cache is None or self._driver is None:
            return None
        counters = self._driver.counters()
        num_calls = counters["map_calls"] + counters["unmap_calls"] + counters["create_calls"]
        if num_calls == self._num_calls:
            return None
        self._num_calls = num_calls
        stats = self._cache.stats()
        now = DriverCalls(
            creates=counters["create_calls"],
            maps=counters["map_calls"],
            mapped_pages=stats.critical_pages + stats.background_pages + stats.aliased_pages,
            unmaps=counters["unmap_calls"],
        )
        calls, self._seen = now.since(self._seen), now
        return calls
