"""How long lengths can grow until memory has a part in it: pages, pages ahead, shared prefixes.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vmalloc import VirtualKVCache
from vmalloc.backend import KVBackend
from vmalloc.engine.group_memory import GroupMemory


class PageEdges:
    """The edges of a backend's pages, in rows."""

    def __init__(self, backend: KVBackend) -> None:
        config = backend.config
        self._share_tokens = GroupMemory(backend).share_tokens if config.prefix_caching else 0
        if isinstance(backend, VirtualKVCache):
            layout = backend.layout
            self._unit_bytes = layout.page_bytes
            self._row_bytes = sorted(set(layout.row_bytes))
            self._aheads = [0, config.commit_ahead_tokens]
            self._lookahead = config.lookahead_tokens
        else:
            self._unit_bytes, self._row_bytes = config.block_size, [1]
            self._aheads, self._lookahead = [0], 0

    def rows_left(self, rows: NDArray[np.int64]) -> int:
        """Rows that every sequence can grow by without a page, here or ahead, or a registration."""
        limits = []
        for ahead in self._aheads:
            backed = rows + ahead + self._lookahead
            for row_bytes in self._row_bytes:
                num_pages = -(-backed * row_bytes // self._unit_bytes)
                limits.append((num_pages * self._unit_bytes // row_bytes - backed).min())
        if self._share_tokens:
            limits.append((self._share_tokens - 1 - rows % self._share_tokens).min())
        return int(min(limits))
