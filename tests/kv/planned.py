"""A deciding cache and one that repeats what it did, in one process; messages travel as bytes."""

from __future__ import annotations

from collections.abc import Callable

from vmalloc import KVCacheConfig, PagedKVCache, VirtualKVCache, _core
from vmalloc.backend import KVBackend
from vmalloc.core_setup import make_driver
from vmalloc.plans import PlanExecutor, PlanningKVCache, decode_plan, encode_plan, take_ledger


class Pair:
    """Two caches of one config, and the grants between them.

    Args:
        other_limit: pages that the other rank's machine has; None: as many as the cap.
    """

    def __init__(self, config: KVCacheConfig, kind: str, other_limit: int | None = None) -> None:
        self.config = config
        self.other_limit = other_limit
        self.num_refused = 0
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
        raise NotImplementedError

    def try_sleep(self) -> bool:
        raise NotImplementedError

    def try_wake(self) -> bool:
        raise NotImplementedError

    def tell(self) -> None:
        """Let the other cache do what the deciding one did."""
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

    def close(self) -> None:
        self.leader.close()
        self.other.close()
