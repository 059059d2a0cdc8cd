"""Which prefix node to evict next.

Owns: one heap entry for every node that could be evicted.  Thread-safety: none; one engine thread.

Entries are checked when they come up, so that using, locking or pinning a node costs nothing here.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from .prefix_node import PrefixNode, is_evictable

_MIN_HEAP = 64


class EvictionQueue:
    """Leaves that are neither locked nor pinned, least recently used first."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, PrefixNode]] = []  # (last use, tie breaker, node)
        self._num_pushes = 0
        self._max_entries = _MIN_HEAP

    def offer(self, node: PrefixNode) -> None:
        """Enter ``node``, unless it is here already or cannot be evicted."""
        if node.in_heap or not is_evictable(node):
            return
        if len(self._heap) >= self._max_entries:
            self._drop_detached()
        self._num_pushes += 1
        heappush(self._heap, (node.last_use, self._num_pushes, node))
        node.in_heap = True

    def pop(self) -> PrefixNode | None:
        """Take out the least recently used node that can be evicted now."""
        while self._heap:
            last_use, _, node = heappop(self._heap)
            node.in_heap = False
            if is_evictable(node) and last_use == node.last_use:
                return node
            self.offer(node)  # what cannot be evicted now is offered again when it can
        return None

    def _drop_detached(self) -> None:
        """Forget replaced tails; the heap has to double before this runs again."""
        self._heap = [entry for entry in self._heap if entry[2].is_attached]
        heapify(self._heap)
        self._max_entries = max(_MIN_HEAP, 2 * len(self._heap))
