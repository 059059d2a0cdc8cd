"""What a cache holds, page for page, in a form that two caches can be compared in.

Owns: nothing.  Thread-safety: one engine thread takes it; the value is immutable.

Which page has which id is each cache's own affair, as is what its worker mapped ahead. So pages are
numbered in the order in which sequences and prefixes refer to them, and only what is needed counts.
Equal ledgers then mean: the same rows, in pages shared by the same sequences and prefixes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from zlib import crc32

import msgspec

from ..backend import KVBackend
from ..kv_cache import VirtualKVCache
from ..paged_cache import PagedKVCache
from ..prefix_node import PrefixNode, tokens_from_root


class SequenceEntry(msgspec.Struct, frozen=True):
    """One sequence: its tokens, and for each region the numbers of its pages."""

    seq_id: int
    num_tokens: int
    pages: list[list[int]]


class PrefixEntry(msgspec.Struct, frozen=True):
    """One node of the prefix index; ``tokens`` is a checksum of the node's own."""

    salt: str
    end: int
    tokens: int
    num_locks: int
    num_pins: int
    pages: list[int]


class Ledger(msgspec.Struct, frozen=True):
    """What a cache holds.

    Attributes:
        backend: ``"virtual"`` or ``"paged"``.
        page_bytes: one page, or block.
        committed_bytes, live_bytes, logical_bytes, cached_bytes, shared_bytes, swapped_bytes: see
            ``KVCacheStats``.
        sequences: live ones, by id.
        swapped: ids of swapped-out sequences, group by group.
        prefixes: nodes of the index, parents first.
    """

    backend: str
    page_bytes: int
    committed_bytes: int
    live_bytes: int
    logical_bytes: int
    cached_bytes: int
    shared_bytes: int
    swapped_bytes: int
    sequences: list[SequenceEntry]
    swapped: list[list[int]]
    prefixes: list[PrefixEntry]

    def encode(self) -> bytes:
        """As bytes, for another process."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, message: bytes) -> Ledger:
        """What ``encode`` wrote. Raises ``msgspec.ValidationError`` for anything else."""
        return msgspec.msgpack.decode(message, type=Ledger)

    def differences(self, other: Ledger) -> list[str]:
        """What differs, field by field; empty if the two hold the same."""
        return [
            f"{name}: {mine} here, {theirs} there"
            for name in self.__struct_fields__
            if (mine := getattr(self, name)) != (theirs := getattr(other, name))
        ]


class _Numbers:
    """Numbers pages in the order in which they are met."""

    def __init__(self) -> None:
        self._of: dict[int, int] = {}

    def of(self, page_ids: Iterable[int]) -> list[int]:
        return [self._of.setdefault(page_id, len(self._of)) for page_id in page_ids]


def take_ledger(cache: KVBackend) -> Ledger:
    """What ``cache`` holds now. To be called between steps.

    Raises ``TypeError`` for a cache that is neither of the two backends.
    """
    if not isinstance(cache, VirtualKVCache | PagedKVCache):
        raise TypeError(f"a {type(cache).__name__} has no ledger; it must be a cache of vmalloc's")
    cache.wait_worker()
    numbers = _Numbers()
    stats = cache.stats()
    nodes = sorted(cache.prefix_nodes(), key=lambda node: (node.salt, tokens_from_root(node)))
    sequences = [
        SequenceEntry(
            seq_id,
            cache.seq_len(seq_id),
            [numbers.of(page_ids) for page_ids in cache.page_table(seq_id)],
        )
        for seq_id in sorted(cache.live_seq_ids())
    ]
    return Ledger(
        backend=cache.name,
        page_bytes=stats.page_bytes,
        committed_bytes=stats.committed_bytes,
        live_bytes=stats.live_bytes,
        logical_bytes=stats.logical_bytes,
        cached_bytes=stats.cached_bytes,
        shared_bytes=stats.shared_bytes,
        swapped_bytes=stats.swapped_bytes,
        sequences=sequences,
        swapped=cache.swapped_seq_ids(),
        prefixes=[_entry(node, numbers) for node in nodes],
    )


def _entry(node: PrefixNode, numbers: _Numbers) -> PrefixEntry:
    return PrefixEntry(
        salt=node.salt,
        end=node.end,
        tokens=crc32(",".join(map(str, node.tokens)).encode()),
        num_locks=node.num_locks,
        num_pins=node.num_pins,
        pages=numbers.of(_page_id(page) for page in node.pages),
    )


def _page_id(page: Any) -> int:
    """The id in what a backend calls a page: the last of several numbers, or the only one."""
    return int(page[-1] if isinstance(page, tuple) else page)
