"""How one rank's memory is: what the views of an engine are put together from.

Owns: nothing.  Thread-safety: immutable values.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import fields, replace

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

    def with_requests(self, request_of: Mapping[int, str]) -> RankReport:
        """The same, with the request of every sequence that ``request_of`` knows."""
        return msgspec.structs.replace(self, page_map=self.page_map.with_requests(request_of))

    def encode(self) -> bytes:
        """As bytes, for another process."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, message: bytes) -> RankReport:
        """What ``encode`` wrote. Raises ``msgspec.DecodeError`` for anything else."""
        return msgspec.msgpack.decode(message, type=RankReport)


def stats_of_all(stats: KVCacheStats, num_ranks: int) -> KVCacheStats:
    """One rank's figures as those of ``num_ranks`` ranks.

    Ranks hold the same pages, each its heads' share of their rows: counts are one rank's, and bytes
    are those of all, so that a page is what all ranks have of it. What workers do ahead of need may
    differ; that is taken to be as on this rank.
    """
    if num_ranks == 1:
        return stats
    names = (field.name for field in fields(stats))
    sizes = (name for name in names if name.endswith(("_bytes", "_byte_steps")))
    return replace(stats, **{name: num_ranks * getattr(stats, name) for name in sizes})


def page_map_of_all(page_map: PageMap, num_ranks: int) -> PageMap:
    """Likewise: one rank's slots, with what all ranks have of a page and a row."""
    return replace(
        page_map,
        page_bytes=num_ranks * page_map.page_bytes,
        row_bytes=tuple(num_ranks * num_bytes for num_bytes in page_map.row_bytes),
    )
