"""How the ranks of an engine talk beside the model: messages from rank 0, votes, answers.

Messages are bytes and votes are integers; nothing is ever unpickled. Every transfer is a direct
one between rank 0 and one other rank over gloo on the loopback interface, received into a buffer
that was handed over beforehand, so that a sender need not wait for a receiver that still computes.
Gloo's own broadcast takes about twice as long as that (an extra thread hop at each end), and does
not say which rank did not come.

Owns: the buffers and pending transfers of the control group.
Thread-safety: one thread at a time, the same order of calls in every rank.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from ...errors import ClosedError, ConfigError, InvariantError
from ..errors import RankLostError, RankMismatchError

FRAME_BYTES = 16 * 1024
"""What every message takes at least: a length and the message, or its beginning."""

MAX_MESSAGE_BYTES = 1 << 30
MAX_VOTES = 31
INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1

_HEADER = struct.Struct("<Q")
_FIRST_BYTES = FRAME_BYTES - _HEADER.size
_MESSAGE_TAG, _VOTE_TAG, _RESULT_TAG, _ANSWER_TAG, _REST_TAG = range(1, 6)
_EVER_S = 10 * 365 * 86_400.0  # a server may be idle for days
_NO_AGREEMENT = -1
_PATIENCE = 1.5
"""How much longer than rank 0 the others wait for it, which waits for the slowest of them."""


class _Buffer:
    """Memory that both Python and gloo see."""

    __slots__ = ("data", "tensor")

    def __init__(self, num_bytes: int) -> None:
        self.data = bytearray(num_bytes)
        self.tensor = torch.frombuffer(self.data, dtype=torch.uint8)


class RankChannel:
    """The ranks' line to each other: rank 0 in the middle, the same class at every end.

    Attributes:
        rank: which rank this is, from 0.
        size: how many there are.
        device: where this rank computes.
        timeout_s: how far a rank may be behind.
    """

    def __init__(self, group: dist.ProcessGroup, *, device: torch.device, timeout_s: float) -> None:
        self.rank = group.rank()
        self.size = group.size()
        self.device = device
        self.timeout_s = timeout_s
        self._group: dist.ProcessGroup | None = group
        self._peers = range(1, self.size) if self.rank == 0 else range(1)
        self._frame = _Buffer(FRAME_BYTES)
        self._vote = _Buffer(8 * (1 + MAX_VOTES))
        # Per peer: what it sends next, and the transfer that waits for it.
        self._frames = {peer: _Buffer(FRAME_BYTES) for peer in self._peers}
        self._votes = {peer: _Buffer(8 * (1 + MAX_VOTES)) for peer in self._peers}
        self._frame_works: dict[int, dist.Work] = {}
        self._vote_works: dict[int, dist.Work] = {}
        self._sending: dict[int, dist.Work] = {}
        self._unfinished = ""  # the exchange that is under way
        self._loss: tuple[int | None, str] = (None, "it was interrupted")
        for peer in self._peers:
            self._expect_frame(peer)
            self._expect_vote(peer)

    def send(self, message: bytes) -> None:
        """Rank 0: give ``message`` to every other rank. At most ``MAX_MESSAGE_BYTES``."""
        self._check_rank(is_first=True)
        _check_message(message)
        self._begin("message")
        self._put_message(message, self._peers, _MESSAGE_TAG)
        self._unfinished = ""

    def receive(self) -> bytes:
        """Other ranks: the next message, however long rank 0 takes to send one.

        Raises ``RankLostError`` when rank 0 is gone.
        """
        self._check_rank(is_first=False)
        self._begin("message")
        message = self._take_message(0, time.monotonic() + _EVER_S)
        self._unfinished = ""
        return message

    def least(self, values: Sequence[int]) -> list[int]:
        """All ranks: the smallest of what the ranks gave, for each of up to ``MAX_VOTES`` values.

        Raises ``RankLostError`` if a rank does not vote within ``timeout_s``, and
        ``RankMismatchError`` in all ranks if they gave different numbers of values.
        """
        _check_vote(values)
        self._begin("vote")
        self._write_vote(values)
        result = self._count_votes(list(values)) if self.rank == 0 else self._ask_result()
        self._unfinished = ""
        if result is None:
            others = "another rank gave another number"
            if self.rank == 0:
                counts = {peer: len(self._read_vote(peer) or ()) for peer in self._peers}
                others = ", ".join(f"rank {peer} gave {count}" for peer, count in counts.items())
            raise RankMismatchError(
                "number of votes",
                f"rank {self.rank} gave {len(values)} values to find the least of; {others}",
            )
        return result

    def meet(self, timeout_s: float) -> None:
        """All ranks: go on together, after work that may take one of them longer than others.

        Raises ``RankLostError`` if a rank is not there within ``timeout_s``.
        """
        usual, self.timeout_s = self.timeout_s, timeout_s
        try:
            self.least(())
        finally:
            self.timeout_s = usual

    def gather(self, payload: bytes) -> list[bytes]:
        """All ranks: rank 0 gets every rank's payload in rank order, the others an empty list."""
        _check_message(payload)
        self._begin("answer")
        answers = []
        if self.rank > 0:
            self._put_message(payload, self._peers, _ANSWER_TAG)
        else:
            deadline = time.monotonic() + self.timeout_s
            answers = [payload, *(self._take_message(peer, deadline) for peer in self._peers)]
        self._unfinished = ""
        return answers

    def close(self) -> None:
        """Let go of every transfer; the process group itself belongs to who made it."""
        self._group = None
        self._frame_works.clear()
        self._vote_works.clear()
        self._sending.clear()

    def _begin(self, what: str) -> None:
        """After an exchange that did not end the ranks no longer wait for the same thing."""
        if self._unfinished:
            rank, reason = self._loss
            raise RankLostError(
                rank, f"an earlier {self._unfinished} did not get through: {reason}"
            )
        self._unfinished = what

    def _check_rank(self, is_first: bool) -> None:
        if (self.rank == 0) != is_first:
            raise InvariantError(f"rank {self.rank} cannot do this; messages go from rank 0")

    def _count_votes(self, values: list[int]) -> list[int] | None:
        """The result, given to all; None if the ranks gave different numbers of values."""
        deadline = time.monotonic() + self.timeout_s
        agreed = True
        for peer in self._peers:
            self._wait_vote(peer, deadline)
            theirs = self._read_vote(peer)
            if theirs is None or len(theirs) != len(values):
                agreed = False
            else:
                values = [min(pair) for pair in zip(values, theirs, strict=True)]
        if agreed:
            self._write_vote(values)
        else:
            struct.pack_into("<q", self._vote.data, 0, _NO_AGREEMENT)
        self._put(self._vote.tensor, self._peers, _RESULT_TAG, self.timeout_s)
        return values if agreed else None

    def _ask_result(self) -> list[int] | None:
        self._put(self._vote.tensor, self._peers, _VOTE_TAG, self.timeout_s)
        self._wait_vote(0, time.monotonic() + _PATIENCE * self.timeout_s)
        return self._read_vote(0)

    def _write_vote(self, values: Sequence[int]) -> None:
        struct.pack_into(f"<{1 + len(values)}q", self._vote.data, 0, len(values), *values)

    def _read_vote(self, peer: int) -> list[int] | None:
        data = self._votes[peer].data
        (count,) = struct.unpack_from("<q", data)
        if not 0 <= count <= MAX_VOTES:
            return None
        return list(struct.unpack_from(f"<{count}q", data, 8))

    def _wait_vote(self, peer: int, deadline: float) -> None:
        self._wait(self._vote_works.pop(peer, None), peer, deadline, "vote")
        # Read before the next vote can come: a peer votes again only after the result of this one.
        self._expect_vote(peer)

    def _expect_vote(self, peer: int) -> None:
        tag = _VOTE_TAG if self.rank == 0 else _RESULT_TAG
        with suppress(RuntimeError):  # it has left after its last vote: the next one is not there
            self._vote_works[peer] = self._open().recv([self._votes[peer].tensor], peer, tag)

    def _expect_frame(self, peer: int) -> None:
        tag = _ANSWER_TAG if self.rank == 0 else _MESSAGE_TAG
        with suppress(RuntimeError):  # it has left after its last message, as rank 0 does
            self._frame_works[peer] = self._open().recv([self._frames[peer].tensor], peer, tag)

    def _put_message(self, message: bytes, peers: Sequence[int], tag: int) -> None:
        first = message[:_FIRST_BYTES]
        _HEADER.pack_into(self._frame.data, 0, len(message))
        self._frame.data[_HEADER.size : _HEADER.size + len(first)] = first
        self._put(self._frame.tensor, peers, tag, self.timeout_s)
        if len(message) > _FIRST_BYTES:
            rest = torch.frombuffer(bytearray(message[_FIRST_BYTES:]), dtype=torch.uint8)
            self._put(rest, peers, _REST_TAG, self.timeout_s)

    def _take_message(self, peer: int, deadline: float) -> bytes:
        self._wait(self._frame_works.pop(peer, None), peer, deadline, "message")
        data = self._frames[peer].data
        (num_bytes,) = _HEADER.unpack_from(data)
        if num_bytes > MAX_MESSAGE_BYTES:
            raise RankLostError(
                peer, f"it announced a message of {num_bytes} bytes; at most {MAX_MESSAGE_BYTES}"
            )
        message = bytes(memoryview(data)[_HEADER.size : _HEADER.size + num_bytes])
        self._expect_frame(peer)
        if num_bytes <= _FIRST_BYTES:
            return message
        rest = _Buffer(num_bytes - _FIRST_BYTES)
        work = self._open().recv([rest.tensor], peer, _REST_TAG)
        self._wait(work, peer, time.monotonic() + self.timeout_s, "rest of a message")
        return message + rest.data

    def _put(self, tensor: torch.Tensor, peers: Sequence[int], tag: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for peer in peers:
            try:
                self._sending[peer] = self._open().send([tensor], peer, tag)
            except RuntimeError as error:
                raise RankLostError(
                    peer, f"nothing can be sent to it: {first_sentence(error)}"
                ) from None
        for peer in peers:
            self._wait(self._sending.pop(peer), peer, deadline, "receipt")

    def _wait(self, work: dist.Work | None, peer: int, deadline: float, what: str) -> None:
        if work is None:
            raise RankLostError(peer, f"it has left, and sends no {what}")
        started = time.monotonic()
        try:
            work.wait(timedelta(seconds=max(deadline - started, 0.001)))
        except RuntimeError as error:
            if time.monotonic() < deadline:
                reason = f"the connection to it broke: {first_sentence(error)}"
            else:
                reason = (
                    f"it is behind: no {what} from it within {self.timeout_s:g} s "
                    "(tensor_parallel_timeout_s)"
                )
            self._loss = (peer, reason)
            # Without the cause: its frames would keep the transfer, and with it the sockets.
            raise RankLostError(peer, reason) from None
        finally:
            del work

    def _open(self) -> dist.ProcessGroup:
        if self._group is None:
            raise ClosedError(f"the channel of rank {self.rank} is closed")
        return self._group


def _check_message(message: bytes) -> None:
    if len(message) > MAX_MESSAGE_BYTES:
        raise ConfigError(f"a message of {len(message)} bytes; at most {MAX_MESSAGE_BYTES}")


def _check_vote(values: Sequence[int]) -> None:
    if len(values) > MAX_VOTES:
        raise ConfigError(f"{len(values)} values to find the least of; at most {MAX_VOTES}")
    for value in values:
        if not INT64_MIN <= value <= INT64_MAX:
            raise ConfigError(f"vote {value} must be between {INT64_MIN} and {INT64_MAX}")


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error of gloo's, without the source file it starts with."""
    line = str(error).strip().split("\n", 1)[0]
    if line.startswith("[") and "] " in line:
        line = line.split("] ", 1)[1]
    return line.split(". ", 1)[0]
