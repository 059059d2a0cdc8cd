"""The engine with its model left out: the real scheduler, groups and KV cache, step by step.

Owns: the requests that did not end yet.  Thread-safety: none; one thread.

What ``LLMEngine.step`` does in which order is done here in the same order, and
``tests/benchmarks/test_simulate.py`` holds the two against each other. Left out are the forward
pass and sampling: a sequence ends where its ``max_tokens`` say, and no logits are looked at.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from vmalloc.backend import KVBackend
from vmalloc.engine.sampling_params import SamplingParams
from vmalloc.engine.schedule import ScheduledBatch, ScheduledGroup
from vmalloc.engine.scheduler import Scheduler
from vmalloc.engine.sequence import Sequence
from vmalloc.engine.sequence_group import SequenceGroup

from .clock import DriverTime, SimulatedClock
from .models import StepWork
from .page_edges import PageEdges


class Served(Protocol):
    """What a trace can be replayed on."""

    @property
    def has_unfinished(self) -> bool: ...

    def add(self, idx: int, prompt: list[int], num_output_tokens: int, width: int) -> None:
        """Queue request number ``idx``."""
        ...

    def step(self) -> object: ...


@dataclass(slots=True)
class Step:
    """What one step was, or several of which nothing but lengths changed.

    Attributes:
        batch: what it computed.
        work: the same for the device; None: it was empty.
        num_steps: how many in a row.
        compute_s: time of the device, for all of them.
        stall_s: time of driver calls that the device waited for.
        copy_s: time of copies to host memory and back.
        worker_s: time that the worker was busy meanwhile.
        first_tokens: groups that got their first token.
        ended: groups that ended.
    """

    batch: ScheduledBatch
    work: StepWork | None
    num_steps: int = 1
    compute_s: float = 0.0
    stall_s: float = 0.0
    copy_s: float = 0.0
    worker_s: float = 0.0
    first_tokens: list[SequenceGroup] = field(default_factory=list)
    ended: list[SequenceGroup] = field(default_factory=list)


class SimulatedEngine:
    """Scheduler and cache as an ``LLMEngine`` has them; time passes as ``step_seconds`` says.

    Args:
        scheduler: over ``backend``, with ``clock``.
        step_seconds: time of the device for a step that is not empty.
        next_token: the token that a sequence writes. None: ones that no prompt has, a different
            one for each sequence of a request.

    Attributes:
        driver: what its driver calls cost.
        host_s: processor time that scheduling and bookkeeping took on this machine.
    """

    def __init__(
        self,
        backend: KVBackend,
        scheduler: Scheduler,
        clock: SimulatedClock,
        driver: DriverTime,
        step_seconds: Callable[[StepWork], float],
        next_token: Callable[[Sequence], int] | None = None,
    ) -> None:
        self.backend = backend
        self.scheduler = scheduler
        self.host_s = 0.0
        self._clock = clock
        self.driver = driver
        self._step_seconds = step_seconds
        self._next_token = next_token
        self._edges = PageEdges(backend)
        self._num_seqs = 0
        self._params: dict[int, SamplingParams] = {}
        # Decodes so far; in which of them a sequence may end that is in every one until then.
        self._num_decodes = 0
        # Groups whose prefill is under way. Its last token may come as a decode.
        self._partial: dict[SequenceGroup, None] = {}
        self._due: defaultdict[int, list[tuple[SequenceGroup, Sequence]]] = defaultdict(list)
        self._last: Step | None = None
        self._num_quiet = 0  # steps in a row that changed nothing but lengths

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def add(self, idx: int, prompt: list[int], num_output_tokens: int, width: int = 1) -> None:
        """Queue a request, named by its number."""
        params = self._params.get(width)
        if params is None:
            params = self._params[width] = SamplingParams(n=width)
        root = Sequence(self._new_seq_id(), str(idx), prompt, params, max_tokens=num_output_tokens)
        self.scheduler.add(SequenceGroup(root, arrival_idx=idx + 1, arrival_time=self._clock()))
        self._num_quiet = 0

    def step(self) -> Step:
        """One step, and the time it takes."""
        host_started = time.thread_time()
        copied_s = self._clock.swap_seconds()
        batch = self.scheduler.schedule()
        step = Step(batch, work_of(batch), copy_s=self._clock.swap_seconds() - copied_s)
        kv_step = self.backend.begin_step()
        started = self._clock()
        if step.work is not None:
            self._clock.advance(self._step_seconds(step.work))
        step.compute_s = self._clock() - started
        self.backend.end_step(kv_step)
        self.host_s += time.thread_time() - host_started
        step.stall_s = self.driver.take_stall_seconds()
        self._clock.advance(step.stall_s)
        step.worker_s = self.driver.run_worker(step.compute_s)
        for group in batch.failed:
            self._partial.pop(group, None)
            step.ended.append(group)
        if step.work is not None:
            host_started = time.thread_time()
            self.scheduler.complete(batch)
            self.host_s += time.thread_time() - host_started
            self._write(step)
            if step.work.num_tokens > len(batch.seqs):
                self.scheduler.cost.observe_prefill(step.work.num_tokens, step.compute_s)
        self._last = step
        self._num_quiet = self._num_quiet + 1 if self._is_quiet(step) else 0
        return step

    def try_skip(self, until_s: float) -> Step | None:
        """All the steps at once that are like the last one but for lengths; None: the next is not.

        None of them starts at ``until_s`` or later, when there is something new to look at.
        """
        last = self._last
        # What a step leaves, such as the slot of an ended sequence, the next one may take up.
        if self._num_quiet < 2 or last is None or last.work is None:
            return None
        seqs = last.batch.seqs
        limit = self._edges.rows_left(np.array([seq.num_rows for seq in seqs], np.int64))
        left = min([seq.max_tokens - seq.num_output_tokens for seq in seqs])
        limit = min(limit, left - 1)  # the one that ends a sequence is not like the last
        skipped = Step(last.batch, last.work, num_steps=0)
        while skipped.num_steps < limit and self._clock() < until_s:
            skipped.num_steps += 1
            work = _grown(last.work, skipped.num_steps)
            started = self._clock()
            self._clock.advance(self._step_seconds(work))
            skipped.compute_s += self._clock() - started
            skipped.work = work
        if skipped.num_steps == 0:
            return None
        self._grow(seqs, skipped.num_steps)
        self._last = Step(last.batch, skipped.work)
        return skipped

    def _is_quiet(self, step: Step) -> bool:
        """Whether lengths alone changed, as far as a step shows it."""
        batch = step.batch
        return bool(
            batch.seqs
            and batch.num_decodes == len(batch.seqs) == self.scheduler.stats().num_running_seqs
            and not (step.ended or step.first_tokens)
            and self.driver.is_idle
            and all(part.group.width == 1 for part in batch.groups)
        )

    def _grow(self, seqs: list[Sequence], num_steps: int) -> None:
        totals = [seq.num_rows + num_steps for seq in seqs]
        if not self.backend.try_extend([seq.seq_id for seq in seqs], totals):
            raise RuntimeError("rows without a new page found no memory: a bug in this simulation")
        for seq, total in zip(seqs, totals, strict=True):
            seq.num_rows = seq.num_computed_tokens = total
            for _ in range(num_steps):
                self._append(seq)
        self.scheduler.skip_steps(num_steps)
        first, self._num_decodes = self._num_decodes + 1, self._num_decodes + num_steps
        for idx in range(first, self._num_decodes + 1):
            for group, seq in self._due.pop(idx, ()):  # it waited for a while, and ends later
                self._note_due(group, seq)

    def _write(self, step: Step) -> None:
        """Give every sequence whose end was computed its next token, as ``Generation`` does."""
        batch = step.batch
        changed: dict[SequenceGroup, None] = {}
        decoding, prefilling = self._split(batch)
        next_token = self._next_token
        if next_token is None:
            for seq in decoding:  # there may be thousands
                seq.token_ids.append(-1 - seq.choice_idx)
        else:
            for seq in decoding:
                seq.token_ids.append(next_token(seq))
        self._num_decodes += 1
        for part in prefilling:
            if self._write_first(part, step):
                changed[part.group] = None
        self._finish_due(changed)
        if changed:
            groups = [part.group for part in batch.groups if part.group in changed]
            self.scheduler.release(groups)
            step.ended += [group for group in groups if group.is_finished]

    def _split(self, batch: ScheduledBatch) -> tuple[list[Sequence], list[ScheduledGroup]]:
        """Sequences that wrote before and write again; the parts of the other groups."""
        seqs = batch.seqs[: batch.num_decodes]
        prefilling: list[ScheduledGroup] = []
        num_seqs = len(batch.seqs)
        for part in reversed(batch.groups):  # those that prefill stand last
            if num_seqs <= batch.num_decodes:
                break
            num_seqs -= len(part.seqs)
            prefilling.append(part)
        prefilling.reverse()
        others = {part.group for part in prefilling}
        ending = [group for group in self._partial if group not in others and _is_computed(group)]
        if ending:
            parts = [part for part in batch.groups if part.group in ending]
            ended = {seq.seq_id for part in parts for seq in part.seqs}
            seqs = [seq for seq in seqs if seq.seq_id not in ended]
            prefilling = parts + prefilling
        return seqs, prefilling

    def _finish_due(self, changed: dict[SequenceGroup, None]) -> None:
        """Finish the sequences that got their last token by a decode, and note their groups."""
        for group, seq in self._due.pop(self._num_decodes, ()):
            if seq.num_output_tokens > seq.max_tokens:
                raise RuntimeError(f"{seq} was not ended in time: a bug in this simulation")
            if seq.num_output_tokens == seq.max_tokens:
                seq.finish("length")
                changed[group] = None
            else:  # it was not in every one of them
                self._note_due(group, seq)

    def _write_first(self, part: ScheduledGroup, step: Step) -> bool:
        """After a prefill: the first token, or the next one since it was preempted.

        True if it was the last.
        """
        group, ends = part.group, [seq for seq in part.seqs if seq.num_uncomputed_tokens == 0]
        if not ends:
            self._partial[group] = None
            return False
        self._partial.pop(group, None)
        if group.metrics.first_token_time is None:
            group.metrics.first_token_time = self._clock()
            step.first_tokens.append(group)
        if not group.is_expanded:
            group.expand(self._new_seq_id)
            ends = group.active
        is_new = group in step.first_tokens
        for seq in ends:
            self._append(seq)
            if seq.num_output_tokens >= seq.max_tokens:
                seq.finish("length")
            elif is_new:
                self._note_due(group, seq)
        return any(seq.is_finished for seq in ends)

    def _append(self, seq: Sequence) -> None:
        if self._next_token is None:
            seq.token_ids.append(-1 - seq.choice_idx)
        else:
            seq.token_ids.append(self._next_token(seq))

    def _note_due(self, group: SequenceGroup, seq: Sequence) -> None:
        due = self._num_decodes + seq.max_tokens - seq.num_output_tokens
        self._due[due].append((group, seq))

    def _new_seq_id(self) -> int:
        self._num_seqs += 1
        return self._num_seqs - 1


def work_of(batch: ScheduledBatch) -> StepWork | None:
    """What a batch makes the device do; None if it is empty. Between schedule and complete."""
    if not batch.seqs:
        return None
    context = sum([seq.num_rows for seq in batch.seqs])
    work = StepWork(sum(batch.num_new_tokens), len(batch.seqs), context, context)
    first = batch.num_decodes
    for seq, count in zip(batch.seqs[first:], batch.num_new_tokens[first:], strict=True):
        if seq.num_rows < len(seq.token_ids):
            work.num_logits -= 1
        before = seq.num_rows - count
        work.attended_pairs += count * before + count * (count + 1) // 2 - seq.num_rows
    return work


def _grown(work: StepWork, num_steps: int) -> StepWork:
    """A decode that comes so many steps later."""
    more = num_steps * work.num_tokens
    return StepWork(
        work.num_tokens, work.num_logits, work.context_tokens + more, work.attended_pairs + more
    )


def _is_computed(group: SequenceGroup) -> bool:
    return any(seq.num_uncomputed_tokens == 0 for seq in group.active)
