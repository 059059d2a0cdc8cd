"""Exceptions of the engine, under the library's ``VmallocError``.

Owns: nothing.  Thread-safety: immutable classes.
"""

from __future__ import annotations

from ..errors import ConfigError, VmallocError


class UnsupportedModelError(VmallocError):
    """A model that the load probe refused. The text names the check that failed and why.

    Attributes:
        model: class or path of the model.
        check: short name of the failed check, e.g. ``"attention calls"``.
        reason: what was expected and what was seen.
    """

    def __init__(self, model: str, check: str, reason: str) -> None:
        self.model = model
        self.check = check
        self.reason = reason
        super().__init__(f"{model} is not supported: {check}: {reason}")


class QueueFullError(VmallocError):
    """Too many requests wait already. Nothing was queued; trying again later may work.

    Attributes:
        num_queued: requests that wait.
        limit: most that may.
        retry_after_s: a guess at when there will be room.
    """

    def __init__(self, num_queued: int, limit: int, retry_after_s: float) -> None:
        self.num_queued = num_queued
        self.limit = limit
        self.retry_after_s = retry_after_s
        super().__init__(
            f"{num_queued} requests are queued; the limit is {limit} (max_queued_requests)"
        )


class EngineUnavailableError(VmallocError):
    """The engine takes no requests now, or lost the one that waits for it.

    Attributes:
        state: ``"starting"``, ``"sleeping"``, ``"draining"``, ``"stopped"`` or ``"dead"``.
        retry_after_s: when to try again; None where that will not help.
    """

    def __init__(self, state: str, reason: str, retry_after_s: float | None = None) -> None:
        self.state = state
        self.retry_after_s = retry_after_s
        super().__init__(reason)


class RequestTimeoutError(VmallocError):
    """A request was aborted because it took too long.

    Attributes:
        kind: ``"queue"`` if it never started, else ``"request"``.
        seconds: the limit it exceeded.
    """

    def __init__(self, kind: str, seconds: float) -> None:
        self.kind = kind
        self.seconds = seconds
        what = "did not start" if kind == "queue" else "did not end"
        super().__init__(f"the request {what} within {seconds:g} seconds ({kind} timeout)")


class RequestAbortedError(VmallocError):
    """A request was aborted by name, by somebody else than its reader."""


class RankLostError(VmallocError):
    """A rank of a tensor-parallel engine ended, cannot be reached or is too far behind.

    Attributes:
        rank: which one; None if that is not known.
        reason: what happened to it, with the values and limits that matter.
    """

    def __init__(self, rank: int | None, reason: str) -> None:
        self.rank = rank
        self.reason = reason
        super().__init__(f"{'a rank' if rank is None else f'rank {rank}'} was lost: {reason}")


class RankMismatchError(ConfigError):
    """Ranks of a tensor-parallel engine differ in something that must be the same in all of them.

    Attributes:
        fact: what differs; the first of them if there are several.
    """

    def __init__(self, fact: str, text: str) -> None:
        self.fact = fact
        super().__init__(text)


class PlanVoidError(VmallocError):
    """A rank could not carry a plan out: no rank computes the step, and all start over."""
