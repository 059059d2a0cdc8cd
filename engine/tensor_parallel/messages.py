"""What rank 0 tells the other ranks of an engine.

Owns: nothing.  Thread-safety: immutable values.

Each message is checked against these types when it arrives, and nothing else can be made of it.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from ...plans import Operation
from ..config import EngineConfig
from ..packed_batch import PackedBatch


class Start(msgspec.Struct, frozen=True, tag="start"):
    """Load a share of ``model`` and be ready."""

    model: str
    config: EngineConfig


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """A ``PackedBatch``; ``starts`` are the positions of each sequence's first row."""

    seq_ids: list[int]
    num_new_tokens: list[int]
    token_ids: list[int]
    starts: list[int]
    rows: list[int]

    @classmethod
    def of(cls, batch: PackedBatch) -> Batch:
        """As it travels."""
        starts, row = [], 0
        for num_new_tokens in batch.num_new_tokens:
            starts.append(batch.positions[row])
            row += num_new_tokens
        return cls(batch.seq_ids, batch.num_new_tokens, batch.token_ids, starts, batch.rows)

    def unpack(self) -> PackedBatch:
        """As it is computed."""
        positions = [
            position
            for start, num_new_tokens in zip(self.starts, self.num_new_tokens, strict=True)
            for position in range(start, start + num_new_tokens)
        ]
        return PackedBatch(self.seq_ids, self.num_new_tokens, self.token_ids, positions, self.rows)


class RunStep(msgspec.Struct, frozen=True, tag="step"):
    """Do what rank 0 did to its cache; then, with a batch, vote and compute it."""

    operations: list[Operation]
    batch: Batch | None


class Grant(msgspec.Struct, frozen=True, tag="grant"):
    """Have ``num_pages`` created and vote; ``before`` holds again if one rank has not."""

    num_pages: int
    before: int


class Trim(msgspec.Struct, frozen=True, tag="trim"):
    """Give free pages back until so many are left, and vote on what is created then."""

    keep_free_pages: int


class Sleep(msgspec.Struct, frozen=True, tag="sleep"):
    """Give all KV memory back, and vote."""


class Wake(msgspec.Struct, frozen=True, tag="wake"):
    """Take it again, and vote."""


class Reset(msgspec.Struct, frozen=True, tag="reset"):
    """Say why the last plan failed here, if it did, drop what the cache holds, move its cap."""

    capacity_bytes: int


class Report(msgspec.Struct, frozen=True, tag="report"):
    """Answer with a ``RankReport``."""


class Audit(msgspec.Struct, frozen=True, tag="audit"):
    """Check the cache's books and answer with its ``Ledger``."""


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End."""


Message: TypeAlias = Start | RunStep | Grant | Trim | Sleep | Wake | Reset | Report | Audit | Stop

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """A message as bytes."""
    return _encoder.encode(message)


def decode(data: bytes) -> Message:
    """What ``encode`` wrote. Raises ``msgspec.DecodeError`` for anything else."""
    return _decoder.decode(data)
