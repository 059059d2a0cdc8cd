"""vLLM's queue of free blocks, in an order that keeps memory small.

vLLM's own queue hands out blocks that were never used before those that were freed with a cached
prefix, so it soon touches the whole pool. This one hands out, in this order: blank blocks that have
memory, blocks of a new extent while the limit allows, and cached blocks, least recently used first.

Owns: which extents have memory, as the scheduler sees it.  Thread-safety: none; the scheduler's
thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from typing import Any

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

from ...errors import InvariantError
from .extents import Extents

Block = Any  # vLLM's KVCacheBlock


class ExtentQueue(FreeKVCacheBlockQueue):  # type: ignore[misc]
    """Free blocks by extent.

    An extent is *backed* while it has memory, *idle* while it is backed and none of its blocks is
    in use. A free block is *cached* if it was freed with a hash, else *blank*.

    Attributes:
        num_free_blocks: all free blocks, with memory or without.
        limit: most extents that may be backed now.
        cap: most that may ever be.
    """

    def __init__(
        self, blocks: list[Block], extents: Extents, evict: Callable[[Block], object]
    ) -> None:
        """Take over the free blocks of a pool where nothing is cached.

        Args:
            blocks: the free ones of the pool.
            evict: drops the prefix-cache entry of a free block.
        """
        super().__init__([])
        self._extents = extents
        self._evict = evict
        self.num_free_blocks = len(blocks)
        self.limit = self.cap = extents.num_extents
        self._blanks: list[dict[int, Block]] = [{} for _ in range(extents.num_extents)]
        for block in blocks:
            self._blanks[extents.extent_of(block.block_id)][block.block_id] = block
        self._cached: OrderedDict[int, Block] = OrderedDict()  # least recently used first
        self._num_cached = [0] * extents.num_extents
        self._num_used = [
            len(extents.blocks(idx)) - len(blanks) for idx, blanks in enumerate(self._blanks)
        ]
        self._is_backed = [used > 0 for used in self._num_used]  # the null block's
        self._dark = [idx for idx, backed in enumerate(self._is_backed) if not backed]
        heapify(self._dark)
        self._num_dark_blocks = sum(len(self._blanks[idx]) for idx in self._dark)
        self._open = [idx for idx, backed in enumerate(self._is_backed) if backed]
        self._is_open = list(self._is_backed)  # in the heap above, if only to be dropped from it
        self._idle_blank: dict[int, None] = {}  # idle extents without and with cached blocks,
        self._idle_cached: dict[int, None] = {}  # longest idle first
        self._is_told = [False] * extents.num_extents  # what the worker was told
        self._changed = {idx for idx, backed in enumerate(self._is_backed) if backed}

    # ---- What vLLM calls.

    def popleft(self) -> Block:
        return self.popleft_n(1)[0]

    def popleft_n(self, n: int) -> list[Block]:
        taken: list[Block] = []
        while len(taken) < n:
            extent = self._next_open()
            if extent is not None:
                self._take_blanks(extent, n - len(taken), taken)
            elif self._dark and self.num_backed < self.limit:
                self._back(heappop(self._dark))
            elif self._cached:
                _, block = self._cached.popitem(last=False)
                self._num_cached[self._extents.extent_of(block.block_id)] -= 1
                self._use(block)
                taken.append(block)
            else:
                raise InvariantError(f"{n} blocks are taken where {len(taken)} can be had")
        return taken

    def remove(self, block: Block) -> None:
        extent = self._extents.extent_of(block.block_id)
        if self._cached.pop(block.block_id, None) is not None:
            self._num_cached[extent] -= 1
        elif self._blanks[extent].pop(block.block_id, None) is None:
            raise InvariantError(f"block {block.block_id} is taken and is not free")
        elif not self._is_backed[extent]:
            raise InvariantError(f"block {block.block_id} is taken and has no memory")
        self._use(block)

    def append(self, block: Block) -> None:
        self.append_n([block])

    def append_n(self, blocks: list[Block]) -> None:
        for block in blocks:
            self._free(block)

    def prepend_n(self, blocks: list[Block]) -> None:
        # vLLM puts blank blocks first; here they come first anyway.
        self.append_n(blocks)

    def get_all_free_blocks(self) -> list[Block]:
        blanks = [block for part in self._blanks for block in part.values()]
        return blanks + list(self._cached.values())

    # ---- What the scheduler adds.

    @property
    def num_backed(self) -> int:
        """Extents that have memory."""
        return self._extents.num_extents - len(self._dark)

    @property
    def num_idle(self) -> int:
        return len(self._idle_blank) + len(self._idle_cached)

    @property
    def num_used_blocks(self) -> int:
        """Blocks in use, the null block among them."""
        return self._extents.num_blocks - self.num_free_blocks

    @property
    def num_blocks_under_cap(self) -> int:
        """Most blocks that can be in use, the null block among them."""
        return min(self.cap * self._extents.blocks_per_extent, self._extents.num_blocks)

    @property
    def num_obtainable(self) -> int:
        """Free blocks that the limit lets one have."""
        room = max(self.limit - self.num_backed, 0)
        if room >= len(self._dark):
            return self.num_free_blocks
        from_dark = min(room * self._extents.blocks_per_extent, self._num_dark_blocks)
        return self.num_free_blocks - self._num_dark_blocks + from_dark

    def trim(self, max_idle: int) -> None:
        """Give up idle extents beyond ``max_idle``: blank ones first, then the longest idle."""
        while self.num_idle > max_idle:
            self._give_up(next(iter(self._idle_blank or self._idle_cached)))

    def drop_cached(self) -> None:
        """Forget every prefix that no request uses, and give up all idle extents."""
        while self._cached:
            _, block = self._cached.popitem()
            self._evict(block)
            self._add_blank(self._extents.extent_of(block.block_id), block)
        self._num_cached = [0] * self._extents.num_extents
        self.trim(max_idle=0)

    def take_changes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Extents that got memory and extents that lost it since the worker was told last."""
        changed = sorted(self._changed)
        self._changed.clear()
        commit = tuple(idx for idx in changed if self._is_backed[idx] and not self._is_told[idx])
        decommit = tuple(idx for idx in changed if self._is_told[idx] and not self._is_backed[idx])
        for idx in changed:
            self._is_told[idx] = self._is_backed[idx]
        return commit, decommit

    def take_all(self) -> tuple[int, ...]:
        """Every extent that has memory, for a worker that is told everything anew."""
        self._changed.clear()
        self._is_told = list(self._is_backed)
        return tuple(idx for idx, backed in enumerate(self._is_backed) if backed)

    def check_invariants(self) -> None:
        """Recount everything.

        Raises:
            InvariantError: the books do not balance.
        """
        for idx, blanks in enumerate(self._blanks):
            blocks = self._extents.blocks(idx)
            num_cached = sum(block_id in self._cached for block_id in blocks)
            idle = (idx in self._idle_blank) + (idx in self._idle_cached)
            is_idle = self._is_backed[idx] and self._num_used[idx] == 0
            if (
                num_cached != self._num_cached[idx]
                or len(blanks) + num_cached + self._num_used[idx] != len(blocks)
                or idle != is_idle
                or (not self._is_backed[idx] and len(blanks) != len(blocks))
                or (self._is_backed[idx] and blanks and not self._is_open[idx])
            ):
                raise InvariantError(f"extent {idx} of {self._extents.num_extents} is miscounted")
        num_free = sum(map(len, self._blanks)) + len(self._cached)
        num_dark = sum(len(self._blanks[idx]) for idx in self._dark)
        if num_free != self.num_free_blocks or num_dark != self._num_dark_blocks:
            raise InvariantError(
                f"{self.num_free_blocks} blocks are booked as free and {self._num_dark_blocks} as "
                f"without memory; {num_free} and {num_dark} are"
            )

    # ---- Steps of the above.

    def _next_open(self) -> int | None:
        """The lowest backed extent with a blank block: low ones fill up, so high ones empty."""
        while self._open:
            extent = self._open[0]
            if self._is_backed[extent] and self._blanks[extent]:
                return extent
            self._is_open[heappop(self._open)] = False
        return None

    def _take_blanks(self, extent: int, count: int, taken: list[Block]) -> None:
        blanks = self._blanks[extent]
        for _ in range(min(count, len(blanks))):
            _, block = blanks.popitem()
            self._use(block)
            taken.append(block)

    def _use(self, block: Block) -> None:
        extent = self._extents.extent_of(block.block_id)
        self._num_used[extent] += 1
        self.num_free_blocks -= 1
        self._idle_blank.pop(extent, None)
        self._idle_cached.pop(extent, None)

    def _free(self, block: Block) -> None:
        extent = self._extents.extent_of(block.block_id)
        if block.block_hash is None:
            self._add_blank(extent, block)
        else:
            self._cached[block.block_id] = block
            self._num_cached[extent] += 1
        self.num_free_blocks += 1
        self._num_used[extent] -= 1
        if self._num_used[extent] == 0:
            idle = self._idle_cached if self._num_cached[extent] else self._idle_blank
            idle[extent] = None

    def _add_blank(self, extent: int, block: Block) -> None:
        self._blanks[extent][block.block_id] = block
        if not self._is_open[extent]:
            self._is_open[extent] = True
            heappush(self._open, extent)

    def _back(self, extent: int) -> None:
        self._is_backed[extent] = True
        self._num_dark_blocks -= len(self._blanks[extent])
        self._changed.add(extent)
        self._idle_blank[extent] = None  # until a block of it is taken, which is at once
        if not self._is_open[extent]:
            self._is_open[extent] = True
            heappush(self._open, extent)

    def _give_up(self, extent: int) -> None:
        for block in self._cached_blocks(self._extents.blocks(extent)):
            del self._cached[block.block_id]
            self._evict(block)
            self._blanks[extent][block.block_id] = block
        self._num_cached[extent] = 0
        self._idle_blank.pop(extent, None)
        self._idle_cached.pop(extent, None)
        self._is_backed[extent] = False
        self._num_dark_blocks += len(self._blanks[extent])
        self._changed.add(extent)
        heappush(self._dark, extent)

    def _cached_blocks(self, block_ids: Iterable[int]) -> list[Block]:
        found = (self._cached.get(block_id) for block_id in block_ids)
        return [block for block in found if block is not None]
