"""A line of figures every few seconds while there is work, and one for each burst of preemptions.

Owns: the figures of the last line.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time

from ..engine import AsyncLLMEngine, EngineSnapshot

logger = logging.getLogger(__name__)

STATS_SECONDS = 10.0
"""Between two lines of figures."""

POLL_SECONDS = 1.0
"""Between two looks at the counters of preemption."""

_MIB = 2**20


class StatsLog:
    """Watches an engine's snapshots and logs what changed.

    Args:
        engine: whose figures.
        stats_s, poll_s: how often.
    """

    def __init__(
        self,
        engine: AsyncLLMEngine,
        *,
        stats_s: float = STATS_SECONDS,
        poll_s: float = POLL_SECONDS,
    ) -> None:
        self._engine = engine
        self._stats_s = stats_s
        self._poll_s = poll_s
        self._last_line: EngineSnapshot | None = None
        self._last_line_time = 0.0
        self._last_poll: EngineSnapshot | None = None

    async def run(self) -> None:
        """Log until cancelled."""
        while True:
            await asyncio.sleep(self._poll_s)
            self.look()

    def look(self) -> None:
        """Log what there is to say since the last look."""
        now = self._engine.snapshot
        if now is None:
            return
        if self._last_poll is not None:
            _log_preemptions(self._last_poll, now)
        self._last_poll = now
        seconds = time.monotonic() - self._last_line_time
        if self._last_line is not None and seconds < self._stats_s:
            return
        # Where nothing happened and nothing runs there is nothing to say.
        before = self._last_line
        if before is not None and (now.num_steps > before.num_steps or now.num_live_requests):
            _log_stats(before, now, seconds)
        self._last_line, self._last_line_time = now, time.monotonic()


def _log_stats(before: EngineSnapshot, now: EngineSnapshot, seconds: float) -> None:
    prompt_rate = (now.tokens.prompt_tokens - before.tokens.prompt_tokens) / seconds
    rate = (now.tokens.generation_tokens - before.tokens.generation_tokens) / seconds
    scheduler, kv = now.scheduler, now.kv
    queried = now.prefix.queried_tokens - before.prefix.queried_tokens
    hits = now.prefix.hit_tokens - before.prefix.hit_tokens
    hit_rate = hits / queried if queried else 0.0
    logger.info(
        "Avg prompt throughput: %.1f tokens/s, Avg generation throughput: %.1f tokens/s, "
        "Running: %d reqs, Waiting: %d reqs, Swapped: %d reqs, "
        "KV committed: %.1f of %.1f MiB (live %.1f MiB), Prefix cache hit rate: %.1f%%",
        prompt_rate,
        rate,
        scheduler.num_running,
        max(scheduler.num_waiting, now.num_queued),
        scheduler.num_swapped,
        kv.committed_bytes / _MIB,
        kv.capacity_bytes / _MIB,
        kv.live_bytes / _MIB,
        100 * hit_rate,
        extra={
            "fields": {
                "prompt_tokens_per_s": round(prompt_rate, 3),
                "generation_tokens_per_s": round(rate, 3),
                "num_running": scheduler.num_running,
                "num_waiting": scheduler.num_waiting,
                "num_swapped": scheduler.num_swapped,
                "committed_bytes": kv.committed_bytes,
                "capacity_bytes": kv.capacity_bytes,
                "live_bytes": kv.live_bytes,
                "prefix_hit_rate": round(hit_rate, 4),
            }
        },
    )


def _log_preemptions(before: EngineSnapshot, now: EngineSnapshot) -> None:
    old, new = before.scheduler, now.scheduler
    num_swaps = new.preempt_swap - old.preempt_swap
    num_recomputes = new.preempt_recompute - old.preempt_recompute
    if num_swaps == num_recomputes == 0:
        return
    num_bytes = new.swapped_bytes - old.swapped_bytes
    num_tokens = new.preempted_tokens - old.preempted_tokens
    logger.warning(
        "KV memory ran short: %d requests preempted by swap (%.1f MiB moved), %d by recompute "
        "(%d computed tokens dropped); committed %.1f MiB before, %.1f after, of %.1f",
        num_swaps,
        num_bytes / _MIB,
        num_recomputes,
        num_tokens,
        before.kv.committed_bytes / _MIB,
        now.kv.committed_bytes / _MIB,
        now.kv.capacity_bytes / _MIB,
        extra={
            "fields": {
                "preempt_swap": num_swaps,
                "preempt_recompute": num_recomputes,
                "swapped_bytes": num_bytes,
                "preempted_tokens": num_tokens,
                "committed_bytes_before": before.kv.committed_bytes,
                "committed_bytes_after": now.kv.committed_bytes,
            }
        },
    )
