"""Which running group gives up its memory, and how: by swap or by recompute.

Owns: the counters of preemption.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from .group_memory import GroupMemory
from .preemption_cost import PreemptionCost, PreemptionKind
from .sequence_group import GroupStatus, SequenceGroup

if TYPE_CHECKING:
    from ..backend import KVBackend, KVCacheStats
    from .config import PreemptionMode

logger = logging.getLogger(__name__)


def choose_victim(running: Collection[SequenceGroup]) -> SequenceGroup:
    """The group that ranks last, of those that made progress since they were last preempted.

    The group that ranks first is never given up for another: it always gets to its end, and then
    the next one is first, so every group does.
    """
    candidates = [group for group in running if not group.is_shielded]
    if len(candidates) == 1 and candidates[0] is min(running, key=_rank):
        candidates = []
    return max(candidates or running, key=_rank)


class Preemptor:
    """Takes a group's KV out of the cache.

    Args:
        mode: ``"swap"`` copies it to host memory and falls back to recompute where that is full;
            ``"recompute"`` drops it; ``"auto"`` takes what ``cost`` finds cheaper.
        clock: seconds, for measuring copies.

    Attributes:
        num_swaps, num_recomputes: groups preempted so far, by kind.
        num_recomputed_tokens: computed tokens that recomputes dropped.
        num_swapped_bytes: bytes that swaps copied to host memory.
    """

    def __init__(
        self,
        backend: KVBackend,
        memory: GroupMemory,
        *,
        mode: PreemptionMode,
        cost: PreemptionCost,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._backend = backend
        self._memory = memory
        self._mode = mode
        self._cost = cost
        self._clock = clock
        self.num_swaps = 0
        self.num_recomputes = 0
        self.num_recomputed_tokens = 0
        self.num_swapped_bytes = 0

    def preempt(self, group: SequenceGroup) -> PreemptionKind:
        """Take the group's KV; its status says in which queue it belongs now."""
        before = self._backend.stats()
        num_tokens = group.num_distinct_tokens()
        is_swapped = self._chooses_swap(group, num_tokens, before.page_bytes)
        started = self._clock()
        is_swapped = is_swapped and self._memory.try_swap_out(group)
        seconds = self._clock() - started
        if not is_swapped:
            self.drop(group)
        after = self._backend.stats()
        group.is_shielded = True
        group.metrics.num_preemptions += 1
        if is_swapped:
            num_bytes = (after.swap_out_pages - before.swap_out_pages) * before.page_bytes
            self._cost.observe_swap(num_bytes, seconds)
            group.status = GroupStatus.SWAPPED
            self.num_swaps += 1
            self.num_swapped_bytes += num_bytes
            what = f"swap, {num_bytes} bytes moved"
        else:
            self.num_recomputes += 1
            self.num_recomputed_tokens += num_tokens
            what = f"recompute, {num_tokens} computed tokens dropped"
        logger.info(
            "preempted request %s by %s; others could take %d pages before, %d after",
            group.request_id,
            what,
            _available_pages(before),
            _available_pages(after),
        )
        return "swap" if is_swapped else "recompute"

    def drop(self, group: SequenceGroup) -> None:
        """Give the KV of a group back, swapped out or not; it waits to be computed again."""
        self._memory.free(group)
        group.forget_kv()
        group.status = GroupStatus.WAITING

    def try_return(self, group: SequenceGroup) -> bool:
        """Bring a swapped-out group's KV back."""
        before = self._backend.stats()
        started = self._clock()
        if not self._memory.try_swap_in(group):
            return False
        seconds = self._clock() - started
        num_pages = self._backend.stats().swap_in_pages - before.swap_in_pages
        self._cost.observe_swap(num_pages * before.page_bytes, seconds)
        group.status = GroupStatus.RUNNING
        return True

    def _chooses_swap(self, group: SequenceGroup, num_tokens: int, page_bytes: int) -> bool:
        config = self._backend.config
        if self._mode == "recompute" or config.swap_bytes == 0 or num_tokens == 0:
            return False
        if self._mode == "swap":
            return True
        # What it found in the prefix cache is likely still there, or stays where it is.
        num_own_tokens = max(0, num_tokens - group.num_shared_tokens)
        num_bytes = num_own_tokens * config.token_bytes
        num_bytes = -(-num_bytes // page_bytes) * page_bytes  # each page is copied whole
        return self._cost.cheaper(num_own_tokens, num_bytes) == "swap"


def _available_pages(stats: KVCacheStats) -> int:
    """Free pages, those that come back after this step, and those that nobody needs."""
    unneeded_bytes = stats.ahead_bytes + stats.parked_bytes + stats.cached_bytes
    return stats.free_pages + stats.retired_pages + unneeded_bytes // stats.page_bytes


def _rank(group: SequenceGroup) -> tuple[int, int]:
    return group.rank
