"""How one rank's memory is: what the views of an engine are put together from.

Owns: nothing.  Thread-safety: immutable values.
"""

from __future__ import annotations

import resource

import msgspec

from ...backend import KVBackend, KVCacheStats
from ...page_map import PageMap


class RankReport(msgspec.Struct, frozen=True):
    """One rank.

    Attributes:
        rank: which one, from 0.
        kv_stats: what its KV memory is doing.
        page_map: the pages of its slots.
        peak_rss_bytes: most memory that its process had so far.
    """

    rank: int
    kv_stats: KVCacheStats
    page_map: PageMap
    peak_rss_bytes: int

    @classmethod
    def of(cls, rank: int, cache: KVBackend) -> RankReport:
        """The report of this process."""
        peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return cls(rank, cache.stats(), cache.page_map(), peak_rss_bytes)

    def encode(self) -> bytes:
        """As bytes, for another process."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, message: bytes) -> RankReport:
        """What ``encode`` wrote. Raises ``msgspec.DecodeError`` for anything else."""
        return msgspec.msgpack.decode(message, type=RankReport)
