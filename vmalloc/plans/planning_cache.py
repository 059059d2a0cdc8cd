"""The cache of the rank that decides: it does what it is told, and notes it for the others.

Owns: the operations that the others were not told yet, and what they know of each sequence's
tokens.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from ..backend import (
    KVBackend,
    KVBatchBuffers,
    KVBatchView,
    KVCacheStats,
    PrefixCacheStats,
    PrefixHit,
    Reservation,
    SequenceGroupSpec,
    Step,
)
from ..errors import ConfigError
from ..kv_cache import VirtualKVCache
from ..supply_script import SupplyScript
from .operations import (
    Admit,
    BeginStep,
    EndStep,
    Extend,
    Flush,
    Fork,
    Free,
    Operation,
    Pin,
    Prefetch,
    Register,
    Reorder,
    Resize,
    SwapIn,
    SwapOut,
    Truncate,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..config import KVCacheConfig
    from ..page_map import PageMap

GRANT_SHARE = 4
"""Grants grow by this part of what is granted, at least: each is a round of messages."""

MIN_GRANT_PAGES = 16
MAX_GRANT_SHARE = 16
"""And by this part of the cap at most, unless more is needed at once."""


class PageGrants(Protocol):
    """What the planning cache asks of all ranks at once, itself included."""

    def try_grant(self, num_pages: int) -> bool:
        """Have ``num_pages`` created on every rank, or on none."""
        ...

    def trim(self, keep_free_pages: int) -> int:
        """Give free pages back on every rank; the count of this one. No plan is pending."""
        ...

    def try_sleep(self) -> bool:
        """All ranks sleep, or none. No plan is pending."""
        ...

    def try_wake(self) -> bool:
        """All ranks wake, or none."""
        ...


class PlanningKVCache:
    """``KVBackend`` around another, for the rank that schedules.

    A virtual cache creates no page on demand: pages are granted on all ranks or on none, before any
    of them is used. So a plan that worked here finds its pages everywhere, and a rank whose machine
    has no more makes the call here answer None or False, as if this one had run out.

    Args:
        cache: this rank's cache, which keeps only what it was told through here.
        grants: how pages are granted on all ranks.
    """

    def __init__(self, cache: KVBackend, grants: PageGrants) -> None:
        self._cache = cache
        self._grants = grants
        self._operations: list[Operation] = []
        self._num_known: dict[int, int] = {}
        self._supply = cache.supply if isinstance(cache, VirtualKVCache) else None
        self._granted_pages = 0
        self._pins: list[tuple[list[int], str]] = []
        self._last_hit: PrefixHit | None = None  # None once a call may have changed it
        self.is_broken = False

    def begin(self) -> None:
        """From now on no rank creates pages on demand. To be called once, before anything else.

        Raises ``ConfigError`` if a rank has no memory for the first pages.
        """
        if self._supply is None:
            return
        self._grants.trim(self._supply.max_pages)  # what workers created until now may differ
        if not self._grow(1):
            raise ConfigError(
                f"the cap on KV memory is {self.config.capacity_bytes} bytes; a rank has no "
                "memory for the first of its pages"
            )

    @property
    def cache(self) -> KVBackend:
        """This rank's cache."""
        return self._cache

    @property
    def granted_pages(self) -> int:
        """Pages that every rank has created; 0 for paged caches, which reserve at start."""
        return self._granted_pages

    @property
    def has_plan(self) -> bool:
        """Whether the others were not told everything."""
        return bool(self._operations)

    def take_plan(self) -> list[Operation]:
        """What was done since the last call, in order."""
        operations, self._operations = self._operations, []
        return operations

    def forget_everything(self) -> None:
        """Forget every prefix, as no rank has any sequence, and what the others were not told.

        Pinned ones too: another rank may not have got as far as the pin.
        """
        self._operations.clear()
        self._num_known.clear()
        for token_ids, salt in self._pins:
            self._cache.unpin_prefix(token_ids, salt)
        self._pins.clear()
        self._cache.flush_prefixes()
        self.is_broken = False

    def note_grant(self, num_pages: int) -> None:
        """Pages that every rank has created now, where that changed by a trim or a sleep."""
        self._granted_pages = num_pages

    @property
    def name(self) -> str:
        return self._cache.name

    @property
    def config(self) -> KVCacheConfig:
        return self._cache.config

    def max_seq_tokens(self) -> int:
        return self._cache.max_seq_tokens()

    def bytes_for(self, num_tokens: int) -> int:
        return self._cache.bytes_for(num_tokens)

    def can_admit(self, num_tokens: int, num_seqs: int = 1) -> bool:
        return self._cache.can_admit(num_tokens, num_seqs)

    def prefetch(self, num_tokens: int) -> None:
        self._cache.prefetch(num_tokens)
        self._operations.append(Prefetch(num_tokens))

    def match_prefix(self, token_ids: Sequence[int], salt: str = "") -> PrefixHit:
        hit = self._last_hit = self._cache.match_prefix(token_ids, salt)
        return hit

    def try_admit(
        self, group: SequenceGroupSpec, hit: PrefixHit | None = None
    ) -> Reservation | None:
        if hit is not None and hit is not self._last_hit:
            hit = self._cache.match_prefix(hit.token_ids, hit.salt)  # the others look now
        is_hit = hit is not None and hit.num_tokens > 0
        with self._noting() as notes:
            reservation = self._cache.try_admit(group, hit)
        # Refused at once, it changed nothing; but a hit that was tried was used.
        if reservation is not None or len(notes) > 1 or (notes and is_hit):
            self._operations.append(
                Admit(
                    list(group.seq_ids),
                    group.num_tokens,
                    group.prompt_tokens,
                    group.final_tokens,
                    group.cache_salt,
                    None if hit is None else list(hit.token_ids),
                    -1 if reservation is None else reservation.num_cached_tokens,
                    notes,
                )
            )
        if reservation is not None:
            self._num_known.update(dict.fromkeys(group.seq_ids, 0))
        return reservation

    def try_extend(self, seq_ids: Sequence[int], num_tokens: Sequence[int]) -> bool:
        with self._noting() as notes:
            is_done = self._cache.try_extend(seq_ids, num_tokens)
        self._operations.append(Extend(list(seq_ids), list(num_tokens), is_done, notes))
        return is_done

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        with self._noting():
            self._cache.truncate(seq_id, num_tokens)
        self._num_known[seq_id] = min(self._num_known[seq_id], num_tokens)
        self._operations.append(Truncate(seq_id, num_tokens))

    def try_fork(
        self, parent_id: int, child_ids: Sequence[int], num_tokens: int | None = None
    ) -> bool:
        with self._noting() as notes:
            is_done = self._cache.try_fork(parent_id, child_ids, num_tokens)
        self._operations.append(Fork(parent_id, list(child_ids), num_tokens, is_done, notes))
        if is_done:
            num_known = self._num_known[parent_id]
            if num_tokens is not None:
                num_known = min(num_known, num_tokens)
            self._num_known.update(dict.fromkeys(child_ids, num_known))
        return is_done

    def try_reorder(self, seq_ids: Sequence[int], parent_idx: Sequence[int]) -> bool:
        with self._noting() as notes:
            is_done = self._cache.try_reorder(seq_ids, parent_idx)
        self._operations.append(Reorder(list(seq_ids), list(parent_idx), is_done, notes))
        if is_done:
            known = [self._num_known[seq_id] for seq_id in seq_ids]
            self._num_known.update(
                {seq_id: known[idx] for seq_id, idx in zip(seq_ids, parent_idx, strict=True)}
            )
        return is_done

    def register_tokens(self, seq_id: int, token_ids: Sequence[int], num_tokens: int) -> None:
        with self._noting():
            self._cache.register_tokens(seq_id, token_ids, num_tokens)
        start = min(self._num_known[seq_id], num_tokens)
        self._operations.append(Register(seq_id, start, list(token_ids[start:num_tokens])))
        self._num_known[seq_id] = num_tokens

    def free(self, seq_ids: Sequence[int], keep_prefix: bool = True) -> None:
        with self._noting():
            self._cache.free(seq_ids, keep_prefix)
        self._operations.append(Free(list(seq_ids), keep_prefix))
        for seq_id in seq_ids:
            del self._num_known[seq_id]

    def try_swap_out(self, seq_ids: Sequence[int]) -> bool:
        with self._noting():
            is_done = self._cache.try_swap_out(seq_ids)
        if is_done:  # else nothing happened, and another rank might have had the memory
            self._operations.append(SwapOut(list(seq_ids), is_done))
        return is_done

    def try_swap_in(self, seq_ids: Sequence[int]) -> bool:
        with self._noting() as notes:
            is_done = self._cache.try_swap_in(seq_ids)
        self._operations.append(SwapIn(list(seq_ids), is_done, notes))
        return is_done

    def pin_prefix(self, token_ids: Sequence[int], salt: str = "") -> int:
        with self._noting():
            num_pinned = self._cache.pin_prefix(token_ids, salt)
        self._operations.append(Pin(list(token_ids), salt, is_pinned=True))
        if num_pinned:
            self._pins.append((list(token_ids), salt))
        return num_pinned

    def unpin_prefix(self, token_ids: Sequence[int], salt: str = "") -> int:
        with self._noting():
            num_unpinned = self._cache.unpin_prefix(token_ids, salt)
        self._operations.append(Pin(list(token_ids), salt, is_pinned=False))
        if num_unpinned:
            self._pins.remove((list(token_ids), salt))
        return num_unpinned

    def flush_prefixes(self) -> int:
        with self._noting():
            num_freed = self._cache.flush_prefixes()
        self._operations.append(Flush())
        return num_freed

    def prefix_stats(self) -> PrefixCacheStats:
        return self._cache.prefix_stats()

    def begin_step(self, stream: int | None = None) -> Step:
        with self._noting():
            step = self._cache.begin_step(stream)
        self._operations.append(BeginStep())
        return step

    def end_step(self, step: Step) -> None:
        with self._noting() as notes:
            self._cache.end_step(step)
        self._operations.append(EndStep(notes))

    def wait_worker(self) -> None:
        self._cache.wait_worker()

    def layer_views(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        return self._cache.layer_views(layer_idx)

    def batch_view(
        self,
        seq_ids: Sequence[int],
        num_new_tokens: Sequence[int],
        *,
        out: KVBatchBuffers | None = None,
        pad_to: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> KVBatchView:
        return self._cache.batch_view(
            seq_ids, num_new_tokens, out=out, pad_to=pad_to, max_seqlen_k=max_seqlen_k
        )

    def stats(self) -> KVCacheStats:
        return self._cache.stats()

    def page_map(self) -> PageMap:
        return self._cache.page_map()

    def trim(self, keep_free_pages: int = 0) -> int:
        """Give free pages back on every rank; the count is this rank's."""
        return self._grants.trim(keep_free_pages)

    def resize(self, capacity_bytes: int) -> None:
        with self._noting() as notes:
            self._cache.resize(capacity_bytes)
        self._operations.append(Resize(capacity_bytes, notes))
        if self._supply is not None:
            # Pages beyond the cap go, and none may come back on demand when it rises again.
            self._grants.trim(self._supply.max_pages)

    def try_sleep(self) -> bool:
        return self._grants.try_sleep()

    def try_wake(self) -> bool:
        return self._grants.try_wake()

    def check_invariants(self) -> None:
        self._cache.check_invariants()

    def close(self) -> None:
        self._operations.clear()
        self._cache.close()

    def __enter__(self) -> PlanningKVCache:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    @contextmanager
    def _noting(self) -> Iterator[list[int]]:
        """Note what a call comes to; one that throws, other than to refuse, may have done half."""
        script = SupplyScript(grow=self._grow)
        self._last_hit = None
        if self._supply is not None:
            self._supply.script = script
        try:
            yield script.notes
        except ConfigError:
            raise
        except BaseException:
            self.is_broken = True
            raise
        finally:
            if self._supply is not None:
                self._supply.script = None

    def _grow(self, num_pages: int) -> bool:
        """Have at least ``num_pages`` more granted on all ranks; False where that is not to be."""
        assert self._supply is not None
        max_pages = self._supply.max_pages
        if self._granted_pages >= max_pages:
            return False
        ahead = max(MIN_GRANT_PAGES, self._granted_pages // GRANT_SHARE)
        ahead = min(ahead, max_pages // MAX_GRANT_SHARE)
        for step in sorted({max(num_pages, ahead), num_pages}, reverse=True):
            wanted = min(self._granted_pages + step, max_pages)
            if self._grants.try_grant(wanted):
                self._granted_pages = wanted
                return True
        return False
