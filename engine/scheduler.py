"""Who runs next, under a token budget and the KV cache's word.

Owns: the queues of sequence groups. Of memory it knows only what the backend answers.
Thread-safety: none; one engine thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from .admission import Admission, WaitingGroups
from .group_memory import GroupMemory
from .preemption import Preemptor, choose_victim
from .preemption_cost import PreemptionCost
from .running_groups import RunningGroups
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
        self._running = RunningGroups()
        self._shielded: dict[SequenceGroup, None] = {}
        self._num_steps = 0
        self._num_stalls = 0
        self._failed: list[SequenceGroup] = []
        # What this step computes; dropped again if the group is preempted.
        self._decodes: list[ScheduledGroup] = []
        self._decode_seqs: list[Sequence] = []
        self._prefills: dict[SequenceGroup, ScheduledGroup] = {}
        self._budget = 0  # what is left of max_num_batched_tokens

    @property
    def running(self) -> list[SequenceGroup]:
        """Groups that have KV, in the order in which they got it."""
        return list(self._running)

    @property
    def waiting(self) -> deque[SequenceGroup]:
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
        return bool(self._running or self._queue or self._failed)

    def stats(self) -> SchedulerStats:
        """Queues and counters now."""
        preemptor = self._preemptor
        return SchedulerStats(
            num_waiting=len(self.waiting),
            num_running=len(self._running),
            num_swapped=len(self.swapped),
            num_running_seqs=self._running.num_seqs(),
            preempt_swap=preemptor.num_swaps,
            preempt_recompute=preemptor.num_recomputes,
            preempted_tokens=preemptor.num_recomputed_tokens,
            swapped_bytes=preemptor.num_swapped_bytes,
        )

    def add(self, group: SequenceGroup, *, may_prefetch: bool = True) -> None:
        """Queue a new group; ``may_prefetch``: the backend may get ready for it."""
        if may_prefetch and len(self.waiting) + len(self._running) < self._max_num_seqs:
            self._prefetch(group)
        self._queue.rank(group, self._num_steps)
        self._queue.add(group)

    def schedule(self) -> ScheduledBatch:
        """Choose the tokens of the next step and have their rows backed.

        Decodes come first, then prefills under way, then, while the budget lasts and nothing was
        preempted, groups that come back and new ones.
        """
        self._num_steps += 1
        self._prefills = {}
        self._budget = self._max_num_batched_tokens
        num_preemptions = self.num_preemptions
        self._schedule_decodes()
        self._schedule_prefills()
        if self._queue and self.num_preemptions == num_preemptions:
            self._admit()
        batch = self._batch()
        if batch.seqs or not (self._queue or self._running):
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

    def skip_steps(self, num_steps: int) -> None:
        """Count steps that nobody asked for, as they would change no more than some lengths."""
        self._num_steps += num_steps

    def complete(self, batch: ScheduledBatch) -> None:
        """Note that a step computed its tokens."""
        self._memory.note_computed(batch)
        for group in list(self._shielded):
            if group.is_finished or group.active[0].num_uncomputed_tokens == 0:
                group.is_shielded = False
                del self._shielded[group]

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
                self._running.remove(group)
            else:
                was_queued = True
            group.status = GroupStatus.FINISHED
        if was_queued:
            self._queue.remove_finished()
        if self._failed:
            self._failed = [group for group in self._failed if group not in groups]

    def preempt(self, group: SequenceGroup) -> None:
        """Take the KV of a running group, by swap or recompute; it comes back when it can."""
        self._unschedule(group)
        self._preemptor.preempt(group)
        self._shielded[group] = None
        self._running.remove(group)
        self._queue.add(group)

    def preempt_all(self) -> None:
        """Drop the KV of every group; all wait to be computed again."""
        for group in [*self._running, *self.swapped]:
            if group.status is GroupStatus.SWAPPED:
                self._drop_swapped(group)
            else:
                self._preemptor.drop(group)
                self._running.remove(group)
                self._queue.add(group)

    def _batch(self) -> ScheduledBatch:
        prefills = list(self._prefills.values())
        num_decodes = len(self._decode_seqs)
        seqs, counts = self._decode_seqs, [1] * num_decodes
        for part in prefills:
            seqs += part.seqs
            counts += part.num_new_tokens
        failed, self._failed = self._failed, []
        return ScheduledBatch(self._decodes + prefills, seqs, counts, num_decodes, failed)

    def _unschedule(self, group: SequenceGroup) -> None:
        """Drop a group's part in the step."""
        part = self._prefills.pop(group, None)
        if part is None:
            part = next((part for part in self._decodes if part.group is group), None)
            if part is None:
                return
            self._decodes.remove(part)
            self._decode_seqs = [seq for seq in self._decode_seqs if seq not in part.seqs]
        self._budget += sum(part.num_new_tokens)

    def _schedule_decodes(self) -> None:
        self._decodes, self._decode_seqs = [], []
        running = self._running
        for group in [group for group in running.unsteady if group.needs_kv_change]:
            while group.status is GroupStatus.RUNNING and not self._memory.try_prepare(group):
                if self._can_wait():
                    break
                self._evict()
        running.find_decoding()
        while (seqs := running.decode_seqs()) and not self._try_decode(seqs):
            if self._can_wait():
                for part in running.decode_parts():
                    if self._try_decode(part.seqs):
                        self._note_decodes([part], part.seqs)
                return
            self._evict()
        self._note_decodes(running.decode_parts(), seqs)

    def _note_decodes(self, parts: list[ScheduledGroup], seqs: list[Sequence]) -> None:
        self._decodes += parts
        self._decode_seqs += seqs
        self._budget -= len(seqs)

    def _try_decode(self, seqs: list[Sequence]) -> bool:
        return self._memory.try_extend(seqs, [seq.num_computed_tokens + 1 for seq in seqs])

    def _schedule_prefills(self) -> None:
        """Schedule the running groups that do not decode."""
        for group in sorted(self._running.unready(), key=lambda group: group.rank):
            for seq in list(group.active):
                while (
                    group.status is GroupStatus.RUNNING
                    and (num_new_tokens := self._next_chunk(group, seq)) > 0
                ):
                    total = seq.num_computed_tokens + num_new_tokens
                    if self._memory.try_extend([seq], [total]):
                        self._schedule_prefill(group, seq, num_new_tokens)
                        break
                    if self._can_wait():
                        break
                    self._evict()

    def _schedule_prefill(self, group: SequenceGroup, seq: Sequence, num_new_tokens: int) -> None:
        part = self._prefills.get(group)
        if part is None:
            part = self._prefills[group] = ScheduledGroup(group, [], [])
        part.seqs.append(seq)
        part.num_new_tokens.append(num_new_tokens)
        self._budget -= num_new_tokens

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
        if len(self._running) > 1 or self.swapped:
            return False
        (alone,) = self._running
        return len(alone.seqs) == 1 and alone.root.num_tokens <= self._backend.max_seq_tokens()

    def _evict(self) -> None:
        """Take the KV of the group that can best do without; alone, it ends with an error."""
        victim = choose_victim(self._running)
        if len(self._running) == 1 and self.swapped:
            self._drop_swapped(self.swapped[-1])  # it may hold pages that both shared
            return
        if len(self._running) > 1:
            self.preempt(victim)
        else:
            self._unschedule(victim)
            self._running.remove(victim)
            self._fail(victim, "ran out of KV memory with nothing left to preempt")

    def _drop_swapped(self, group: SequenceGroup) -> None:
        """Give up the copy of a swapped-out group; it waits to be computed again."""
        self._preemptor.drop(group)
        self.swapped.remove(group)
        self._queue.add(group)

    def _admit(self) -> None:
        num_seats = self._running.num_seats()
        if self._budget <= 0 or num_seats >= self._max_num_seqs:
            return
        prefills = self._running.unready()
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
            group, self._budget, self._running.num_seqs, is_alone=not self._running
        )
        if num_new_tokens is None:
            if self._running or self._num_stalls < MAX_STALLS:
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
        self._running.add(group)
        seq = next(seq for seq in group.active if seq.has_kv)
        if num_new_tokens > 0:
            self._schedule_prefill(group, seq, num_new_tokens)
        return True

    def _try_return(self, group: SequenceGroup) -> bool:
        """Bring a swapped-out group back, and let it run at once if it can."""
        num_seqs = self._running.num_seqs
        if self._running and not self._admission.has_room_to_return(group, num_seqs):
            return False
        if not self._preemptor.try_return(group):
            if not self._running and self._num_stalls >= MAX_STALLS:
                self._drop_swapped(self.swapped[-1])
            return False
        self.swapped.remove(group)
        self._running.add(group)
        if (
            len(group.active) <= self._budget
            and self._memory.try_prepare(group)
            and group.is_decoding
            and self._try_decode(group.active)
        ):
            part = self._running.note_decoding(group)
            self._note_decodes([part], part.seqs)
        return True

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
