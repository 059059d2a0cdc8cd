"""What a simulated run comes to: rates, latencies, stalls and the use of memory.

Owns: sums over steps, and two times for each request.  Thread-safety: none; one thread.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from .engine import SimulatedEngine, Step
from .trace import Trace

SAMPLE_STEPS = 16
"""Steps between two looks at the cache's counts."""

WARM_SHARE, LAST_SHARE = 0.2, 0.8
"""Shares of the requests that have ended when the measured part of a run begins and ends: before,
the cache fills for the first time, and after, it runs empty."""

_BYTES = ("live_bytes", "committed_bytes", "ahead_bytes", "parked_bytes", "cached_bytes")
_BYTES += ("shared_bytes", "logical_bytes", "swapped_bytes")


class Measurements:
    """Sums up a run as it goes.

    Attributes:
        num_ended: requests that ended so far.
        points: samples of the whole run, for plots.
    """

    def __init__(self, trace: Trace, engine: SimulatedEngine, max_points: int = 400) -> None:
        self._trace, self._engine = trace, engine
        self._point_every = max(1, len(trace) // max_points)
        self._next_point = 0
        self.num_ended = 0
        self.points: list[dict[str, float]] = []
        self._now = 0.0
        self._first_token_s = np.full(len(trace), np.nan)
        self._end_s = np.full(len(trace), np.nan)
        self._num_failed = 0
        self._window = (int(WARM_SHARE * len(trace)), int(LAST_SHARE * len(trace)))
        self._sums: dict[str, float] = dict.fromkeys(
            ("steps", "seconds", "compute_s", "stall_s", "copy_s", "worker_s", "seq_seconds"), 0.0
        )
        self._sums |= dict.fromkeys(("decoded_tokens", "computed_tokens", "stalled_steps"), 0.0)
        self._bytes = dict.fromkeys(_BYTES, 0.0)
        self._created_bytes = 0.0
        self._since_sample = self._sampled_steps = 0
        self._stalls: list[float] = []
        self._total_steps = self._real_steps = 0
        self._total_stall_s = 0.0
        self._peak_seqs = 0
        self._before: dict[str, float] = {}
        self._after: dict[str, float] = {}

    def add(self, step: Step, now: float) -> None:
        """Count a step that ended at ``now``."""
        seconds, self._now = now - self._now, now
        num_seqs = len(step.batch.seqs)
        self._total_steps += step.num_steps
        self._real_steps += 1
        self._total_stall_s += step.stall_s
        self._peak_seqs = max(self._peak_seqs, num_seqs)
        if self._window[0] <= self.num_ended < self._window[1]:
            self._count(step, seconds, num_seqs)
        self._note_requests(step, now)
        if not self._before and 0 < self._window[0] <= self.num_ended:
            self._before = self._counters()
        if not self._after and self.num_ended >= self._window[1]:
            self._after = self._counters()
        if self.num_ended >= self._next_point:
            self._next_point += self._point_every
            self._add_point(now, num_seqs)

    def _count(self, step: Step, seconds: float, num_seqs: int) -> None:
        sums = self._sums
        sums["steps"] += step.num_steps
        sums["seconds"] += seconds
        sums["compute_s"] += step.compute_s
        sums["stall_s"] += step.stall_s
        sums["copy_s"] += step.copy_s
        sums["worker_s"] += step.worker_s
        sums["seq_seconds"] += num_seqs * seconds
        sums["decoded_tokens"] += step.batch.num_decodes * step.num_steps
        if step.work is not None:
            sums["computed_tokens"] += step.work.num_tokens * step.num_steps
        if step.stall_s > 0:
            self._stalls.append(step.stall_s)
        self._since_sample += step.num_steps
        if self._since_sample >= SAMPLE_STEPS:
            self._sample()

    def _sample(self) -> None:
        stats = self._engine.backend.stats()
        weight, self._since_sample = self._since_sample, 0
        self._sampled_steps += weight
        for name in _BYTES:
            self._bytes[name] += weight * getattr(stats, name)
        self._created_bytes += weight * stats.created_pages * stats.page_bytes

    def _note_requests(self, step: Step, now: float) -> None:
        for group in step.first_tokens:
            self._first_token_s[int(group.request_id)] = now
        for group in step.ended:
            self.num_ended += 1
            if group.error is None:
                self._end_s[int(group.request_id)] = now
            else:
                self._num_failed += 1

    def _add_point(self, now: float, num_seqs: int) -> None:
        stats = self._engine.backend.stats()
        self.points.append(
            {
                "seconds": now,
                "num_ended": self.num_ended,
                "num_seqs": num_seqs,
                "num_waiting": len(self._engine.scheduler.waiting),
                "live_bytes": stats.live_bytes,
                "created_bytes": stats.created_pages * stats.page_bytes,
                "stall_s": self._sums["stall_s"],
            }
        )

    def _counters(self) -> dict[str, float]:
        kv, queues = self._engine.backend.stats(), self._engine.scheduler.stats()
        prefixes = self._engine.backend.prefix_stats()
        return {
            "map_calls": kv.map_calls,
            "unmap_calls": kv.unmap_calls,
            "critical_pages": kv.critical_pages,
            "background_pages": kv.background_pages,
            "adopted_pages": kv.adopted_pages,
            "reclaimed_pages": kv.reclaimed_pages,
            "aliased_pages": kv.aliased_pages,
            "cow_copies": kv.cow_copies,
            "preempt_swap": queues.preempt_swap,
            "preempt_recompute": queues.preempt_recompute,
            "preempted_tokens": queues.preempted_tokens,
            "queried_tokens": prefixes.queried_tokens,
            "hit_tokens": prefixes.hit_tokens,
        }

    def result(self) -> dict[str, Any]:
        """Plain values. Rates, shares and bytes are of the measured part of the run."""
        sums = self._sums
        after = self._after or self._counters()
        seconds = max(sums["seconds"], 1e-12)
        stats = self._engine.backend.stats()
        samples = max(1, self._sampled_steps)
        mean_bytes = {name: total / samples for name, total in self._bytes.items()}
        host_s = self._engine.host_s / max(1, self._real_steps)
        return {
            "num_requests": self.num_ended,
            "num_failed": self._num_failed,
            "num_steps": self._total_steps,
            "num_real_steps": self._real_steps,
            "simulated_s": self._now,
            "total_stall_s": self._total_stall_s,
            "total_stall_calls": asdict(self._engine.driver.stalls),
            "peak_seqs": self._peak_seqs,
            "mean_seqs": sums["seq_seconds"] / seconds,
            "decoded_tokens_per_s": sums["decoded_tokens"] / seconds,
            "step_ms": 1e3 * seconds / max(1.0, sums["steps"]),
            "stall_share": sums["stall_s"] / seconds,
            "copy_share": sums["copy_s"] / seconds,
            "worker_share": sums["worker_s"] / seconds,
            "stalled_steps_share": len(self._stalls) / max(1.0, sums["steps"]),
            "stall_ms": percentiles(1e3 * np.array(self._stalls)),
            "host_us_per_step": 1e6 * host_s,
            "capacity_bytes": stats.capacity_bytes,
            "page_bytes": stats.page_bytes,
            "mean_bytes": mean_bytes,
            "mean_created_bytes": self._created_bytes / samples,
            "waste": _waste(mean_bytes),
            "counters": {name: after[name] - self._before.get(name, 0.0) for name in after},
            "ttft_s": percentiles(self._first_token_s - self._trace.arrival_s),
            "tpot_ms": percentiles(1e3 * self._tpot_s()),
        }

    def _tpot_s(self) -> Any:
        """Seconds between tokens, of requests with at least two."""
        num_gaps = self._trace.output_tokens - 1
        gaps = (self._end_s - self._first_token_s)[num_gaps > 0]
        return gaps / num_gaps[num_gaps > 0]


def percentiles(values: Any) -> dict[str, float] | None:
    """Mean, median and tails of what is a number; None: nothing is."""
    values = np.asarray(values)[~np.isnan(values)]
    if len(values) == 0:
        return None
    median, high, higher = np.percentile(values, [50, 90, 99]).tolist()
    return {"mean": float(values.mean()), "p50": median, "p90": high, "p99": higher}


def _waste(mean_bytes: dict[str, float]) -> float:
    """Share of the committed memory that holds no token."""
    committed = mean_bytes["committed_bytes"]
    return 0.0 if committed == 0 else 1 - mean_bytes["live_bytes"] / committed
