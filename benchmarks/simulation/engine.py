"""The engine with its model left out: the real scheduler, groups and KV cache, step by step.

Owns: the requests that did not end yet.  Thread-safety: none; one thread.

What ``LLMEngine.step`` does in which order is done here in the same order, and
``tests/benchmarks/test_simulate.py`` holds the two against each other. Left out are the forward
pass and sampling: a sequence ends where its ``max_tokens`` say, and no logits are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vmalloc.backend import KVBackend
from vmalloc.engine.sampling_params import SamplingParams
from vmalloc.engine.schedule import ScheduledBatch
from vmalloc.engine.scheduler import Scheduler
from vmalloc.engine.sequence import Sequence
from vmalloc.engine.sequence_group import SequenceGroup

from .clock import DriverTime, SimulatedClock
from .models import StepWork


class Served(Protocol):
    """What a trace can be replayed on."""

    @property
    def has_unfinished(self) -> bool: ...

    def add(self, idx: int, prompt: list[int], num_output_tokens: int, width: int) -> None:
        """Queue request number ``idx``."""
        ...

    def step(self) -> None: ...


@dataclass(slots=True)
class Step:
    """What one step was.

    Attributes:
        batch: what it computed.
        compute_s: time of the device.
        stall_s: time of driver calls and copies that the device waited for.
        worker_s: time that the worker was busy meanwhile.
        first_tokens: groups that got their first token.
        ended: groups that ended.
    """

    batch: ScheduledBatch
    compute_s: float
    stall_s: float
    worker_s: float
    first_tokens: list[SequenceGroup]
    ended: list[SequenceGroup]


class SimulatedEngine:
    """Scheduler and cache as an ``LLMEngine`` has them; time passes as ``step_seconds`` says.

    Args:
        scheduler: over ``backend``, with ``clock``.
        step_seconds: time of the device for a step that is not empty.
        next_token: the token that a sequence writes. None: ones that no prompt has, other ones for
            each sequence of a request.
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
        self.clock = clock
        self.driver = driver
        self._step_seconds = step_seconds
        self._next_token = next_token or _made_up_token
        self._num_seqs = 0
        self._params: dict[int, SamplingParams] = {}

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def add(self, idx: int, prompt: list[int], num_output_tokens: int, width: int = 1) -> None:
        """Queue a request, named by its number."""
        params = self._params.get(width)
        if params is None:
            params = self._params[width] = SamplingParams(n=width)
        root = Sequence(self._new_seq_id(), str(idx), prompt, params, max_tokens=num_output_tokens)
        self.scheduler.add(SequenceGroup(root, arrival_idx=idx + 1, arrival_time=self.clock()))

    def step(self) -> Step:
        """One step, and the time it takes."""
        copied_s = self.clock.swap_seconds()
        batch = self.scheduler.schedule()
        copied_s = self.clock.swap_seconds() - copied_s
        kv_step = self.backend.begin_step()
        work = work_of(batch)
        started = self.clock()
        if work is not None:
            self.clock.advance(self._step_seconds(work))
        compute_s = self.clock() - started
        self.backend.end_step(kv_step)
        stall_s = self.driver.take_stall_seconds()
        self.clock.advance(stall_s)
        worker_s = self.driver.run_worker(compute_s)
        step = Step(batch, compute_s, stall_s + copied_s, worker_s, [], list(batch.failed))
        if work is not None:
            self._write(step)
            if work.num_tokens > len(batch.seqs):
                self.scheduler.cost.observe_prefill(work.num_tokens, compute_s)
        return step

    def _write(self, step: Step) -> None:
        """Give every sequence whose end was computed its next token, as ``Generation`` does."""
        self.scheduler.complete(step.batch)
        changed = []
        for part in step.batch.groups:
            group = part.group
            ends = [seq for seq in part.seqs if seq.num_uncomputed_tokens == 0]
            if not ends:
                continue
            if group.metrics.first_token_time is None:
                group.metrics.first_token_time = self.clock()
                step.first_tokens.append(group)
            if not group.is_expanded:
                group.expand(self._new_seq_id)
                ends = group.active
            has_ended = False
            for seq in ends:
                seq.token_ids.append(self._next_token(seq))
                if seq.num_output_tokens >= seq.max_tokens:
                    seq.finish("length")
                    has_ended = True
            if has_ended:
                changed.append(group)
        if changed:
            self.scheduler.release(changed)
            step.ended.extend(group for group in changed if group.is_finished)

    def _new_seq_id(self) -> int:
        self._num_seqs += 1
        return self._num_seqs - 1


def work_of(batch: ScheduledBatch) -> StepWork | None:
    """What a batch makes the device do; None if it is empty. Between schedule and complete."""
    if not batch.seqs:
        return None
    num_tokens = sum(batch.num_new_tokens)
    context = sum([seq.num_rows for seq in batch.seqs])
    if num_tokens == len(batch.seqs):
        return StepWork(num_tokens, num_tokens, context, context)
    num_logits, pairs = len(batch.seqs), context
    for seq, count in zip(batch.seqs, batch.num_new_tokens, strict=True):
        if count > 1:
            if seq.num_rows < len(seq.token_ids):
                num_logits -= 1
            before = seq.num_rows - count
            pairs += count * before + count * (count + 1) // 2 - seq.num_rows
    return StepWork(num_tokens, num_logits, context, pairs)


def _made_up_token(seq: Sequence) -> int:
    return -1 - seq.choice_idx
