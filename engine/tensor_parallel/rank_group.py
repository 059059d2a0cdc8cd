"""The ranks of one engine, as rank 0 holds them: started together, watched, ended together.

Rank 0 is the process that this runs in; the others are its children on the same host.

Owns: the child processes, the store where the ranks meet, and torch's process groups.
Thread-safety: ``check`` from any thread, the rest from one at a time.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import time
import traceback
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ...errors import ClosedError, ConfigError
from ..config import DEFAULT_RANK_TIMEOUT_S, MAX_PORT, MAX_RANK_TIMEOUT_S
from ..errors import RankLostError
from .rank_channel import RankChannel, first_sentence
from .rank_join import (
    RankReport,
    abort_device_groups,
    check_devices,
    has_come,
    host_store,
    is_consequence,
    join_ranks,
    leave_ranks,
    read_report,
)
from .rank_main import START_TIMEOUT_S
from .rank_processes import RankEnd, RankProcesses

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store, TCPStore

DEFAULT_ENTRY = "vmalloc.engine.tensor_parallel.follower:follow"
MAX_RANKS = 1_024

CLOSE_GRACE_S = 5.0
_EXPLAIN_S = 2.0
"""Longest wait for the end of a process whose connection has broken."""

_SECOND_END_S = 0.5
_START_POLL_S = 0.02


class RankGroup:
    """Rank 0's hold on the other ranks. A context manager; ``start`` makes one.

    Attributes:
        size: how many ranks there are, with this one.
        port: TCP port on the loopback interface where they met.
        device: where this rank computes.
        channel: the line to the other ranks.
    """

    channel: RankChannel

    def __init__(
        self, size: int, *, device: str, entry: str, port: int | None, timeout_s: float
    ) -> None:
        self.size = size
        self.timeout_s = timeout_s
        self._pid = os.getpid()
        self._channel: RankChannel | None = None
        self._processes: RankProcesses | None = None
        self._is_closed = False
        self._num_threads = torch.get_num_threads()
        self._store: TCPStore | None = host_store(port, START_TIMEOUT_S)
        self.port = self._store.port
        try:
            self._start(device, entry)
        except BaseException as error:
            is_lost = isinstance(error, (RuntimeError, RankLostError))
            explained = self.explain(error) if is_lost else None
            traceback.clear_frames(error.__traceback__)
            self.close(0.0)
            if explained is not None and explained is not error:
                raise explained from None
            raise
        atexit.register(self.close, 0.0)

    @classmethod
    def start(
        cls,
        size: int,
        *,
        device: str,
        entry: str = DEFAULT_ENTRY,
        port: int | None = None,
        timeout_s: float = DEFAULT_RANK_TIMEOUT_S,
    ) -> RankGroup:
        """Start ranks 1 to ``size - 1``, each calling ``entry`` with its channel, and join them.

        Args:
            size: ranks, this one included; at least 2.
            device: ``"cpu"``, or ``"cuda"``, where rank r computes on ``cuda:r``.
            entry: ``"module:function"``; the function is called with a ``RankChannel``.
            port: where to meet on the loopback interface; None: any port that is free.
            timeout_s: how far a rank may be behind the others.

        Raises ``ConfigError`` for what can never work here, and ``RankLostError`` if a rank ended
        or did not come; nothing is left of the others then.
        """
        _check(size, entry, port, timeout_s)
        check_devices(size, device)
        if not dist.is_available():
            raise ConfigError(
                f"tensor_parallel_size is {size}; torch {torch.__version__} was built without "
                "torch.distributed, so it must be 1"
            )
        if dist.is_initialized():
            raise ConfigError(
                f"tensor_parallel_size is {size}; torch.distributed is initialised in this process "
                f"already, with world size {dist.get_world_size()}; a process can hold one group "
                "of ranks"
            )
        return cls(size, device=device, entry=entry, port=port, timeout_s=timeout_s)

    def check(self) -> None:
        """Raise ``RankLostError`` if a rank has ended."""
        if self._processes is None:
            raise ClosedError("the ranks have been ended")
        ends = self._processes.ends
        if ends:
            raise self._lost(ends)

    def explain(self, error: BaseException) -> RankLostError:
        """What most likely lies behind a collective's ``error``; waits up to 2 s to find out.

        Empties the frames that the error came through: as long as somebody keeps it, they would
        keep the process groups' sockets open.
        """
        traceback.clear_frames(error.__traceback__)
        if self._processes is None:
            return _as_lost(error)
        is_late = isinstance(error, RankLostError) and "behind" in error.reason
        if self._processes.wait_end(0.0 if is_late else _EXPLAIN_S):
            return self._lost(self._processes.ends)
        stopped = self._stopped(_as_lost(error).reason)
        if stopped is None and "timed out" in str(error).lower():
            return RankLostError(
                None,
                f"it is behind: nothing came from it within {self.timeout_s:g} s "
                f"(tensor_parallel_timeout_s): {first_sentence(error)}",
            )
        return stopped or _as_lost(error)

    def close(self, grace_s: float = CLOSE_GRACE_S) -> None:
        """End the other ranks and take back everything that was set up. May be called again.

        Ranks that end by themselves have ``grace_s`` for it; an idle one does as soon as its
        connection closes, which is the first thing that happens here. The rest is terminated.
        """
        if self._is_closed or os.getpid() != self._pid:  # a forked child has no ranks
            return
        self._is_closed = True
        processes, self._processes = self._processes, None
        try:
            if processes is not None and (
                processes.stopped() or any(end.code != 0 for end in processes.ends)
            ):
                grace_s = 0.0
            channel, self._channel = self._channel, None
            leave_ranks(channel)
        finally:
            if processes is not None:
                processes.end(grace_s)
            self._store = None  # the last reference: the listening socket closes
            torch.set_num_threads(self._num_threads)
            atexit.unregister(self.close)

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, device: str, entry: str) -> None:
        assert self._store is not None
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, self._num_threads // self.size))
        self._processes = RankProcesses(
            self.size,
            self.port,
            ["--entry", entry, "--device", device, "--timeout-s", str(self.timeout_s)],
            num_threads=torch.get_num_threads(),
            on_loss=abort_device_groups,
        )
        self._wait_arrivals(self._store)
        self.channel = self._channel = join_ranks(
            self._store, 0, self.size, device=device, timeout_s=self.timeout_s
        )

    def _wait_arrivals(self, store: Store) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        missing = list(range(1, self.size))
        while missing:
            missing = [rank for rank in missing if not has_come(store, rank)]
            self.check()
            if missing and time.monotonic() > deadline:
                raise RankLostError(
                    missing[0], f"it did not come within {START_TIMEOUT_S:g} s of its start"
                )
            time.sleep(_START_POLL_S)

    def _lost(self, ends: list[RankEnd]) -> RankLostError:
        """The error for the rank whose end came first and was not just a consequence."""
        if all(self._is_consequence(end) for end in ends):
            time.sleep(_SECOND_END_S)
            ends = self._processes.ends if self._processes is not None else ends
        causes = [end for end in ends if not self._is_consequence(end)]
        if not causes:
            stopped = self._stopped(f"rank {ends[0].rank} has ended")
            if stopped is not None:
                return stopped
            causes = ends
        reported = self._reported(causes[0].rank)
        reason = str(causes[0]) if reported is None else f"{causes[0]}: {reported}"
        return RankLostError(causes[0].rank, reason)

    def _stopped(self, what: str) -> RankLostError | None:
        """The error for ranks whose processes are stopped, if there are any."""
        stopped = self._processes.stopped() if self._processes is not None else []
        if not stopped:
            return None
        return RankLostError(
            stopped[0],
            f"its process is stopped, and a rank may be {self.timeout_s:g} s behind "
            f"(tensor_parallel_timeout_s; stopped: {', '.join(map(str, stopped))}): {what}",
        )

    def _is_consequence(self, end: RankEnd) -> bool:
        reported = self._reported(end.rank)
        return end.code == 0 or (reported is not None and is_consequence(reported))

    def _reported(self, rank: int) -> RankReport | None:
        with contextlib.suppress(RuntimeError):  # a store that has closed
            return None if self._store is None else read_report(self._store, rank)
        return None


def _as_lost(error: BaseException) -> RankLostError:
    if isinstance(error, RankLostError):
        return error
    return RankLostError(
        None, f"an exchange between ranks failed: {type(error).__name__}: {first_sentence(error)}"
    )


def _check(size: int, entry: str, port: int | None, timeout_s: float) -> None:
    if not 2 <= size <= MAX_RANKS:
        raise ConfigError(f"a group of {size} ranks; it must have between 2 and {MAX_RANKS}")
    if entry.count(":") != 1 or not all(entry.split(":")):
        raise ConfigError(f"entry is {entry!r}; it must be 'module:function'")
    if port is not None and not 1 <= port <= MAX_PORT:
        raise ConfigError(f"tensor_parallel_port is {port}; it must be between 1 and {MAX_PORT}")
    if not 0.0 < timeout_s <= MAX_RANK_TIMEOUT_S:
        raise ConfigError(
            f"tensor_parallel_timeout_s is {timeout_s}; it must be above 0 and at most "
            f"{MAX_RANK_TIMEOUT_S:g}"
        )
