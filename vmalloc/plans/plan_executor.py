"""Does on this rank's cache what the deciding rank did on its own.

Owns: nothing.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ..backend import KVBackend, SequenceGroupSpec, Step
from ..errors import InvariantError
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


class PlanExecutor:
    """The other end of a ``PlanningKVCache``: a cache that repeats what that one did.

    Args:
        cache: this rank's cache, of a config that differs in the number of heads at most.
    """

    def __init__(self, cache: KVBackend) -> None:
        self._cache = cache
        self._supply = cache.supply if isinstance(cache, VirtualKVCache) else None
        self._token_ids: dict[int, list[int]] = {}
        self._pins: list[tuple[list[int], str]] = []
        self._step: Step | None = None

    @property
    def seq_ids(self) -> list[int]:
        """Sequences that the cache has, swapped-out ones too."""
        return list(self._token_ids)

    def carry_out(self, operations: Iterable[Operation]) -> None:
        """Do ``operations`` in their order.

        Raises:
            InvariantError: the outcome of one is another than on the rank that decides. Those
                before it are done; the cache is sound, and differs from the other's.
            DriverError: likewise, for a driver that failed.
        """
        for operation in operations:
            self._do(operation)

    def drop_everything(self, capacity_bytes: int) -> None:
        """Free every sequence and forget every prefix, after a plan that was not carried out.

        ``capacity_bytes``: the other cache's cap, whose last change may be among what was lost.
        """
        self.end_step()
        self._cache.free(self.seq_ids, keep_prefix=False)
        self._token_ids.clear()
        for token_ids, salt in self._pins:
            self._cache.unpin_prefix(token_ids, salt)
        self._pins.clear()
        self._cache.flush_prefixes()
        if self._cache.stats().capacity_bytes != capacity_bytes:
            self._cache.resize(capacity_bytes)

    def end_step(self) -> None:
        """Close a step whose end was not told."""
        if self._step is not None:
            step, self._step = self._step, None
            self._cache.end_step(step)

    def _do(self, operation: Operation) -> None:
        match operation:
            case Admit():
                self._admit(operation)
            case Extend():
                with self._repeating(operation.notes):
                    is_done = self._cache.try_extend(operation.seq_ids, operation.num_tokens)
                _check(operation, is_done, operation.is_done)
            case Truncate():
                self._cache.truncate(operation.seq_id, operation.num_tokens)
                del self._token_ids[operation.seq_id][operation.num_tokens :]
            case Fork():
                self._fork(operation)
            case Reorder():
                self._reorder(operation)
            case Register():
                token_ids = self._token_ids[operation.seq_id]
                token_ids[operation.start :] = operation.token_ids
                self._cache.register_tokens(operation.seq_id, token_ids, len(token_ids))
            case Free():
                self._cache.free(operation.seq_ids, operation.keep_prefix)
                for seq_id in operation.seq_ids:
                    del self._token_ids[seq_id]
            case SwapOut():
                is_done = self._cache.try_swap_out(operation.seq_ids)
                _check(operation, is_done, operation.is_done)
            case SwapIn():
                with self._repeating(operation.notes):
                    is_done = self._cache.try_swap_in(operation.seq_ids)
                _check(operation, is_done, operation.is_done)
            case Prefetch():
                self._cache.prefetch(operation.num_tokens)
            case BeginStep():
                self._step = self._cache.begin_step()
            case EndStep():
                with self._repeating(operation.notes):
                    self.end_step()
            case Pin():
                self._pin(operation)
            case Flush():
                self._cache.flush_prefixes()
            case Resize():
                with self._repeating(operation.notes):
                    self._cache.resize(operation.capacity_bytes)

    def _admit(self, operation: Admit) -> None:
        group = SequenceGroupSpec(
            tuple(operation.seq_ids),
            operation.num_tokens,
            operation.prompt_tokens,
            operation.final_tokens,
            operation.cache_salt,
        )
        hit = None
        if operation.hit is not None:
            hit = self._cache.match_prefix(operation.hit, operation.cache_salt or "")
        with self._repeating(operation.notes):
            reservation = self._cache.try_admit(group, hit)
        num_cached = -1 if reservation is None else reservation.num_cached_tokens
        _check(operation, num_cached, operation.num_cached_tokens)
        if reservation is not None:
            self._token_ids.update({seq_id: [] for seq_id in operation.seq_ids})

    def _fork(self, operation: Fork) -> None:
        with self._repeating(operation.notes):
            is_done = self._cache.try_fork(
                operation.parent_id, operation.child_ids, operation.num_tokens
            )
        _check(operation, is_done, operation.is_done)
        if is_done:
            token_ids = self._token_ids[operation.parent_id]
            for child_id in operation.child_ids:
                self._token_ids[child_id] = token_ids[: operation.num_tokens]

    def _reorder(self, operation: Reorder) -> None:
        with self._repeating(operation.notes):
            is_done = self._cache.try_reorder(operation.seq_ids, operation.parent_idx)
        _check(operation, is_done, operation.is_done)
        if is_done:
            before = [self._token_ids[seq_id] for seq_id in operation.seq_ids]
            for seq_id, idx in zip(operation.seq_ids, operation.parent_idx, strict=True):
                self._token_ids[seq_id] = list(before[idx])

    def _pin(self, operation: Pin) -> None:
        token_ids, salt = operation.token_ids, operation.salt
        if operation.is_pinned:
            if self._cache.pin_prefix(token_ids, salt):
                self._pins.append((token_ids, salt))
        elif self._cache.unpin_prefix(token_ids, salt):
            self._pins.remove((token_ids, salt))

    @contextmanager
    def _repeating(self, notes: list[int]) -> Iterator[None]:
        """Go by the notes of the other cache, and by all of them."""
        if self._supply is None:
            yield
            return
        script = self._supply.script = SupplyScript(list(notes))
        try:
            yield
        finally:
            self._supply.script = None
        if script.notes:
            raise InvariantError(
                f"this cache asks for pages {len(script.notes)} times less than the one that "
                "decides"
            )


def _check(operation: Operation, outcome: int, expected: int) -> None:
    if outcome != expected:
        raise InvariantError(
            f"{type(operation).__name__} came to {outcome} on this rank and to {expected} on the "
            "one that decides"
        )
