"""Who runs next, under a token budget and the KV cache's word.

Owns: the queues of sequence groups. Of memory it knows only what the backend answers.
Thread-safety: none; one engine thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from .admission import Admission, WaitingGroups
from .group_memory import GroupMemory
from .preemption import Preemptor, choose_victim
from .preemption_cost import PreemptionCost
from .schedule import ScheduledBatch, ScheduledGroup, SchedulerStats
from .sequence import Sequence
from .sequence_group import GroupStatus, SequenceGroup

if TYPE_CHECKING:
    from ..backend import KVBackend
    from .config import PreemptionMode, SchedulingPolicy

MAX_STALLS = 8
"""Empty steps in a row after which waiting for pages is given up."""


class Scheduler:
    """Waiting, running and swapped groups over one ``KVBackend``.

    A group is scheduled, preempted and resumed as one. Every call to ``schedule`` makes progress,
    fails a group, drops a swapped one's copy, or waits for pages that the end of a step sets free;
    it waits at most ``MAX_STALLS`` times in a row.

    Args:
        max_num_seqs: most sequences that have KV at once; a group needs its width.
        max_num_batched_tokens: most tokens of one step; at least ``max_num_seqs``.
        policy, preemption_mode: see ``EngineConfig``.
        cost: what ``preemption_mode="auto"`` goes by.
        clock: seconds, for measuring copies.
    """

    def __init__(
        self,
        backend: KVBackend,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: SchedulingPolicy = "fcfs",
        preemption_mode: PreemptionMode = "auto",
        cost: PreemptionCost | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._backend = backend
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self.cost = PreemptionCost() if cost is None else cost
        self._memory = GroupMemory(backend)
        self._admission = Admission(backend, self._memory)
        self._preemptor = Preemptor(
            backend, self._memory, mode=preemption_mode, cost=self.cost, clock=clock
        )
        self._queue = WaitingGroups(policy)
        self.running: list[SequenceGroup] = []
        self._num_steps = 0
        self._num_stalls = 0
        self._failed: list[SequenceGroup] = []
        # Tokens of this step, by sequence; dropped again if its group is preempted.
        self._scheduled: dict[int, int] = {}
        self._budget = 0  # what is left of max_num_batched_tokens

    @property
    def waiting(self) -> list[SequenceGroup]:
        """Groups without KV, best rank first."""
        return self._queue.waiting

    @property
    def swapped(self) -> list[SequenceGroup]:
        """Groups whose KV is in host memory, best rank first."""
        return self._queue.swapped

    @property
    def num_preemptions(self) -> int:
        """Groups preempted so far, by swap or by recompute."""
        return self._preemptor.num_swaps + self._preemptor.num_recomputes

    @property
    def has_unfinished(self) -> bool:
        """Whether any group waits or runs, or failed and was not handed over yet."""
        return bool(self.running or self._queue or self._failed)

    def stats(self) -> SchedulerStats:
        """Queues and counters now."""
        preemptor = self._preemptor
        return SchedulerStats(
            num_waiting=len(self.waiting),
            num_running=len(self.running),
            num_swapped=len(self.swapped),
            num_running_seqs=sum(len(group.active) for group in self.running),
            preempt_swap=preemptor.num_swaps,
            preempt_recompute=preemptor.num_recomputes,
            preempted_tokens=preemptor.num_recomputed_tokens,
            swapped_bytes=preemptor.num_swapped_bytes,
        )

    def add(self, group: SequenceGroup, *, may_prefetch: bool = True) -> None:
        """Queue a new group; ``may_prefetch``: the backend may get ready for it."""
        if may_prefetch and len(self.waiting) + len(self.running) < self._max_num_seqs:
            self._prefetch(group)
        self._queue.rank(group, self._num_steps)
        self._queue.add(group)

    def schedule(self) -> ScheduledBatch:
        """Choose the tokens of the next step and have their rows backed.

        Decodes come first, then prefills under way, then, while the budget lasts and nothing was
        preempted, groups that come back and new ones.
        """
        self._num_steps += 1
        self._scheduled = {}
        self._budget = self._max_num_batched_tokens
        num_preemptions = self.num_preemptions
        self._schedule_prefills(self._schedule_decodes())
        if self._queue and self.num_preemptions == num_preemptions:
            self._admit()
        batch = self._batch()
        if batch.seqs or not (self._queue or self.running):
            self._num_stalls = 0
        else:
            self._num_stalls += 1
            if self._num_stalls == MAX_STALLS:
                # Empty steps take no time, and kernels of earlier ones may still read the pages
                # that are missing: wait for the device once before anybody ends for want of them.
                self._backend.trim(self._backend.stats().created_pages)
        if self.waiting:
            self._prefetch(self.waiting[0])
        return batch

    def complete(self, batch: ScheduledBatch) -> None:
        """Note that a step computed its tokens."""
        for part in batch.groups:
            self._memory.note_computed(part)
            if part.group.is_shielded and part.seqs[0].num_uncomputed_tokens == 0:
                part.group.is_shielded = False

    def release(self, groups: list[SequenceGroup]) -> None:
        """Free the KV of ended sequences, and take ended groups off the queues."""
        was_queued = False
        for group in groups:
            group.drop_finished()
            if not group.is_finished:
                self._memory.free_finished(group)
                continue
            self._memory.free(group)
            if group.status is GroupStatus.RUNNING:
                self.running.remove(group)
            else:
                was_queued = True
            group.status = GroupStatus.FINISHED
        if was_queued:
            self._queue.remove_finished()
        if self._failed:
            self._failed = [group for group in self._failed if group not in groups]

    def preempt(self, group: SequenceGroup) -> None:
        """Take the KV of a running group, by swap or recompute; it comes back when it can."""
        for seq in group.active:
            self._budget += self._scheduled.pop(seq.seq_id, 0)
        self._preemptor.preempt(group)
        self.running.remove(group)
        self._queue.add(group)

    def preempt_all(self) -> None:
        """Drop the KV of every group; all wait to be computed again."""
        for group in [*self.running, *self.swapped]:
            if group.status is GroupStatus.SWAPPED:
                self._drop_swapped(group)
            else:
                self._preemptor.drop(group)
                self.running.remove(group)
                self._queue.add(group)

    def _batch(self) -> ScheduledBatch:
        scheduled = self._scheduled
        parts: list[ScheduledGroup] = []
        all_seqs: list[Sequence] = []
        all_counts: list[int] = []
        for group in self.running:
            seqs = [seq for seq in group.active if seq.seq_id in scheduled]
            if seqs:
                counts = [scheduled[seq.seq_id] for seq in seqs]
                parts.append(ScheduledGroup(group, seqs, counts))
                all_seqs += seqs
                all_counts += counts
        failed, self._failed = self._failed, []
        return ScheduledBatch(parts, all_seqs, all_counts, failed)

    def _schedule_tokens(self, seq: Sequence, num_new_tokens: int) -> None:
        self._scheduled[seq.seq_id] = num_new_tokens
        self._budget -= num_new_tokens

    def _schedule_decodes(self) -> list[SequenceGroup]:
        """Schedule the groups that decode; the other running ones."""
        for group in [group for group in self.running if group.needs_kv_change]:
            while group.status is GroupStatus.RUNNING and not self._memory.try_prepare(group):
                if self._can_wait():
                    break
                self._evict()
        ready: list[SequenceGroup] = []
        others: list[SequenceGroup] = []
        for group in self.running:
            (ready if group.is_decoding else others).append(group)
        while ready and not self._try_decode(ready):
            if self._can_wait():
                ready = [group for group in ready if self._try_decode([group])]
                break
            self._evict()
            ready = [group for group in ready if group.status is GroupStatus.RUNNING]
        self._schedule_one_each(ready)
        return others

    def _schedule_one_each(self, groups: list[SequenceGroup]) -> None:
        for group in groups:
            for seq in group.active:
                self._scheduled[seq.seq_id] = 1
            self._budget -= len(group.active)

    def _try_decode(self, groups: list[SequenceGroup]) -> bool:
        seqs = [seq for group in groups for seq in group.active]
        return self._memory.try_extend(seqs, [len(seq.token_ids) for seq in seqs])

    def _schedule_prefills(self, groups: list[SequenceGroup]) -> None:
        for group in sorted(groups, key=lambda group: group.rank):
            for seq in list(group.active):
                while (
                    group.status is GroupStatus.RUNNING
                    and (num_new_tokens := self._next_chunk(group, seq)) > 0
                ):
                    total = seq.num_computed_tokens + num_new_tokens
                    if self._memory.try_extend([seq], [total]):
                        self._schedule_tokens(seq, num_new_tokens)
                        break
                    if self._can_wait():
                        break
                    self._evict()

    def _next_chunk(self, group: SequenceGroup, seq: Sequence) -> int:
        if not seq.has_kv:
            return 0
        return min(group.prefill_goal(seq) - seq.num_computed_tokens, self._budget)

    def _can_wait(self) -> bool:
        """Whether pages come back when this step ends, so that nothing need be evicted."""
        if self._num_stalls >= MAX_STALLS:
            return False
        if self._backend.stats().retired_pages > 0:
            return True
        # Alone and within the pool's size: a passing shortage of the host, not of the pool.
        if len(self.running) > 1 or self.swapped:
            return False
        (alone,) = self.running
        return len(alone.seqs) == 1 and alone.root.num_tokens <= self._backend.max_seq_tokens()

    def _evict(self) -> None:
        """Take the KV of the group that can best do without; alone, it ends with an error."""
        victim = choose_victim(self.running)
        if len(self.running) == 1 and self.swapped:
            self._drop_swapped(self.swapped[-1])  # it may hold pages that both shared
            return
        if len(self.running) > 1:
            self.preempt(victim)
        else:
            self.running.remove(victim)
            self._scheduled.clear()
            self._fail(victim, "ran out of KV memory with nothing left to preempt")

    def _drop_swapped(self, group: SequenceGroup) -> None:
        """Give up the copy of a swapped-out group; it waits to be computed again."""
        self._preemptor.drop(group)
        self.swapped.remove(group)
        self._queue.add(group)

    def _admit(self) -> None:
        num_seats = sum(group.num_seats for group in self.running)
        prefills = [group for group in self.running if not group.is_decoding]
        for group in self._queue.candidates(self._max_num_seqs):
            num_seats += group.num_seats
            if self._budget <= 0 or num_seats > self._max_num_seqs:
                break
            if group.status is GroupStatus.SWAPPED:
                if not self._try_return(group):
                    break
            elif self._admission.never_fits(group):
                self.waiting.remove(group)
                self._fail(group, "does not fit the KV cache")
                num_seats -= group.num_seats
            elif self._admission.waits_for_prefix(group, prefills):
                num_seats -= group.num_seats
            elif self._try_start(group):
                prefills.append(group)
            else:
                break

    def _try_start(self, group: SequenceGroup) -> bool:
        num_new_tokens = self._admission.try_start(
            group, self._budget, self._num_running_seqs(), is_alone=not self.running
        )
        if num_new_tokens is None:
            if self.running or self._num_stalls < MAX_STALLS:
                return False
            if self.swapped:
                self._drop_swapped(self.swapped[-1])
                return False
            self.waiting.remove(group)
            self._fail(group, "found no KV memory although nothing runs")
            self._num_stalls = 0
            return True
        self.waiting.remove(group)
        group.status = GroupStatus.RUNNING
        self.running.append(group)
        seq = next(seq for seq in group.active if seq.has_kv)
        if num_new_tokens > 0:
            self._schedule_tokens(seq, num_new_tokens)
        return True

    def _try_return(self, group: SequenceGroup) -> bool:
        """Bring a swapped-out group back, and let it run at once if it can."""
        if self.running and not self._admission.has_room_to_return(group, self._num_running_seqs()):
            return False
        if not self._preemptor.try_return(group):
            if not self.running and self._num_stalls >= MAX_STALLS:
                self._drop_swapped(self.swapped[-1])
            return False
        self.swapped.remove(group)
        self.running.append(group)
        if (
            len(group.active) <= self._budget
            and self._memory.try_prepare(group)
            and group.is_decoding
            and self._try_decode([group])
        ):
            self._schedule_one_each([group])
        return True

    def _num_running_seqs(self) -> int:
        return sum(len(group.active) for group in self.running)

    def _fail(self, group: SequenceGroup, what: str) -> None:
        size = f"{max(seq.num_tokens for seq in group.active)} tokens"
        num_seqs = len(group.active) if group.is_expanded else group.width
        if num_seqs > 1:
            size += f" in each of {num_seqs} sequences"
        error = (
            f"request {group.request_id} {what}: it has {size}, and the cap of "
            f"{self._backend.stats().capacity_bytes} bytes holds {self._backend.max_seq_tokens()} "
            "of one sequence"
        )
        group.finish("error", error, "memory")
        self._failed.append(group)
        self._memory.free(group)
        group.status = GroupStatus.FINISHED

    def _prefetch(self, group: SequenceGroup) -> None:
        self._backend.prefetch(min(group.root.num_tokens, self._max_num_batched_tokens))
