"""A deciding cache and one that repeats what it did, in one process; messages travel as bytes."""

from __future__ import annotations

from collections.abc import Callable

from vmalloc import KVCacheConfig, PagedKVCache, VirtualKVCache, _core
from vmalloc.backend import KVBackend
from vmalloc.core_setup import make_driver
from vmalloc.plans import (
    PlanExecutor,
    PlanningKVCache,
    RankCache,
    decode_plan,
    encode_plan,
    take_ledger,
)


class Pair:
    """Two caches of one config, and the grants between them.

    Args:
        other_limit: pages that the other rank's machine has; None: as many as the cap.
    """

    def __init__(self, config: KVCacheConfig, kind: str, other_limit: int | None = None) -> None:
        self.config = config
        self.other_limit = other_limit
        self.num_refused = 0
        self.is_lost = False  # whether the other cache waits for a reset
        self.drivers: list[_core.FaultDriver] = []
        make: Callable[[], KVBackend] = self._virtual if kind == "virtual" else self._paged
        self.other = make()
        self.executor = PlanExecutor(self.other)
        if other_limit is not None:
            assert isinstance(self.other, VirtualKVCache)
            self.other.pause_worker()  # its calls would meet the faults that are meant for grants
        self.leader = PlanningKVCache(make(), self)
        self.granted = 0
        self.leader.begin()

    def _virtual(self) -> KVBackend:
        driver = _core.FaultDriver(make_driver(self.config))
        self.drivers.append(driver)
        return VirtualKVCache(self.config, driver=driver)

    def _paged(self) -> KVBackend:
        return PagedKVCache(self.config)

    def try_grant(self, num_pages: int) -> bool:
        caches = (self.leader_cache, self.other)
        answers = []
        for cache in caches:
            assert isinstance(cache, VirtualKVCache)
            is_short = cache is self.other and num_pages > (self.other_limit or num_pages)
            if is_short:
                self.drivers[0].fail_call(0, _core.Fault.OUT_OF_MEMORY)
            answers.append(cache.supply.try_grant(num_pages))
            assert answers[-1] != is_short
        is_granted = all(answers)
        self.num_refused += not is_granted
        if is_granted:
            self.granted = num_pages
        for cache in caches:
            assert isinstance(cache, VirtualKVCache)
            cache.wait_worker()  # which has every chance to take what is not granted yet
            cache.supply.end_grant(self.granted, keeps_pages=is_granted)
        return is_granted

    @property
    def leader_cache(self) -> KVBackend:
        return self.leader.cache

    def trim(self, keep_free_pages: int) -> int:
        self.tell()
        ranks = [RankCache(cache) for cache in (self.leader_cache, self.other)]
        num_trimmed = [rank.trim(keep_free_pages) for rank in ranks]
        self.granted = min(rank.num_created for rank in ranks)
        for rank in ranks:
            rank.keep(self.granted)
        self.leader.note_grant(self.granted)
        return num_trimmed[0]

    def try_sleep(self) -> bool:
        raise NotImplementedError

    def try_wake(self) -> bool:
        raise NotImplementedError

    def lose_plan(self) -> None:
        """The other cache fails at the start of the plan, and does nothing until it is reset."""
        self.leader.take_plan()
        self.is_lost = True

    def tell(self) -> None:
        """Let the other cache do what the deciding one did."""
        if self.is_lost:
            self.leader.take_plan()
            return
        self.executor.carry_out(decode_plan(encode_plan(self.leader.take_plan())))
        if self.other_limit is not None:
            assert isinstance(self.other, VirtualKVCache)
            self.other.run_worker(2)

    def check(self) -> None:
        """Both hold the same, and their books balance."""
        self.leader_cache.check_invariants()
        self.other.check_invariants()
        differences = take_ledger(self.leader_cache).differences(take_ledger(self.other))
        assert not differences, "\n".join(differences)
        if isinstance(self.other, VirtualKVCache):  # none was created on demand
            granted = self.leader.granted_pages
            for cache in (self.leader_cache, self.other):
                stats = cache.stats()
                least = min(granted, stats.capacity_bytes // stats.page_bytes)
                assert least <= stats.created_pages <= granted, (least, stats, granted)

    def start_over(self) -> None:
        """What all ranks do after a plan that one could not carry out."""
        self.leader_cache.free(self.leader_cache.live_seq_ids())  # type: ignore[attr-defined]
        self.leader.forget_everything()
        self.is_lost = False
        self.executor.drop_everything(self.leader.stats().capacity_bytes)

    def close(self) -> None:
        self.leader.close()
        self.other.close()
