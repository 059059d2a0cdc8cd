"""Remembers which replica was sent which prefix, as a guess at what each has cached.

Owns: a bounded map of keys to replicas.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

MAX_KEYS = 1 << 16
"""8 MiB of prompts' text in blocks of 128 bytes; some 15 MiB of memory."""


class PrefixOwners:
    """Keys and who was sent them, least recently used first.

    Args:
        max_keys: keys it remembers.
    """

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._owners: OrderedDict[bytes, set[str]] = OrderedDict()
        self._num_keys: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._owners)

    def num_keys(self, replica: str) -> int:
        """Keys that the replica was sent."""
        return self._num_keys[replica]

    def match(self, keys: Sequence[bytes]) -> dict[str, int]:
        """Leading keys that each replica was sent; those with none are left out."""
        matched: dict[str, int] = {}
        owners = self._owners.get(keys[0], set()) if keys else set()
        for idx, key in enumerate(keys):
            owners = owners & self._owners.get(key, set())
            if not owners:
                break
            for replica in owners:
                matched[replica] = idx + 1
        return matched

    def add(self, keys: Sequence[bytes], replica: str) -> None:
        """Note that the replica is sent a prompt with these keys."""
        # Backwards: beginnings are what others share, and are forgotten last.
        for key in reversed(keys):
            owners = self._owners.setdefault(key, set())
            if replica not in owners:
                owners.add(replica)
                self._num_keys[replica] += 1
            self._owners.move_to_end(key)
        while len(self._owners) > self._max_keys:
            _, owners = self._owners.popitem(last=False)
            self._num_keys.subtract(owners)

    def keep_only(self, replicas: Iterable[str]) -> None:
        """Forget every other replica: it ended, and its cache with it."""
        gone = set(self._num_keys) - set(replicas)
        if not gone:
            return
        for key in [key for key, owners in self._owners.items() if owners & gone]:
            self._owners[key] -= gone
            if not self._owners[key]:
                del self._owners[key]
        for replica in gone:
            del self._num_keys[replica]
