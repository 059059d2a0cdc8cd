"""What every rank does to its own cache when all ranks do it together.

Owns: nothing; the cache is the engine's.  Thread-safety: none; one engine thread.

Each of these may fail on one rank and work on the others. They answer with a value for the vote,
and can be undone where the vote says so.
"""

from __future__ import annotations

import logging

from ..backend import KVBackend
from ..errors import DriverError
from ..kv_cache import VirtualKVCache

logger = logging.getLogger(__name__)


class RankCache:
    """This rank's cache, for what is done on all ranks or on none."""

    def __init__(self, cache: KVBackend) -> None:
        self.cache = cache
        self._supply = cache.supply if isinstance(cache, VirtualKVCache) else None

    def try_grant(self, num_pages: int) -> bool:
        """Have so many pages created for ``end_grant``, or say that there is no memory for them."""
        assert self._supply is not None
        try:
            return self._supply.try_grant(num_pages)
        except DriverError as error:
            logger.warning("this rank cannot have %d KV pages: %s", num_pages, error)
            return False

    def end_grant(self, num_pages: int, *, keeps_pages: bool) -> None:
        """See ``PageSupply``; nothing where pages are not granted."""
        if self._supply is not None:
            self._supply.end_grant(num_pages, keeps_pages=keeps_pages)

    def keep(self, num_pages: int) -> None:
        """Have no more pages than ``num_pages``, which every rank has, but for those in use."""
        if self._supply is None:
            return
        self._supply.end_grant(num_pages, keeps_pages=True)
        surplus = self.num_created - num_pages
        if surplus > 0:
            self.cache.wait_worker()  # or it would take some of what is free meanwhile
            self.cache.trim(self.num_created)
            self.cache.trim(max(self.cache.stats().free_pages - surplus, 0))

    def trim(self, keep_free_pages: int) -> int:
        """Give free pages back, and create none on demand from then on; how many."""
        self.end_grant(0, keeps_pages=True)  # or the worker would create some again
        return self.cache.trim(keep_free_pages)

    @property
    def num_created(self) -> int:
        """Pages that exist here."""
        return self.cache.stats().created_pages
