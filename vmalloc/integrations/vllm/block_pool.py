"""vLLM's block pool over a queue that knows which blocks have memory.

Owns: nothing of its own.  Thread-safety: none; the scheduler's thread.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.block_pool import BlockPool

from .extent_queue import ExtentQueue
from .extents import Extents


class ElasticBlockPool(BlockPool):  # type: ignore[misc]
    """vLLM's pool, whose free blocks are only those that the memory limit lets one have."""

    free_block_queue: ExtentQueue

    @classmethod
    def take_over(cls, pool: Any, extents: Extents) -> ElasticBlockPool:
        """Make an ``ElasticBlockPool`` of a fresh ``BlockPool``.

        vLLM's managers build the pool themselves and have no switch for its class; they and every
        block hold references to the object, so it is changed in place. The class adds no state.
        """
        pool.__class__ = cls
        free = pool.free_block_queue.get_all_free_blocks()
        pool.free_block_queue = ExtentQueue(free, extents, pool._maybe_evict_cached_block)
        assert isinstance(pool, cls)
        return pool

    def get_num_free_blocks(self) -> int:
        return self.free_block_queue.num_obtainable

    def get_usage(self) -> float:
        """Share in use of the blocks that the cap lets one have, whatever the limit is now."""
        queue = self.free_block_queue
        return (queue.num_used_blocks - 1) / max(queue.num_blocks_under_cap - 1, 1)

    def reset_prefix_cache(self) -> bool:
        queue, limit = self.free_block_queue, self.free_block_queue.limit
        queue.limit = self.num_gpu_blocks  # vLLM counts the blocks in use as those not free
        try:
            done: bool = super().reset_prefix_cache()
        finally:
            queue.limit = limit
        return done
