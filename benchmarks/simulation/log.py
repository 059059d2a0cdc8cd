"""What an engine did in a step, for comparing two engines step by step.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vmalloc.backend import KVBackend
from vmalloc.engine.schedule import ScheduledBatch, SchedulerStats
from vmalloc.engine.scheduler import Scheduler
from vmalloc.engine.sequence_group import SequenceGroup

_NOT_COUNTED = ("reserved_bytes", "stall_us")  # of the machine, and measured with its clock


@dataclass(frozen=True, slots=True)
class StepLog:
    """A step and the state after it.

    Attributes:
        computed: request, choice and number of tokens of each sequence in the batch, in order.
        failed: requests that can never fit.
        running, waiting, swapped: requests in each queue, in order.
        counts: the scheduler's counters.
        pages: the cache's counts, of pages, bytes and driver calls.
    """

    computed: tuple[tuple[str, int, int], ...]
    failed: tuple[str, ...]
    running: tuple[str, ...]
    waiting: tuple[str, ...]
    swapped: tuple[str, ...]
    counts: SchedulerStats
    pages: dict[str, Any]


def log_step(batch: ScheduledBatch, scheduler: Scheduler, backend: KVBackend) -> StepLog:
    """The log of a step that has just ended."""
    pages = asdict(backend.stats())
    for name in _NOT_COUNTED:
        del pages[name]
    return StepLog(
        computed=tuple(
            (seq.request_id, seq.choice_idx, count)
            for seq, count in zip(batch.seqs, batch.num_new_tokens, strict=True)
        ),
        failed=_names(batch.failed),
        running=_names(scheduler.running),
        waiting=_names(scheduler.waiting),
        swapped=_names(scheduler.swapped),
        counts=scheduler.stats(),
        pages=pages,
    )


def _names(groups: list[SequenceGroup]) -> tuple[str, ...]:
    return tuple(group.request_id for group in groups)
