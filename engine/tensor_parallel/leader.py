"""Rank 0's part in computing with others: it decides, tells them, and asks whether they could.

Owns: the group of ranks, and what is known of the time they take.
Thread-safety: none; one engine thread.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.distributed import DistError

from ...errors import InvariantError, VmallocError
from ...plans import Ledger, PlanningKVCache, RankCache, take_ledger
from ..assembly import EngineParts
from ..errors import PlanVoidError, RankLostError
from ..packed_batch import PackedBatch
from .agreement import agree
from .facts import settings_facts
from .messages import Audit, Batch, Grant, Message, Report, Reset, RunStep, Sleep, Stop, Trim, Wake
from .messages import encode as encode_message
from .rank_group import RankGroup
from .rank_report import RankReport
from .rank_share import forget_groups

logger = logging.getLogger(__name__)

MAX_VOID_PLANS = 3
"""Plans in a row that a rank may fail to carry out before it counts as broken."""


@dataclass(slots=True)
class PlanTimes:
    """Where rank 0's time went so far, beside computing.

    Attributes:
        num_steps: steps that all ranks computed.
        num_bytes: of the messages of these steps.
        send_s: handing plans over.
        wait_s: waiting for the votes, so for the rank that was last with its share of the plan.
        lag_s: by how much the slowest rank ended the computations before later than rank 0 did,
            where it did.
        num_grants: rounds in which pages were granted.
        grant_s: waiting in these.
        num_void: plans that a rank could not carry out.
    """

    num_steps: int = 0
    num_bytes: int = 0
    send_s: float = 0.0
    wait_s: float = 0.0
    lag_s: float = 0.0
    num_grants: int = 0
    grant_s: float = 0.0
    num_void: int = 0


class RankLeader:
    """What an engine on rank 0 needs of the other ranks.

    Args:
        group: the ranks, which have loaded their shares and are being assembled.

    Attributes:
        times: where time goes.
        failure: what ended it, or None.
    """

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self._planner: PlanningKVCache | None = None
        self._own: RankCache | None = None
        self._computed_ns = 0
        self._num_void = 0
        self._slept_with = 0  # pages granted before a sleep
        self.times = PlanTimes()
        self.failure: RankLostError | None = None

    @property
    def size(self) -> int:
        """Ranks, this one included."""
        return self._group.size

    def least(self, values: Sequence[int]) -> list[int]:
        """The smallest of what the ranks have of each of some numbers; all of them call it."""
        with self.explaining():
            return self._group.channel.least(values)

    def attach(self, parts: EngineParts) -> PlanningKVCache:
        """Lead the engine that ``parts`` make; the cache that it is to use.

        Raises ``RankMismatchError`` if the ranks came to different parts, and ``ConfigError`` if
        one has no memory; the parts are given back then.
        """
        try:
            with self.explaining():
                agree(self._group.channel, settings_facts(parts))
            self._own = RankCache(parts.backend)
            planner = self._planner = PlanningKVCache(parts.backend, self)
            planner.begin()
        except BaseException:
            parts.runner.close()
            parts.backend.close()
            parts.lease.give_back()
            raise
        parts.runner.leader = self
        return planner

    def end_with(self, owner: object, model: torch.nn.Module) -> None:
        """End the other ranks when ``owner`` is collected, if nobody closed it before."""
        weakref.finalize(owner, _end, self._group, model).atexit = False  # the group sees to that

    def check(self) -> None:
        """Raise what ended the ranks, or would: one of them is gone."""
        if self.failure is not None:
            raise self.failure
        with self.explaining():
            self._group.check()

    def lead(self, batch: PackedBatch) -> None:
        """Have every rank do what was done to the cache here, and get ready to compute ``batch``.

        Raises ``PlanVoidError`` if one cannot: then none computes it, and ``recover`` is due.
        """
        planner = self._attached
        self.check()
        if planner.is_broken:
            raise PlanVoidError("a call to rank 0's KV cache failed half-way")
        started = time.monotonic()
        with self.explaining():
            message = encode_message(RunStep(planner.take_plan(), Batch.of(batch)))
            self._group.channel.send(message)
            sent = time.monotonic()
            is_possible, ends = self._group.channel.least([1, -self._computed_ns])
        if not is_possible:
            raise PlanVoidError("another rank could not carry out the plan of a step")
        times = self.times
        times.num_steps += 1
        times.num_bytes += len(message)
        times.send_s += sent - started
        times.wait_s += time.monotonic() - sent
        times.lag_s += (-ends - self._computed_ns) * 1e-9
        self._num_void = 0

    @contextmanager
    def computing(self) -> Iterator[None]:
        """While all ranks compute: what fails here has failed for all of them."""
        with self.explaining():
            yield
        self._computed_ns = time.monotonic_ns()

    def flush(self) -> None:
        """Tell the others what they were not told yet, without anything to compute."""
        planner = self._attached
        if planner.is_broken or not planner.has_plan:
            return
        with self.explaining():
            self._send(RunStep(planner.take_plan(), None))

    def recover(self) -> None:
        """Have all ranks without any sequence, after a plan that one could not carry out.

        To be called once rank 0 has dropped its own. Raises ``RankLostError`` if it is the last of
        ``MAX_VOID_PLANS`` in a row.
        """
        planner = self._attached
        planner.forget_everything()
        self.times.num_void += 1
        self._num_void += 1
        with self.explaining():
            self._send(Reset(planner.stats().capacity_bytes))
            answers = self._group.channel.gather(b"")
            self._group.channel.least([1])
        reasons = {rank: answer.decode() for rank, answer in enumerate(answers) if answer}
        text = "; ".join(f"rank {rank}: {reason}" for rank, reason in reasons.items())
        logger.warning("a plan took effect on no rank, what it ran is computed again: %s", text)
        if self._num_void >= MAX_VOID_PLANS:
            rank = next(iter(reasons), None)
            self._fail(RankLostError(rank, f"{self._num_void} plans in a row failed: {text}"))

    def try_grant(self, num_pages: int) -> bool:
        """See ``PageGrants``."""
        own, before = self._cache, self._attached.granted_pages
        started = time.monotonic()
        with self.explaining():
            self._send(Grant(num_pages, before))
            is_granted = own.try_grant(num_pages)
            is_everywhere = bool(self.least([int(is_granted)])[0])
            own.end_grant(num_pages if is_everywhere else before, keeps_pages=is_everywhere)
        self.times.num_grants += 1
        self.times.grant_s += time.monotonic() - started
        return is_everywhere

    def trim(self, keep_free_pages: int) -> int:
        """See ``PageGrants``."""
        self.flush()
        with self.explaining():
            self._send(Trim(keep_free_pages))
            num_trimmed = self._cache.trim(keep_free_pages)
            self._note_created()
        return num_trimmed

    def try_sleep(self) -> bool:
        """See ``PageGrants``."""
        self.flush()
        with self.explaining():
            self._send(Sleep())
            is_asleep = self._cache.cache.try_sleep()
            is_everywhere = bool(self.least([int(is_asleep)])[0])
            if is_everywhere:
                self._slept_with = self._attached.granted_pages
            elif is_asleep and not self._cache.cache.try_wake():
                raise VmallocError("rank 0 cannot wake from a sleep that another could not begin")
            self._note_created()
        return is_everywhere

    def try_wake(self) -> bool:
        """See ``PageGrants``."""
        # What was granted before is enough for what slept; no rank begins where one has less.
        if self._slept_with > 0:
            if not self.try_grant(self._slept_with):
                return False
            self._attached.note_grant(self._slept_with)
        with self.explaining():
            self._send(Wake())
            is_awake = self._cache.cache.try_wake()
            if self.least([int(is_awake)])[0]:
                self._slept_with = 0
                return True
            if is_awake and not self._cache.cache.try_sleep():
                raise VmallocError("rank 0 cannot sleep again while another has no memory to wake")
            self._note_created()
        return False

    def reports(self) -> list[RankReport]:
        """How every rank's memory is, in rank order."""
        self.flush()
        own = RankReport.of(0, self._cache.cache).encode()
        with self.explaining():
            self._send(Report())
            answers = self._group.channel.gather(own)
        return [RankReport.decode(answer) for answer in answers]

    def ledgers(self) -> list[Ledger]:
        """What every rank's cache holds, in rank order, once its books were checked.

        Raises ``ConfigError`` while they sleep, and ``InvariantError`` if rank 0's books are wrong.
        """
        self.flush()
        self._cache.cache.check_invariants()  # before the others wait for it
        own = take_ledger(self._cache.cache).encode()
        with self.explaining():
            self._send(Audit())
            answers = self._group.channel.gather(own)
        return [Ledger.decode(answer) for answer in answers]

    def check_ledgers(self) -> None:
        """Raise ``InvariantError`` unless the ledgers of all ranks are equal page for page."""
        first, *others = self.ledgers()
        for rank, ledger in enumerate(others, start=1):
            differences = first.differences(ledger)
            if differences:
                raise InvariantError(
                    f"the KV cache of rank {rank} differs from that of rank 0: {differences[0]}"
                )

    def close(self, model: torch.nn.Module | None = None) -> None:
        """End the other ranks; ``model``, which they share, is of no use then. Idempotent."""
        if self.failure is None:
            try:
                self._group.channel.send(encode_message(Stop()))
            except VmallocError as error:  # it is gone, or was closed already
                logger.debug("a rank could not be told to stop: %s", error)
        self._group.close()
        if model is not None:
            forget_groups(model)

    @property
    def _attached(self) -> PlanningKVCache:
        assert self._planner is not None
        return self._planner

    @property
    def _cache(self) -> RankCache:
        assert self._own is not None
        return self._own

    def _note_created(self) -> None:
        """Agree on a grant that every rank has the pages of."""
        (granted,) = self.least([self._cache.num_created])
        self._cache.keep(granted)
        self._attached.note_grant(granted)

    def _send(self, message: Message) -> None:
        self.check()
        with self.explaining():
            self._group.channel.send(encode_message(message))

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """What goes wrong between ranks cannot be mended: say why, end them all."""
        try:
            yield
        except BaseException as error:
            if self.failure is not None:
                raise
            if _is_between_ranks(error):
                self._fail(self._group.explain(error), error)
            reason = f"it left the others in the middle of something: {error!r}"
            self.failure = RankLostError(0, reason)
            self._group.close(0.0)
            raise

    def _fail(self, failure: RankLostError, cause: BaseException | None = None) -> None:
        self.failure = failure
        self._group.close(0.0)
        raise failure from cause


def _end(group: RankGroup, model: torch.nn.Module) -> None:
    group.close(0.0)
    forget_groups(model)


def _is_between_ranks(error: BaseException | None) -> bool:
    """Whether an error, or what lies behind it, is one of an exchange with other ranks."""
    while error is not None:
        if isinstance(error, RankLostError | DistError) or "gloo" in str(error):
            return True
        error = error.__cause__
    return False
