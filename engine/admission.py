"""Who gets memory next among the groups that have none: new, preempted or swapped out.

Owns: the waiting and swapped queues.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from .group_memory import GroupMemory
from .sequence_group import GroupStatus, SequenceGroup

if TYPE_CHECKING:
    from ..backend import KVBackend
    from .config import SchedulingPolicy

AGING_STEPS = 256
"""Steps of waiting that make up for one level of priority, so that nobody waits for ever."""

READMIT_HEADROOM_TOKENS = 8
"""Room per running sequence that must be free before a preempted group comes back."""


class WaitingGroups:
    """The groups without memory, in their order.

    Under ``"fcfs"`` that is the order of arrival, under ``"priority"`` the lower priority goes
    first. A level is worth ``AGING_STEPS`` steps of waiting; as all grow older at the same pace,
    priority and time of arrival make a rank that never changes.

    Attributes:
        waiting: new ones, and ones that are computed again; best rank first.
        swapped: swapped-out ones; best rank first.
    """

    def __init__(self, policy: SchedulingPolicy) -> None:
        self._policy = policy
        self.waiting: deque[SequenceGroup] = deque()
        self.swapped: list[SequenceGroup] = []

    def __bool__(self) -> bool:
        return bool(self.waiting or self.swapped)

    def rank(self, group: SequenceGroup, num_steps: int) -> None:
        """Give a group that arrived at step ``num_steps`` its place."""
        if self._policy == "priority":
            group.rank = (group.priority * AGING_STEPS + num_steps, group.arrival_idx)
        else:
            group.rank = (0, group.arrival_idx)

    def add(self, group: SequenceGroup) -> None:
        """Queue a group by its status and rank."""
        if group.status is GroupStatus.SWAPPED:
            insort(self.swapped, group, key=_rank)
        elif not self.waiting or self.waiting[-1].rank < group.rank:
            self.waiting.append(group)
        else:
            insort(self.waiting, group, key=_rank)

    def remove_finished(self) -> None:
        """Take ended groups off the queues."""
        self.waiting = deque(group for group in self.waiting if not group.is_finished)
        self.swapped = [group for group in self.swapped if not group.is_finished]

    def candidates(self, limit: int) -> Iterator[SequenceGroup]:
        """The best ``limit`` of each queue, in the order of rank; the queues may change meanwhile.

        Swapped-out groups ran before, so under ``"fcfs"`` they come before new ones.
        """
        first = [*islice(self.swapped, limit), *islice(self.waiting, limit)]
        if self.swapped:
            first.sort(key=_rank)
        return iter(first)


class Admission:
    """Says whether a group fits now, and admits it."""

    def __init__(self, backend: KVBackend, memory: GroupMemory) -> None:
        self._backend = backend
        self._memory = memory

    def never_fits(self, group: SequenceGroup) -> bool:
        """Whether one of its sequences needs more rows than the whole pool has."""
        seq = max(group.active, key=lambda seq: seq.num_tokens)
        # Rows without which it cannot make one more token than it has, and be read again.
        is_last = seq.num_output_tokens + 1 >= seq.max_tokens
        return seq.num_tokens + (0 if is_last else 1) > self._backend.max_seq_tokens()

    def waits_for_prefix(self, group: SequenceGroup, prefills: Iterable[SequenceGroup]) -> bool:
        """Whether one of the prefills under way is about to compute a page of the group's prompt.

        To compute it twice would cost time and memory. The wait ends once the prefill has passed
        what the two have in common.
        """
        if group.prompt_logprobs is not None or not self._memory.shares_prefix(group):
            return False
        token_ids = group.root.token_ids
        unit = self._memory.share_tokens
        for other in prefills:
            if other.is_finished or other.salt != group.salt:
                continue
            seq = other.active[0]
            if seq.num_uncomputed_tokens <= 1:
                continue
            end = (seq.num_computed_tokens // unit + 1) * unit
            theirs = seq.token_ids
            if end < len(token_ids) and end <= len(theirs) and token_ids[:end] == theirs[:end]:
                return True
        return False

    def try_start(
        self,
        group: SequenceGroup,
        budget: int,
        num_running_seqs: Callable[[], int],
        *,
        is_alone: bool,
    ) -> int | None:
        """Admit a waiting group; the tokens of its first sequence to compute now, or None."""
        hit = self._memory.find_prefix(group)
        if not is_alone:
            need = group.root.num_tokens - (0 if hit is None else hit.num_tokens)
            need = max(1, need) + self._extra_tokens(group, num_running_seqs)
            if not self._backend.can_admit(need):
                return None
        return self._memory.try_admit(group, budget, hit)

    def has_room_to_return(self, group: SequenceGroup, num_running_seqs: Callable[[], int]) -> bool:
        """Whether a swapped-out group would find headroom besides its own pages."""
        need = group.num_distinct_tokens() + self._extra_tokens(group, num_running_seqs)
        return self._backend.can_admit(need)

    def _extra_tokens(self, group: SequenceGroup, num_running_seqs: Callable[[], int]) -> int:
        """Room for the tails of its other sequences, and for those that run to grow."""
        num_tails = (len(group.active) if group.is_expanded else group.width) - 1
        extra = num_tails * self._memory.share_tokens
        if group.metrics.num_preemptions > 0:
            extra += READMIT_HEADROOM_TOKENS * num_running_seqs()
        return extra


def _rank(group: SequenceGroup) -> tuple[int, int]:
    return group.rank
