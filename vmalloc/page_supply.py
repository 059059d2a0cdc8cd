"""Where pages come from when there are too few: the arena's cap and watermarks, and eviction.

Owns: nothing; the cap is the arena's.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from . import _core
from .config import KVCacheConfig
from .core_setup import high_pages, low_pages
from .layout import KVLayout
from .prefix_index import PrefixIndex

T = TypeVar("T")


class PageSupply:
    """Gets pages from an arena, evicting cached prefixes where that helps."""

    def __init__(
        self, arena: _core.KVArena, config: KVCacheConfig, layout: KVLayout, index: PrefixIndex
    ) -> None:
        self._arena = arena
        self._config = config
        self._layout = layout
        self._index = index

    def resize(self, capacity_bytes: int) -> None:
        """Move the cap and the watermarks; what is cached beyond it goes."""
        max_pages = capacity_bytes // self._layout.page_bytes
        self._arena.resize(
            max_pages, low_pages(self._config, max_pages), high_pages(self._config, max_pages)
        )
        num_created = self._arena.stats()["created_pages"]
        if num_created > max_pages:
            self._index.evict(num_created - max_pages)

    def evicting(self, attempt: Callable[[], T]) -> T:
        """Try until it works or evicting does not help; the last answer."""
        last_shortage = 0
        while True:
            answer = attempt()
            if answer is not None and answer is not False:
                return answer
            shortage = self._arena.last_shortage()
            # As short as before: a kernel may still read what was evicted, so it comes later.
            if shortage in (0, last_shortage) or not self._can_evict(shortage):
                return answer
            self._index.evict(shortage)
            last_shortage = shortage

    def keep_some_free(self, num_seqs: int) -> None:
        """Evict what was not used for longest, so that the worker finds pages to commit ahead."""
        config, max_pages = self._config, self._arena.max_pages()
        num_ahead = num_seqs * (config.commit_ahead_tokens + 1) * config.token_bytes
        wanted = (
            low_pages(config, max_pages)
            + num_ahead // self._layout.page_bytes
            + len(self._layout.row_bytes)
        )
        lacking = min(wanted, max_pages // 2) - self._arena.available_pages()
        if lacking > 0:
            self._index.evict(lacking)

    @contextmanager
    def down_to_the_last_page(self) -> Iterator[None]:
        """For who has no other to leave pages to: no low watermark meanwhile."""
        self._arena.set_low_pages(0)
        try:
            yield
        finally:
            self._arena.set_low_pages(low_pages(self._config, self._arena.max_pages()))

    def _can_evict(self, num_pages: int) -> bool:
        """Whether so much is merely cached: what is not enough is not given up for nothing."""
        return self._arena.stats()["cached_pages"] >= num_pages
