"""What the scheduler hands out: the work of a step, and its counters.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

from dataclasses import dataclass

from .sequence import Sequence
from .sequence_group import SequenceGroup


@dataclass(slots=True)
class ScheduledGroup:
    """A group's part in a step: some of its sequences, and the tokens each of them computes."""

    group: SequenceGroup
    seqs: list[Sequence]
    num_new_tokens: list[int]


@dataclass(slots=True)
class ScheduledBatch:
    """What one step computes.

    Attributes:
        groups: groups that have a part in it, in order.
        seqs: sequences in the packed batch, in order; those of a group stand together.
        num_new_tokens: tokens each of them computes; their rows are backed.
        num_decodes: sequences at the start of ``seqs`` that decode; the others prefill.
        failed: groups that ended here, or in a call that raised, as their KV can never fit.
    """

    groups: list[ScheduledGroup]
    seqs: list[Sequence]
    num_new_tokens: list[int]
    num_decodes: int
    failed: list[SequenceGroup]


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Queues and counters. Groups are requests; a group of ``n=4`` has four sequences.

    Attributes:
        num_waiting, num_running, num_swapped: groups in each queue.
        num_running_seqs: unfinished sequences of the running groups.
        preempt_swap, preempt_recompute: groups preempted so far, by kind.
        preempted_tokens: computed tokens that were dropped, to be computed again.
        swapped_bytes: bytes copied to host memory so far.
    """

    num_waiting: int
    num_running: int
    num_swapped: int
    num_running_seqs: int
    preempt_swap: int
    preempt_recompute: int
    preempted_tokens: int
    swapped_bytes: int
