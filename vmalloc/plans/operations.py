"""What a cache was told, and what came of it, as messages that other caches go by.

Owns: nothing.  Thread-safety: immutable values.

They are msgspec structs: what arrives is checked against these types, and nothing else can be made
of it. ``notes`` of an operation are those of its ``SupplyScript``; empty for paged caches, which
have nothing that keeps its own time.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class Admit(msgspec.Struct, frozen=True, array_like=True, tag="admit"):
    """``try_admit``; ``num_cached_tokens`` is -1 where it was None, ``hit`` the tokens of a hit."""

    seq_ids: list[int]
    num_tokens: int
    prompt_tokens: int | None
    final_tokens: int | None
    cache_salt: str | None
    hit: list[int] | None
    num_cached_tokens: int
    notes: list[int]


class Extend(msgspec.Struct, frozen=True, array_like=True, tag="extend"):
    """``try_extend``."""

    seq_ids: list[int]
    num_tokens: list[int]
    is_done: bool
    notes: list[int]


class Truncate(msgspec.Struct, frozen=True, array_like=True, tag="truncate"):
    """``truncate``."""

    seq_id: int
    num_tokens: int


class Fork(msgspec.Struct, frozen=True, array_like=True, tag="fork"):
    """``try_fork``."""

    parent_id: int
    child_ids: list[int]
    num_tokens: int | None
    is_done: bool
    notes: list[int]


class Reorder(msgspec.Struct, frozen=True, array_like=True, tag="reorder"):
    """``try_reorder``."""

    seq_ids: list[int]
    parent_idx: list[int]
    is_done: bool
    notes: list[int]


class Register(msgspec.Struct, frozen=True, array_like=True, tag="register"):
    """``register_tokens``; ``token_ids`` are those from ``start`` on, the others are known."""

    seq_id: int
    start: int
    token_ids: list[int]


class Free(msgspec.Struct, frozen=True, array_like=True, tag="free"):
    """``free``."""

    seq_ids: list[int]
    keep_prefix: bool


class SwapOut(msgspec.Struct, frozen=True, array_like=True, tag="swap_out"):
    """``try_swap_out``."""

    seq_ids: list[int]
    is_done: bool


class SwapIn(msgspec.Struct, frozen=True, array_like=True, tag="swap_in"):
    """``try_swap_in``."""

    seq_ids: list[int]
    is_done: bool
    notes: list[int]


class Prefetch(msgspec.Struct, frozen=True, array_like=True, tag="prefetch"):
    """``prefetch``."""

    num_tokens: int


class BeginStep(msgspec.Struct, frozen=True, array_like=True, tag="begin"):
    """``begin_step``."""


class EndStep(msgspec.Struct, frozen=True, array_like=True, tag="end"):
    """``end_step``."""

    notes: list[int]


class Pin(msgspec.Struct, frozen=True, array_like=True, tag="pin"):
    """``pin_prefix``, or ``unpin_prefix``."""

    token_ids: list[int]
    salt: str
    is_pinned: bool


class Flush(msgspec.Struct, frozen=True, array_like=True, tag="flush"):
    """``flush_prefixes``."""


class Resize(msgspec.Struct, frozen=True, array_like=True, tag="resize"):
    """``resize``."""

    capacity_bytes: int
    notes: list[int]


Operation: TypeAlias = (
    Admit
    | Extend
    | Truncate
    | Fork
    | Reorder
    | Register
    | Free
    | SwapOut
    | SwapIn
    | Prefetch
    | BeginStep
    | EndStep
    | Pin
    | Flush
    | Resize
)
"""One call that changed a cache, or could have."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Operation])


def encode_plan(operations: list[Operation]) -> bytes:
    """Operations in the order in which they were done, as bytes."""
    return _encoder.encode(operations)


def decode_plan(message: bytes) -> list[Operation]:
    """What ``encode_plan`` wrote. Raises ``msgspec.ValidationError`` for anything else."""
    return _decoder.decode(message)
