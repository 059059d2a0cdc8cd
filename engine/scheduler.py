"""Who runs next: first come first served, under a token budget and the KV cache's word.

Owns: the waiting and running queues. Of memory it knows only what the backend answers.
Thread-safety: none; one engine thread.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..backend import SequenceGroupSpec
from .sequence import Sequence, SequenceStatus

if TYPE_CHECKING:
    from ..backend import KVBackend

logger = logging.getLogger(__name__)

MAX_STALLS = 8
"""Empty steps in a row after which waiting for pages is given up."""

READMIT_HEADROOM_TOKENS = 8
"""Room per running sequence that must be free before a preempted one comes back."""


@dataclass(slots=True)
class ScheduledBatch:
    """What one step computes.

    Attributes:
        seqs: sequences in the packed batch, in order.
        num_new_tokens: tokens each of them computes; their rows are backed.
        failed: sequences that ended here, or in a call that raised, as their KV can never fit.
    """

    seqs: list[Sequence]
    num_new_tokens: list[int]
    failed: list[Sequence]


class Scheduler:
    """Waiting and running queues over one ``KVBackend``.

    Every call to ``schedule`` makes progress, fails a sequence, or waits for pages that the end of
    a step sets free; it waits at most ``MAX_STALLS`` times in a row.
    """

    def __init__(
        self, backend: KVBackend, *, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self._backend = backend
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self.num_preempted_tokens = 0
        self._num_stalls = 0
        self._failed: list[Sequence] = []
        # Tokens of this step, by sequence; dropped again if the sequence is preempted.
        self._scheduled: dict[int, int] = {}
        self._budget = 0  # what is left of max_num_batched_tokens

    @property
    def has_unfinished(self) -> bool:
        """Whether any sequence waits or runs, or failed and was not handed over yet."""
        return bool(self.waiting or self.running or self._failed)

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence behind the others."""
        if len(self.waiting) + len(self.running) < self._max_num_seqs:
            self._prefetch(seq)
        self.waiting.append(seq)

    def schedule(self) -> ScheduledBatch:
        """Choose the tokens of the next step and have their rows backed.

        Decodes come first, then prefills under way, then new sequences while the budget lasts.
        """
        self._scheduled = {}
        self._budget = self._max_num_batched_tokens
        num_preemptions = self.num_preemptions
        self._schedule_decodes()
        self._schedule_prefills()
        if self.num_preemptions == num_preemptions:
            self._admit_waiting()
        seqs = [seq for seq in self.running if seq.seq_id in self._scheduled]
        if seqs or not (self.waiting or self.running):
            self._num_stalls = 0
        else:
            self._num_stalls += 1
        if self.waiting:
            self._prefetch(self.waiting[0])
        failed, self._failed = self._failed, []
        return ScheduledBatch(seqs, [self._scheduled[seq.seq_id] for seq in seqs], failed)

    def complete(self, batch: ScheduledBatch) -> None:
        """Note that a step computed its tokens."""
        for seq, num_new_tokens in zip(batch.seqs, batch.num_new_tokens, strict=True):
            seq.num_computed_tokens += num_new_tokens

    def release(self, finished: list[Sequence]) -> None:
        """Take ended sequences off the queues and free their KV."""
        running = [seq for seq in finished if seq in self.running]
        if running:
            self._backend.free([seq.seq_id for seq in running])
            self.running = [seq for seq in self.running if not seq.is_finished]
        if len(running) < len(finished):
            self.waiting = deque(seq for seq in self.waiting if not seq.is_finished)
        if self._failed:
            self._failed = [seq for seq in self._failed if seq not in finished]

    def _schedule_tokens(self, seq: Sequence, num_new_tokens: int) -> None:
        self._scheduled[seq.seq_id] = num_new_tokens
        self._budget -= num_new_tokens

    def _schedule_decodes(self) -> None:
        ready = [seq for seq in self.running if seq.num_uncomputed_tokens == 1]
        while ready:
            if self._try_extend(ready):
                break
            if self._can_wait():
                ready = [seq for seq in ready if self._try_extend([seq])]
                break
            victim = self._evict_latest()
            ready = [seq for seq in ready if seq is not victim]
        for seq in ready:
            self._schedule_tokens(seq, 1)

    def _try_extend(self, seqs: list[Sequence]) -> bool:
        return self._backend.try_extend(
            [seq.seq_id for seq in seqs], [len(seq.token_ids) for seq in seqs]
        )

    def _schedule_prefills(self) -> None:
        for seq in [seq for seq in self.running if seq.num_uncomputed_tokens > 1]:
            while seq.status is SequenceStatus.RUNNING and self._budget > 0:
                num_new_tokens = min(seq.num_uncomputed_tokens, self._budget)
                total = seq.num_computed_tokens + num_new_tokens
                if self._backend.try_extend([seq.seq_id], [total]):
                    self._schedule_tokens(seq, num_new_tokens)
                    break
                if self._can_wait():
                    break
                self._evict_latest()

    def _can_wait(self) -> bool:
        """Whether pages come back when this step ends, so that nothing need be evicted."""
        if self._num_stalls >= MAX_STALLS:
            return False
        if self._backend.stats().retired_pages > 0:
            return True
        # Alone and within the pool's size: a passing shortage of the host, not of the pool.
        alone = self.running[0] if len(self.running) == 1 else None
        return alone is not None and alone.num_tokens <= self._backend.max_seq_tokens()

    def _evict_latest(self) -> Sequence:
        """Take the KV of the sequence that arrived last; alone, it ends with an error."""
        victim = max(self.running, key=lambda seq: seq.seq_id)
        self.running.remove(victim)
        self._budget += self._scheduled.pop(victim.seq_id, 0)
        self._backend.free([victim.seq_id])
        if not self.running:
            self._fail(victim, "ran out of KV memory with nothing left to preempt")
            return victim
        self.num_preemptions += 1
        self.num_preempted_tokens += victim.num_computed_tokens
        victim.metrics.num_preemptions += 1
        logger.info(
            "preempted request %s: %d computed tokens dropped, %d sequences still running",
            victim.request_id,
            victim.num_computed_tokens,
            len(self.running),
        )
        victim.num_computed_tokens = 0
        victim.status = SequenceStatus.WAITING
        self.waiting.appendleft(victim)
        return victim

    def _admit_waiting(self) -> None:
        while self.waiting and len(self.running) < self._max_num_seqs and self._budget > 0:
            seq = self.waiting[0]
            if self._rows_needed(seq) > self._backend.max_seq_tokens():
                self._fail(self.waiting.popleft(), "does not fit the KV cache")
                continue
            if self.running and not self._backend.can_admit(self._rows_to_readmit(seq)):
                break
            num_new_tokens = min(seq.num_tokens, self._budget)
            group = SequenceGroupSpec((seq.seq_id,), num_new_tokens)
            if self._backend.try_admit(group) is None:
                if self.running or self._num_stalls < MAX_STALLS:
                    break
                self._fail(self.waiting.popleft(), "found no KV memory although nothing runs")
                self._num_stalls = 0
                continue
            self.waiting.popleft()
            seq.status = SequenceStatus.RUNNING
            self.running.append(seq)
            self._schedule_tokens(seq, num_new_tokens)

    @staticmethod
    def _rows_needed(seq: Sequence) -> int:
        """Rows without which it cannot make one more token than it has, and be read again."""
        is_last = seq.num_output_tokens + 1 >= seq.max_tokens
        return seq.num_tokens + (0 if is_last else 1)

    def _rows_to_readmit(self, seq: Sequence) -> int:
        if seq.metrics.num_preemptions == 0:
            return seq.num_tokens
        return seq.num_tokens + READMIT_HEADROOM_TOKENS * len(self.running)

    def _fail(self, seq: Sequence, what: str) -> None:
        config = self._backend.config
        seq.error = (
            f"request {seq.request_id} {what}: it has {seq.num_tokens} tokens, and the cap of "
            f"{config.capacity_bytes} bytes holds {self._backend.max_seq_tokens()} of one sequence"
        )
        seq.finish("error")
        self._failed.append(seq)

    def _prefetch(self, seq: Sequence) -> None:
        self._backend.prefetch(min(seq.num_tokens, self._max_num_batched_tokens))
