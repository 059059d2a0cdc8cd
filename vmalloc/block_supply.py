"""Where blocks come from and go to: the pool, its memory and the cached prefixes together.

Owns: the watermarks.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import numpy as np

from .block_pool import BlockPool, Blocks
from .block_storage import BlockStorage
from .block_views import BlockData
from .config import KVCacheConfig
from .errors import ConfigError
from .prefix_index import PrefixIndex


@dataclass(frozen=True, slots=True)
class _SleepImage:
    """Blocks that keep their ids while the cache sleeps, and their contents."""

    blocks: Blocks
    data: BlockData


class BlockSupply:
    """Takes and gives back blocks, evicting cached prefixes where there are too few.

    Attributes:
        block_bytes: one block, over all regions.
        num_allocated: blocks handed out so far.
        num_discards: times that memory went back to the system.
        scratch: the block that padded batches write to, held for good once it was taken.
    """

    def __init__(
        self,
        config: KVCacheConfig,
        pool: BlockPool,
        storage: BlockStorage,
        index: PrefixIndex,
        block_bytes: int,
    ) -> None:
        self.block_bytes = block_bytes
        self.num_allocated = 0
        self.num_discards = 0
        self.scratch: Blocks = np.zeros(0, np.int32)
        self._config = config
        self._pool = pool
        self._storage = storage
        self._index = index
        self._sleep: _SleepImage | None = None
        # Bits of one type read as another may be NaN, which a masked row must never hold.
        mixes_dtypes = len({layer.dtype for layer in config.layers}) > 1
        self._clears_reused = config.zero_on_reuse or mixes_dtypes
        self._low = self._high = 0
        self.set_capacity(config.capacity_bytes)

    @property
    def is_asleep(self) -> bool:
        return self._sleep is not None

    @property
    def num_created(self) -> int:
        """Blocks that have memory: all of them, where it cannot be given back."""
        return self._pool.num_created if self._storage.gives_back else self._pool.num_blocks

    @property
    def num_asleep(self) -> int:
        """Blocks whose contents are in host memory because the cache sleeps."""
        return 0 if self._sleep is None else len(self._sleep.blocks)

    def set_capacity(self, capacity_bytes: int) -> None:
        """Move the cap and the watermarks; what is cached beyond it goes."""
        capacity = capacity_bytes // self.block_bytes
        if not 1 <= capacity <= self._pool.num_blocks:
            raise ConfigError(
                f"the new cap in pages is {capacity}; it must be at least 1 and at most "
                f"{self._pool.num_blocks}, for which address space is reserved"
            )
        self._pool.capacity = capacity
        self._low = int(capacity * self._config.low_watermark)
        self._high = ceil(capacity * self._config.high_watermark)
        self._evict_until(capacity)
        self.give_back_surplus()

    def has_room(self, count: int, *, above_low: bool = False) -> bool:
        """Whether ``count`` more blocks can be committed, cached ones given up if need be."""
        return count + (self._low if above_low else 0) <= self._pool.room

    def try_allocate(self, count: int) -> Blocks | None:
        """Take blocks, or None. What is cached is evicted only if that is enough."""
        if not self.has_room(count):
            return None
        self._evict_until(self._pool.capacity - count)
        blocks = self._pool.allocate(count)
        if self._clears_reused:
            self._storage.clear(blocks[self._pool.was_used[blocks]])
        self._pool.was_used[blocks] = True
        self.num_allocated += count
        return blocks

    def take_scratch(self) -> int:
        """The scratch block, taken now if it was not.

        Raises:
            ConfigError: no block is left for it.
        """
        if not len(self.scratch):
            blocks = self.try_allocate(1)
            if blocks is None:
                raise ConfigError(
                    "no block is left for batches to be padded with; ask for a padded view once "
                    "before the first sequence is admitted"
                )
            self._pool.add_holds(blocks, with_refs=True)
            self._pool.drop_seq_refs(blocks)
            self.scratch = blocks
        return int(self.scratch[0])

    def trim(self, keep_free: int) -> int:
        """Give free blocks back to the system until ``keep_free`` are left; the count."""
        if not self._storage.gives_back:
            return 0
        gone = self._pool.trim(keep_free)
        if len(gone):
            self._storage.discard(gone, self._pool.has_memory)
            self.num_discards += 1
        return len(gone)

    def give_back_surplus(self) -> None:
        """Give back free blocks above the high watermark, and all that the cap does not allow."""
        self.trim(min(max(self._pool.num_unused, 0), self._high))

    def sleep(self) -> None:
        """Move every block in use to host memory and give all memory back.

        Requires: a storage that gives it back.
        """
        in_use = self._pool.refs > 0
        in_use[self.scratch] = False  # what it holds is of no use
        blocks = np.flatnonzero(in_use).astype(np.int32)
        self._sleep = _SleepImage(blocks, self._storage.read(blocks))
        self._pool.trim(0)
        everything = np.arange(self._pool.num_blocks, dtype=np.int32)
        self._storage.discard(everything, np.zeros(self._pool.num_blocks, np.bool_))
        self.num_discards += 1

    def wake(self) -> None:
        """Undo ``sleep``, if there was one."""
        if self._sleep is not None:
            self._storage.write(self._sleep.blocks, self._sleep.data)
            self._sleep = None

    def close(self) -> None:
        """Give all memory back for good."""
        self._sleep = None
        self._storage.close()

    def _evict_until(self, max_in_use: int) -> None:
        surplus = self._pool.num_in_use - max_in_use
        if surplus > 0:
            self._index.evict(surplus)
