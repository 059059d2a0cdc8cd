"""KV cache whose address space is reserved once and whose pages arrive on demand.

Owns: seq_id -> slot, the tensor views, and what the prefix index knows. Page counts live in
``_core`` alone.
Thread-safety: none of its own; one engine thread. The worker thread inside ``_core`` is safe.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from types import TracebackType
from typing import NoReturn

from torch import Tensor

from . import _core
from .backend import (
    KVBatchBuffers,
    KVBatchView,
    KVCacheStats,
    PrefixCacheStats,
    PrefixHit,
    Reservation,
    SequenceGroupSpec,
    Step,
)
from .batch_views import Batch, BatchViews
from .config import KVCacheConfig
from .core_setup import make_arena, make_driver
from .device import current_stream, tensor_device
from .errors import ConfigError, DriverError
from .layout import KVLayout, plan_layout
from .page_map import PageMap
from .page_supply import PageSupply
from .prefix_node import PrefixNode
from .reorder import plan_reorder
from .reservation import reserved_tokens
from .scratch_slot import ScratchSlot
from .slot_prefixes import FoundPrefix, SlotPrefixes
from .slot_views import SlotViews
from .swapped_groups import SwappedGroup, SwappedGroups
from .virtual_sleep import VirtualSleep
from .virtual_stats import virtual_page_map, virtual_stats


class VirtualKVCache:
    """``KVBackend`` over contiguous virtual memory.

    Example:
        >>> layer = LayerKVSpec(num_kv_heads=2, k_head_dim=64, v_head_dim=64)
        >>> config = KVCacheConfig(
        ...     layers=(layer,) * 4, max_num_seqs=8, max_seq_len=2048, capacity_bytes=64 << 20
        ... )
        >>> cache = VirtualKVCache(config)
        >>> cache.try_admit(SequenceGroupSpec(seq_ids=(0,), num_tokens=100)) is not None
        True

    Raises:
        ConfigError: a value can never work; the text names it and the limit.
    """

    name = "virtual"

    def __init__(
        self,
        config: KVCacheConfig,
        *,
        driver: _core.Driver | None = None,
        spare_pages: int | None = None,
    ) -> None:
        """Reserve the address space.

        Args:
            driver: an already made core driver, e.g. a ``FaultDriver``; else by config.
            spare_pages: pages that the worker keeps created; None: what suits the driver.
        """
        self._config = config
        self._driver = driver or make_driver(config)
        self._layout = plan_layout(config, self._driver.page_bytes)
        self._core_arena = make_arena(config, self._driver, self._layout, spare_pages)
        self._slot_of: dict[int, int] = {}
        self._len_of: dict[int, int] = {}
        # Sequences whose next row may lie in a shared page: only a truncate leads there.
        self._cut: set[int] = set()
        self._swapped = SwappedGroups()
        self._prefixes = SlotPrefixes(self._core_arena, self._layout)
        index = self._prefixes.index
        self._supply = PageSupply(self._core_arena, config, self._layout, index)
        self._scratch = ScratchSlot(self._core_arena, config, self._layout)
        self._sleep = VirtualSleep(self._core_arena, self._supply, self._scratch, index)
        self._peak_seqs = 0
        self._views = SlotViews(self._core_arena, config, self._layout)
        self._tensor_device = tensor_device(config.device)
        self._batches = BatchViews(self._tensor_device, config.max_seq_len)

    @property
    def config(self) -> KVCacheConfig:
        return self._config

    @property
    def layout(self) -> KVLayout:
        """Byte offsets and strides behind the views."""
        return self._layout

    @property
    def driver_name(self) -> str:
        """``"host"``, ``"cuda"`` or ``"null"``."""
        return self._driver.name

    @property
    def supply(self) -> PageSupply:
        """Where its pages come from, for who makes several caches act as one."""
        return self._supply

    def max_seq_tokens(self) -> int:
        most = self._arena.max_slot_rows()
        num_pages = self._arena.max_pages() - self._scratch.num_pages
        return most if self._scratch.slot is None else self._rows_within(num_pages, most)

    def bytes_for(self, num_tokens: int) -> int:
        config = self._config
        backed = min(num_tokens + config.lookahead_tokens, config.max_seq_len) if num_tokens else 0
        return self._layout.pages_for(backed) * self._layout.page_bytes

    def can_admit(self, num_tokens: int, num_seqs: int = 1) -> bool:
        if len(self._slot_of) + num_seqs > self._config.max_num_seqs:
            return False
        with self._admitting():
            return self._arena.can_admit(num_seqs, num_tokens)

    def prefetch(self, num_tokens: int) -> None:
        self._arena.prefetch(num_tokens)

    def match_prefix(self, token_ids: Sequence[int], salt: str = "") -> PrefixHit:
        self._check_awake()
        return self._prefixes.match(token_ids, salt)

    def try_admit(
        self, group: SequenceGroupSpec, hit: PrefixHit | None = None
    ) -> Reservation | None:
        _check_num_tokens(group.num_tokens)
        self._check_new(group.seq_ids)
        if len(self._slot_of) + len(group.seq_ids) > self._config.max_num_seqs:
            return None
        if hit is not None and hit.salt != group.cache_salt:
            raise ConfigError(
                f"the hit was looked up under salt {hit.salt!r}; the group's is "
                f"{group.cache_salt!r}"
            )
        with self._admitting():
            found, slots = self._try_starts(group, hit)
        if slots is None:
            return None
        for seq_id, slot in zip(group.seq_ids, slots, strict=True):
            self._slot_of[seq_id] = slot
            self._len_of[seq_id] = group.num_tokens
            if group.cache_salt is not None and self._config.prefix_caching:
                node = None if found is None else found.node
                self._prefixes.start(seq_id, group.cache_salt, node)
        self._note_peak()
        num_cached = 0 if found is None else found.num_tokens
        if hit is not None:
            for _ in group.seq_ids:
                self._prefixes.index.note_lookup(len(hit.token_ids), num_cached, hit.miss_reason)
        return Reservation(seq_ids=group.seq_ids, slots=tuple(slots), num_cached_tokens=num_cached)

    def _try_starts(
        self, group: SequenceGroupSpec, hit: PrefixHit | None
    ) -> tuple[FoundPrefix | None, list[int] | None]:
        """Admit with as much of the hit as there is room for."""
        if hit is not None:
            # Where its pages are in the way, there may be room once they can be evicted: first
            # the one to copy the end from, which is needed beside the copy, then all of them.
            for with_end in (True, False):
                found = self._prefixes.find(hit, group.num_tokens - 1, with_end=with_end)
                if found is None:
                    continue
                slots = self._try_slots(group, found)
                if slots is not None or not self._supply.is_short:
                    return found, slots
        return None, self._try_slots(group, None)

    def _try_slots(self, group: SequenceGroupSpec, found: FoundPrefix | None) -> list[int] | None:
        reserved = reserved_tokens(self._config, group)
        admit = partial(self._arena.try_admit, len(group.seq_ids), group.num_tokens, reserved)
        if found is None:
            return self._supply.evicting(admit)
        self._prefixes.index.lock(found.needed)
        try:
            return self._supply.evicting(partial(admit, found.start))
        finally:
            self._prefixes.index.unlock(found.needed)

    def try_extend(self, seq_ids: Sequence[int], num_tokens: Sequence[int]) -> bool:
        if self._cut and not self._prepare_write(seq_ids, num_tokens):
            return False
        slots = self._slots(seq_ids)
        if not self._supply.evicting(partial(self._arena.try_extend, slots, num_tokens)):
            return False
        self._len_of.update(zip(seq_ids, num_tokens, strict=True))
        return True

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        _check_num_tokens(num_tokens)
        self._arena.truncate(self._slots((seq_id,))[0], num_tokens)
        self._prefixes.truncate(seq_id, num_tokens)
        self._len_of[seq_id] = num_tokens
        self._cut.add(seq_id)

    def try_fork(
        self, parent_id: int, child_ids: Sequence[int], num_tokens: int | None = None
    ) -> bool:
        parent = self._slots((parent_id,))[0]
        num_rows = self._len_of[parent_id] if num_tokens is None else num_tokens
        _check_num_tokens(num_rows)
        self._check_new(child_ids)
        if len(self._slot_of) + len(child_ids) > self._config.max_num_seqs:
            return False
        slots = self._supply.evicting(
            partial(self._arena.try_fork, parent, len(child_ids), num_rows)
        )
        if slots is None:
            return False
        for child_id, slot in zip(child_ids, slots, strict=True):
            self._slot_of[child_id] = slot
            self._len_of[child_id] = num_rows
            self._prefixes.copy(parent_id, child_id, num_rows)
        self._note_peak()
        return True

    def try_reorder(self, seq_ids: Sequence[int], parent_idx: Sequence[int]) -> bool:
        slots = self._slots(seq_ids)
        plan = plan_reorder(seq_ids, parent_idx, [self._len_of[seq_id] for seq_id in seq_ids])
        # Spare clean slots take what is built, so that nothing is mapped anew under a kernel that
        # may still run.
        moved: dict[int, int] = {}
        is_built = False
        try:
            for parent, children in plan.built.items():
                fork = partial(self._arena.try_fork, slots[parent], len(children), plan.num_tokens)
                forked = self._supply.evicting(fork)
                if forked is None:
                    return False
                moved.update(zip(children, forked, strict=True))
            is_built = True
        finally:
            if not is_built:
                self._core_arena.free(list(moved.values()))
        moved.update({child: slots[parent] for parent, child in plan.stays.items()})
        was_cut = [seq_id in self._cut for seq_id in seq_ids]
        for child, seq_id in enumerate(seq_ids):
            self._slot_of[seq_id] = moved[child]
            (self._cut.add if was_cut[parent_idx[child]] else self._cut.discard)(seq_id)
        self._prefixes.rename(
            {seq_id: seq_ids[parent] for seq_id, parent in zip(seq_ids, parent_idx, strict=True)},
            plan.num_tokens,
        )
        self._arena.free([slots[parent] for parent in plan.dropped])
        return True

    def try_assign(
        self, seq_ids: Sequence[int], source_ids: Sequence[int], num_tokens: int
    ) -> bool:
        """Let every sequence hold the first ``num_tokens`` rows of what its source holds now.

        All of ``seq_ids`` stay in their slots, so that a batch of neighbouring slots stays one
        strided tensor: where they differ from their source, its full pages are mapped at their
        addresses instead and the rest of the rows is copied. A source may be any live sequence, the
        sequence itself included. Between steps only; waits for the kernels of the last one.

        Returns:
            False, and nothing has changed, if pages are short. On a device that works on its own
            also if it does not say that it is done.

        Raises:
            ConfigError: a step is open, a sequence is not live or named twice, or a source is
                shorter.
        """
        _check_num_tokens(num_tokens)
        slots, sources = self._slots(seq_ids), self._slots(source_ids)
        assign = partial(self._arena.try_assign, slots, sources, num_tokens)
        if not self._supply.evicting(assign):
            return False
        self._prefixes.rename(dict(zip(seq_ids, source_ids, strict=True)), num_tokens)
        for seq_id in seq_ids:
            self._prefixes.truncate(seq_id, num_tokens)
            self._len_of[seq_id] = num_tokens
            self._cut.discard(seq_id)
        return True

    def register_tokens(self, seq_id: int, token_ids: Sequence[int], num_tokens: int) -> None:
        slot = self._slots((seq_id,))[0]
        if not 0 <= num_tokens <= min(self._len_of[seq_id], len(token_ids)):
            raise ConfigError(
                f"num_tokens is {num_tokens}; sequence {seq_id} has {self._len_of[seq_id]} rows, "
                f"and {len(token_ids)} token ids were given"
            )
        self._prefixes.register(seq_id, slot, token_ids, num_tokens)

    def free(self, seq_ids: Sequence[int], keep_prefix: bool = True) -> None:
        swapped = [seq_id for seq_id in seq_ids if seq_id in self._swapped]
        live = [seq_id for seq_id in seq_ids if seq_id not in swapped] if swapped else seq_ids
        slots = self._slots(live)
        if len(set(seq_ids)) != len(seq_ids):
            raise ConfigError(f"seq_ids {tuple(seq_ids)} name a sequence twice")
        for seq_id, slot in zip(live, slots, strict=True):
            self._prefixes.end(seq_id, slot if keep_prefix else None)
        self._arena.free(slots)
        for seq_id in live:
            del self._slot_of[seq_id], self._len_of[seq_id]
            self._cut.discard(seq_id)
        for seq_id in swapped:
            self._swapped.drop(self._arena, seq_id)
            self._prefixes.end(seq_id)
            del self._len_of[seq_id]
            self._cut.discard(seq_id)

    def try_swap_out(self, seq_ids: Sequence[int]) -> bool:
        swapped = self._swap_out(seq_ids)
        if swapped is None:
            return False
        self._swapped.add(swapped)
        return True

    def _swap_out(self, seq_ids: Sequence[int], *, with_held: bool = False) -> SwappedGroup | None:
        group = self._arena.try_swap_out(self._slots(seq_ids), with_held)
        if group is None:
            return None
        for seq_id in seq_ids:
            del self._slot_of[seq_id]
            self._prefixes.restart(seq_id)
        return SwappedGroup(group, list(seq_ids))

    def try_swap_in(self, seq_ids: Sequence[int]) -> bool:
        self._check_awake()
        swapped = self._swapped.find(seq_ids)
        if len(self._slot_of) + len(seq_ids) > self._config.max_num_seqs:
            return False
        with self._admitting():
            if not self._swap_in(swapped):
                return False
        self._swapped.remove(swapped)
        return True

    def _swap_in(self, swapped: SwappedGroup) -> bool:
        slots = self._supply.evicting(partial(self._core_arena.try_swap_in, swapped.group))
        if slots is None:
            return False
        for seq_id, slot in zip(swapped.left, slots, strict=True):
            self._slot_of[seq_id] = slot
            # It may end in a page that others hold, or that could not be made its own.
            self._cut.add(seq_id)
        self._note_peak()
        for seq_id, slot in zip(swapped.left, slots, strict=True):
            with suppress(DriverError):  # it is back; its next tokens offer the rest again
                self._prefixes.resume(seq_id, slot)
        return True

    def pin_prefix(self, token_ids: Sequence[int], salt: str = "") -> int:
        self._check_awake()
        return self._prefixes.index.pin(token_ids, salt)

    def unpin_prefix(self, token_ids: Sequence[int], salt: str = "") -> int:
        self._check_awake()
        return self._prefixes.index.unpin(token_ids, salt)

    def flush_prefixes(self) -> int:
        self._check_awake()
        return self._prefixes.index.flush()

    def prefix_stats(self) -> PrefixCacheStats:
        return self._prefixes.index.stats()

    def begin_step(self, stream: int | None = None) -> Step:
        if stream is None:
            stream = current_stream(self._tensor_device)
        return Step(epoch=self._arena.begin_step(stream), stream=stream)

    def end_step(self, step: Step) -> None:
        self._arena.end_step(step.epoch)
        if not self._prefixes.index.is_empty:
            self._supply.keep_some_free(len(self._slot_of))

    def layer_views(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer over all slots, as strided views.

        Reading a row that is not backed gives zeros on the host driver; writing it ends the
        process with SIGSEGV.

        Returns:
            Two tensors ``[num_slots, max_seq_len, num_kv_heads, head_dim]``.
        """
        if self.driver_name == "null":
            raise ConfigError("the null driver only counts pages; it has no tensors")
        return self._views.of_layer(layer_idx)

    def batch_view(
        self,
        seq_ids: Sequence[int],
        num_new_tokens: Sequence[int],
        *,
        out: KVBatchBuffers | None = None,
        pad_to: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> KVBatchView:
        self._check_awake()
        slots = self._slots(seq_ids)
        lens = [self._len_of[seq_id] for seq_id in seq_ids]
        return self._batches.make(
            Batch(lens, num_new_tokens, slots),
            take_scratch=partial(self._scratch.take, self._supply.evicting),
            out=out,
            pad_to=pad_to,
            max_seqlen_k=max_seqlen_k,
        )

    def seq_len(self, seq_id: int) -> int:
        """Tokens of a live sequence."""
        self._slots((seq_id,))
        return self._len_of[seq_id]

    def live_seq_ids(self) -> list[int]:
        """Sequences that have a slot."""
        return list(self._slot_of)

    def swapped_seq_ids(self) -> list[list[int]]:
        """Swapped-out sequences, group by group."""
        return self._swapped.groups()

    def page_table(self, seq_id: int) -> list[list[int]]:
        """For each region, ids of the pages that a live sequence's tokens are in."""
        slot, num_tokens = self.slot_of(seq_id), self._len_of[seq_id]
        page_bytes = self._layout.page_bytes
        table = []
        for region, row_bytes in enumerate(self._layout.row_bytes):
            numbers = range(-(-num_tokens * row_bytes // page_bytes))
            table.append(self._arena.page_ids(slot, [region] * len(numbers), list(numbers)))
        return table

    def prefix_nodes(self) -> Iterator[PrefixNode]:
        """Nodes of the prefix index, parents first."""
        return self._prefixes.index.nodes()

    def slot_of(self, seq_id: int) -> int:
        """Slot of a live sequence."""
        return self._slots((seq_id,))[0]

    def mapped_rows(self, seq_id: int) -> int:
        """Rows of the sequence's slot that have memory, those committed ahead included."""
        return self._arena.mapped_rows(self.slot_of(seq_id))

    def wait_worker(self) -> None:
        self._arena.wait_worker()

    def pause_worker(self) -> None:
        """Leave the worker's jobs to ``run_worker``: a simulation says how much time it has."""
        self._arena.pause_worker()

    def run_worker(self, max_jobs: int) -> int:
        """Do at most so many of the worker's jobs on this thread; how many there were.

        A job backs the rows that one sequence will need next. Requires: ``pause_worker``.
        """
        return self._arena.run_worker(max_jobs)

    def stats(self) -> KVCacheStats:
        """See ``KVCacheStats``. The slot to pad with has committed pages, but is no sequence."""
        return virtual_stats(self._core_arena.stats(), len(self._slot_of), self._peak_seqs)

    def page_map(self) -> PageMap:
        return virtual_page_map(
            self._core_arena,
            self._layout.num_slots,
            {slot: (seq_id, self._len_of[seq_id]) for seq_id, slot in self._slot_of.items()},
            padding_slot=self._scratch.slot,
            is_asleep=self._sleep.is_asleep,
        )

    def trim(self, keep_free_pages: int = 0) -> int:
        return self._arena.trim(keep_free_pages)

    def resize(self, capacity_bytes: int) -> None:
        self._check_awake()
        self._supply.resize(capacity_bytes)

    def try_sleep(self) -> bool:
        self._check_awake()
        return self._sleep.try_begin(partial(self._swap_out, list(self._slot_of), with_held=True))

    def try_wake(self) -> bool:
        return self._sleep.try_end(self._swap_in)

    def check_invariants(self) -> None:
        self._arena.check_invariants(self._prefixes.page_ids())
        self._prefixes.index.check_invariants()

    def close(self) -> None:
        self._views.clear()
        self._core_arena.close()

    def __enter__(self) -> VirtualKVCache:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a VirtualKVCache cannot be pickled: its memory belongs to this process; "
            "send its config and make a new one"
        )

    @property
    def _arena(self) -> _core.KVArena:
        self._check_awake()
        return self._core_arena

    def _check_awake(self) -> None:
        if self._sleep.is_asleep:
            raise ConfigError("the cache is asleep; wake it first")

    def _slots(self, seq_ids: Sequence[int]) -> list[int]:
        try:
            return list(map(self._slot_of.__getitem__, seq_ids))
        except KeyError as error:
            seq_id = error.args[0]
            self._check_awake()
            if seq_id in self._swapped:
                raise ConfigError(f"seq_id {seq_id} is swapped out; swap it in first") from None
            raise ConfigError(
                f"seq_id {seq_id} is not live; {len(self._slot_of)} sequences are"
            ) from None

    def _admitting(self) -> AbstractContextManager[None]:
        """While nothing runs: no low watermark, though the arena sees the scratch slot live.

        Else a sequence that needs nearly the whole pool would wait for nobody.
        """
        if self._slot_of or self._scratch.slot is None:
            return nullcontext()
        return self._supply.down_to_the_last_page()

    def _rows_within(self, num_pages: int, most: int) -> int:
        """Rows, at most ``most``, that one sequence can have in ``num_pages``."""
        most_bytes = num_pages * self._layout.page_bytes
        return bisect_right(range(1, most + 1), most_bytes, key=self.bytes_for)

    def _check_new(self, seq_ids: Sequence[int]) -> None:
        for seq_id in seq_ids:
            if seq_id in self._len_of:
                raise ConfigError(f"seq_id {seq_id} is live already")
        if len(set(seq_ids)) != len(seq_ids):
            raise ConfigError(f"seq_ids {tuple(seq_ids)} name a sequence twice")

    def _note_peak(self) -> None:
        # The arena's count has both slots of a sequence that moves.
        self._peak_seqs = max(self._peak_seqs, len(self._slot_of))

    def _prepare_write(self, seq_ids: Sequence[int], num_tokens: Sequence[int]) -> bool:
        """Copy what the new rows would share. A sequence may move to another slot by it."""
        for seq_id, total in zip(seq_ids, num_tokens, strict=True):
            if seq_id not in self._cut or total <= self._len_of[seq_id]:
                continue
            slot = self._slots((seq_id,))[0]
            moved = self._supply.evicting(partial(self._arena.prepare_write, slot))
            if moved is None:
                return False
            self._slot_of[seq_id] = moved
            self._cut.discard(seq_id)
        return True


def _check_num_tokens(num_tokens: int) -> None:
    if num_tokens < 0:
        raise ConfigError(f"num_tokens is {num_tokens}; it must be 0 or more")
