"""Chooses a replica for a request: where its prefix is cached, unless that one is loaded.

Owns: a random generator.  Thread-safety: none; one event loop.

The rule:

1. Of the replicas that were sent the longest beginning of the prompt, the least busy one is taken,
   unless it is *loaded*: it has over ``max_imbalance`` requests more than the least busy replica;
   or its KV pages are full (95 % held by running requests, and requests wait) and another's are
   not.
2. Else the better of two that are drawn at random: one whose pages are not full, then the one with
   fewer requests, then the one that was sent fewer prefixes so far. So cold prefixes spread.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

FULL_USAGE = 0.95


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a replica is.

    Attributes:
        num_requests: requests that it was sent and that have not ended.
        page_usage: share of its KV pages that running requests hold.
        num_waiting: requests that wait for pages or for their first step.
        num_prefixes: blocks of prefixes that it was sent so far.
    """

    num_requests: int = 0
    page_usage: float = 0.0
    num_waiting: int = 0
    num_prefixes: int = 0

    @property
    def is_full(self) -> bool:
        """Whether a further request would wait for pages."""
        return self.page_usage >= FULL_USAGE and self.num_waiting > 0


class Placement:
    """The rule above; with ``routing="random"`` a draw among all replicas.

    Args:
        routing: ``"prefix"`` or ``"random"``.
        max_imbalance: see the rule.
        seed: of the draws; None: a random one.
    """

    def __init__(self, routing: str, max_imbalance: int, seed: int | None = None) -> None:
        self._is_random = routing == "random"
        self._max_imbalance = max_imbalance
        self._random = random.Random(seed)

    def choose(self, loads: Mapping[str, Load], matched: Mapping[str, int]) -> str:
        """One of ``loads``, which is not empty. ``matched``: leading blocks that a replica was
        sent before."""
        names = sorted(loads)
        if self._is_random:
            return self._random.choice(names)
        longest = max((matched.get(name, 0) for name in names), default=0)
        if longest > 0:
            warm = [name for name in names if matched.get(name, 0) == longest]
            best = min(warm, key=lambda name: loads[name].num_requests)
            if not self._is_loaded(best, loads):
                return best
        pair = self._random.sample(names, min(2, len(names)))
        return min(pair, key=lambda name: _cost(loads[name]))

    def _is_loaded(self, name: str, loads: Mapping[str, Load]) -> bool:
        least = min(load.num_requests for load in loads.values())
        if loads[name].num_requests - least > self._max_imbalance:
            return True
        return loads[name].is_full and not all(load.is_full for load in loads.values())


def _cost(load: Load) -> tuple[bool, int, int]:
    return (load.is_full, load.num_requests, load.num_prefixes)
