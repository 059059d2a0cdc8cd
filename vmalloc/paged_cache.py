"""KV cache in fixed blocks with block tables: what PagedAttention does, behind the same protocol.

Owns: seq_id -> row of the block tables. Block counts live in ``BlockPool`` alone.
Thread-safety: none of its own; one engine thread.

Freed blocks are reusable at once: whatever the next sequence writes to them is enqueued after the
kernels that may still read them. So there are no retired pages, and steps are only counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from types import TracebackType
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from .backend import (
    KVBatchView,
    KVCacheStats,
    PrefixCacheStats,
    PrefixHit,
    Reservation,
    SequenceGroupSpec,
    Step,
)
from .block_pool import BlockPool, Blocks
from .block_storage import BlockData, make_block_storage
from .block_table import BlockTables, Counts, Lengths, Rows
from .config import KVCacheConfig
from .errors import ClosedError, ConfigError
from .layout import plan_layout
from .paged_checks import check_books
from .paged_prefix import PrefixPlace, SequencePrefixes, path_blocks
from .paged_swap import SwapSpace
from .prefix_node import PrefixMatch, PrefixNode


@dataclass(slots=True)
class _Sequence:
    row: int
    place: PrefixPlace


@dataclass(frozen=True, slots=True)
class _SleepImage:
    """What a sleeping cache holds: blocks that keep their ids, and their contents."""

    blocks: Blocks
    data: BlockData


class PagedKVCache:
    """``KVBackend`` over blocks of ``config.block_size`` tokens.

    A page, in statistics and byte counts, is a block over all regions. Kernels are exact to the
    row, so ``lookahead_tokens`` backs nothing here; nor is there a worker or a parked slot.

    Memory is reserved for the cap, or for ``max_num_seqs`` sequences of full length if that is
    more, and taken as blocks are used. ``trim``, ``try_sleep`` and a lowered cap give it back, but
    for system pages that a free block shares with a used one (see ``block_storage``).

    Example:
        >>> layer = LayerKVSpec(num_kv_heads=2, k_head_dim=64, v_head_dim=64)
        >>> config = KVCacheConfig(
        ...     layers=(layer,) * 4, max_num_seqs=8, max_seq_len=2048, capacity_bytes=64 << 20
        ... )
        >>> cache = PagedKVCache(config)
        >>> cache.try_admit(SequenceGroupSpec(seq_ids=(0,), num_tokens=100)) is not None
        True

    Raises:
        ConfigError: a value can never work; the text names it and the limit.
    """

    name = "paged"

    def __init__(self, config: KVCacheConfig) -> None:
        if config.commit_policy != "on_demand":
            raise ConfigError(
                f"commit_policy is {config.commit_policy!r}; the paged backend supports on_demand"
            )
        self._config = config
        self._layout = plan_layout(config, page_bytes=1)
        self._block_bytes = config.block_size * self._layout.token_bytes
        blocks_per_seq = -(-config.max_seq_len // config.block_size)
        num_blocks = max(
            config.capacity_bytes // self._block_bytes, config.max_num_seqs * blocks_per_seq
        )
        self._pool = BlockPool(num_blocks, capacity=0)
        self._set_capacity(config.capacity_bytes)
        self._storage = make_block_storage(config, self._layout, num_blocks)
        self._tables = BlockTables(config.max_num_seqs, blocks_per_seq, config.block_size)
        self._prefixes = SequencePrefixes(
            self._pool, config.block_size, enabled=config.prefix_caching
        )
        self._swap = SwapSpace(self._pool, self._storage, config.swap_bytes // self._block_bytes)
        # Bits of one type read as another may be NaN, which a masked row must never hold.
        mixes_dtypes = len({layer.dtype for layer in config.layers}) > 1
        self._clears_reused = config.zero_on_reuse or mixes_dtypes
        self._seqs: dict[int, _Sequence] = {}
        self._views: dict[int, tuple[Tensor, Tensor]] = {}
        self._sleep: _SleepImage | None = None
        self._is_closed = False
        self._epoch = 0
        self._is_step_open = False
        self._num_tokens = 0  # of all live sequences
        self._peak_live_tokens = 0
        self._peak_live_seqs = 0
        self._allocated = 0
        self._aliased = 0
        self._cow_copies = 0
        self._discards = 0
        self._num_steps = 0
        self._live_byte_steps = 0.0
        self._committed_byte_steps = 0.0

    @property
    def config(self) -> KVCacheConfig:
        return self._config

    @property
    def driver_name(self) -> str:
        """``"host"`` or ``"null"``."""
        return self._storage.name

    def max_seq_tokens(self) -> int:
        self._check_usable()
        return min(self._config.max_seq_len, self._pool.capacity * self._config.block_size)

    def bytes_for(self, num_tokens: int) -> int:
        return self._tables.blocks_for(num_tokens) * self._block_bytes

    def can_admit(self, num_tokens: int, num_seqs: int = 1) -> bool:
        self._check_usable()
        if num_tokens > self._config.max_seq_len or not self._has_rows(num_seqs):
            return False
        return self._can_commit(num_seqs * self._tables.blocks_for(num_tokens), admission=True)

    def prefetch(self, num_tokens: int) -> None:
        """Nothing to warm: a block is as good as any other."""
        self._check_usable()

    def match_prefix(self, token_ids: Sequence[int], salt: str = "") -> PrefixHit:
        self._check_usable()
        found = self._prefixes.index.match(token_ids, salt)
        return PrefixHit(found.num_tokens, tuple(token_ids), salt, found.miss_reason)

    def try_admit(
        self, group: SequenceGroupSpec, hit: PrefixHit | None = None
    ) -> Reservation | None:
        self._check_usable()
        self._check_new(group.seq_ids)
        _check_at_most("num_tokens", group.num_tokens, "max_seq_len", self._config.max_seq_len)
        if not self._has_rows(len(group.seq_ids)):
            return None
        if hit is not None and hit.salt != group.cache_salt:
            raise ConfigError(
                f"the hit was looked up under salt {hit.salt!r}; the group's is "
                f"{group.cache_salt!r}"
            )
        if hit is None:
            return self._admit(group, None, np.zeros(0, np.int32), None, 0)
        index = self._prefixes.index
        found = index.match(hit.token_ids, hit.salt, max_tokens=group.num_tokens - 1)
        shared = path_blocks(found)
        admitted = None
        if found.tail is not None:
            admitted = self._admit(group, found.path, shared, found.tail, found.num_tail_tokens)
        if admitted is None:  # there may be room once the tail itself can be evicted
            admitted = self._admit(group, found.path, shared, None, 0)
        if admitted is not None:
            self._note_lookups(group, hit, found, admitted)
        return admitted

    def try_extend(self, seq_ids: Sequence[int], num_tokens: Sequence[int]) -> bool:
        self._check_usable()
        rows = self._rows(seq_ids)
        new = np.array(num_tokens, np.int64)
        old = self._tables.lens[rows]
        if len(new) != len(rows) or (new < old).any() or (new > self._config.max_seq_len).any():
            self._refuse_lengths(seq_ids, old.tolist(), new.tolist())
        copies = self._plan_copies(rows, old, new)
        num_new = self._tables.num_new_blocks(old, new)
        num_grown = int(num_new.sum())
        if num_grown or copies:
            blocks = self._try_allocate(num_grown + len(copies))
            if blocks is None:
                return False
            for i, block in zip(copies, blocks[num_grown:], strict=True):
                self._copy_last_block(int(rows[i]), int(old[i]), block)
            self._tables.append(rows, num_new, blocks[:num_grown])
        self._tables.lens[rows] = new
        self._num_tokens += int(new.sum()) - int(old.sum())
        return True

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        self._check_usable()
        seq = self._live(seq_id)
        length = int(self._tables.lens[seq.row])
        _check_at_most("num_tokens", num_tokens, "the rows the sequence has", length)
        self._note_live_peak()
        self._prefixes.truncate(seq.place, num_tokens)
        self._pool.drop_seq_refs(self._tables.truncate(seq.row, num_tokens))
        self._num_tokens -= length - num_tokens
        self._give_back_surplus()

    def try_fork(
        self, parent_id: int, child_ids: Sequence[int], num_tokens: int | None = None
    ) -> bool:
        self._check_usable()
        parent = self._live(parent_id)
        length = int(self._tables.lens[parent.row])
        num_tokens = length if num_tokens is None else num_tokens
        _check_at_most("num_tokens", num_tokens, "the rows the parent has", length)
        self._check_new(child_ids)
        if not self._has_rows(len(child_ids)):
            return False
        blocks = self._tables.blocks(parent.row)[: self._tables.blocks_for(num_tokens)].copy()
        self._pool.add_seq_refs(blocks, len(child_ids))
        for child_id in child_ids:
            place = self._prefixes.enter_at(parent.place, num_tokens)
            self._enter(child_id, blocks, num_tokens, place)
        self._aliased += len(child_ids) * len(blocks)
        return True

    def try_reorder(self, seq_ids: Sequence[int], parent_idx: Sequence[int]) -> bool:
        self._check_usable()
        rows = self._rows(seq_ids)
        lens = self._tables.lens[rows].tolist()
        if len(parent_idx) != len(rows) or any(not 0 <= i < len(rows) for i in parent_idx):
            raise ConfigError(
                f"parent_idx is {list(parent_idx)}; it must name one of the {len(rows)} sequences "
                "for each of them"
            )
        if len(set(lens)) > 1:
            raise ConfigError(
                f"sequences of lengths {lens} cannot be reordered; they must be equal"
            )
        seqs = [self._seqs[seq_id] for seq_id in seq_ids]
        moved = [i for i, parent in enumerate(parent_idx) if i != parent]
        tables = {i: self._tables.blocks(seqs[parent_idx[i]].row).copy() for i in moved}
        places = {i: self._prefixes.enter_at(seqs[parent_idx[i]].place, lens[i]) for i in moved}
        for i in moved:
            self._pool.add_seq_refs(tables[i])
            self._aliased += len(tables[i])
        for i in moved:
            old = self._tables.blocks(seqs[i].row).copy()
            self._prefixes.leave(seqs[i].place, old, keep_tail=False)
            self._pool.drop_seq_refs(old)
            self._tables.set(seqs[i].row, tables[i], lens[i])
            seqs[i].place = places[i]
        return True

    def register_tokens(self, seq_id: int, token_ids: Sequence[int], num_tokens: int) -> None:
        self._check_usable()
        seq = self._live(seq_id)
        _check_at_most("num_tokens", num_tokens, "the tokens given", len(token_ids))
        length = int(self._tables.lens[seq.row])
        _check_at_most("num_tokens", num_tokens, "the rows the sequence has", length)
        self._prefixes.register(seq.place, token_ids, num_tokens, self._tables.ids[seq.row])

    def free(self, seq_ids: Sequence[int], keep_prefix: bool = True) -> None:
        self._check_usable()
        _check_distinct(seq_ids)
        for seq_id in seq_ids:
            if seq_id not in self._swap.groups:
                self._live(seq_id)
        self._note_live_peak()
        for seq_id in seq_ids:
            if seq_id in self._swap.groups:
                self._swap.drop(seq_id)
            else:
                self._remove(seq_id, keep_tail=keep_prefix)
        self._give_back_surplus()

    def try_swap_out(self, seq_ids: Sequence[int]) -> bool:
        self._check_usable()
        rows = self._rows(seq_ids)
        seqs = {seq_id: self._seqs[seq_id] for seq_id in seq_ids}
        if not self._swap.try_put(
            {
                seq_id: (
                    self._tables.blocks(seq.row).copy(),
                    int(self._tables.lens[seq.row]),
                    seq.place,
                )
                for seq_id, seq in seqs.items()
            }
        ):
            return False
        self._num_tokens -= int(self._tables.lens[rows].sum())
        for seq_id, seq in seqs.items():
            blocks = self._tables.remove(seq.row)
            self._prefixes.leave(seq.place, blocks, keep_tail=False)
            del self._seqs[seq_id]
        self._give_back_surplus()
        return True

    def try_swap_in(self, seq_ids: Sequence[int]) -> bool:
        self._check_usable()
        _check_distinct(seq_ids)
        if not seq_ids:
            return True
        for seq_id in seq_ids:
            if seq_id not in self._swap.groups:
                raise ConfigError(f"seq_id {seq_id} is not swapped out")
        group = self._swap.groups[seq_ids[0]]
        if set(group.members) != set(seq_ids):
            raise ConfigError(
                f"seq_ids {tuple(seq_ids)} are not a group; those swapped out together are "
                f"{tuple(group.members)}"
            )
        if not self._has_rows(len(seq_ids)):
            return False
        blocks = self._try_allocate(group.num_copied)
        if blocks is None:
            return False
        for seq_id, table in self._swap.take(group, blocks).items():
            seq = group.members[seq_id]
            self._prefixes.return_to_root(seq.place)
            self._enter(seq_id, table, seq.num_tokens, seq.place)
        return True

    def pin_prefix(self, token_ids: Sequence[int], salt: str = "") -> int:
        self._check_usable()
        return self._prefixes.index.pin(token_ids, salt)

    def unpin_prefix(self, token_ids: Sequence[int], salt: str = "") -> int:
        self._check_usable()
        return self._prefixes.index.unpin(token_ids, salt)

    def flush_prefixes(self) -> int:
        self._check_usable()
        num_freed = self._prefixes.index.flush()
        self._give_back_surplus()
        return num_freed

    def prefix_stats(self) -> PrefixCacheStats:
        self._check_usable()
        return self._prefixes.index.stats()

    def begin_step(self, stream: int | None = None) -> Step:
        self._check_usable()
        if self._is_step_open:
            raise ConfigError(f"step {self._epoch} is still open; end it first")
        self._epoch += 1
        self._is_step_open = True
        return Step(epoch=self._epoch, stream=stream or 0)

    def end_step(self, step: Step) -> None:
        self._check_usable()
        if not self._is_step_open or step.epoch != self._epoch:
            raise ConfigError(f"step {step.epoch} is not open; the last one begun is {self._epoch}")
        self._is_step_open = False
        self._num_steps += 1
        self._live_byte_steps += self._note_live_peak() * self._layout.token_bytes
        self._committed_byte_steps += self._pool.num_committed * self._block_bytes

    def layer_views(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer over all blocks, as strided views.

        Returns:
            Two tensors ``[num_blocks, block_size, num_kv_heads, head_dim]``. Rows that were never
            written are zeros and cost nothing.
        """
        self._check_usable()
        views = self._views.get(layer_idx)
        if views is None:
            num_layers = len(self._config.layers)
            if not 0 <= layer_idx < num_layers:
                raise ConfigError(f"layer_idx is {layer_idx}; it must be below {num_layers}")
            views = self._views[layer_idx] = self._storage.layer_views(layer_idx)
        return views

    def batch_view(self, seq_ids: Sequence[int], num_new_tokens: Sequence[int]) -> KVBatchView:
        self._check_usable()
        rows = self._rows(seq_ids)
        lens = self._tables.lens[rows]
        cu_seqlens = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(num_new_tokens, out=cu_seqlens[1:])
        max_tokens = int(lens.max(initial=0))
        return KVBatchView(
            cache_batch_idx=torch.zeros(len(rows), dtype=torch.int32),
            cu_seqlens_q=torch.from_numpy(cu_seqlens),
            seqused_k=torch.from_numpy(lens),
            max_seqlen_q=max(num_new_tokens, default=0),
            max_seqlen_k=max_tokens,
            block_table=torch.from_numpy(self._tables.gather(rows, max_tokens)),
        )

    def seq_len(self, seq_id: int) -> int:
        """Tokens of a live sequence."""
        self._check_usable()
        return int(self._tables.lens[self._live(seq_id).row])

    def block_ids(self, seq_id: int) -> list[int]:
        """Blocks of a live sequence, in order of its rows."""
        self._check_usable()
        blocks: list[int] = self._tables.blocks(self._live(seq_id).row).tolist()
        return blocks

    def stats(self) -> KVCacheStats:
        """See ``KVCacheStats``. While the cache sleeps, it has no pages and no live bytes."""
        self._check_open()
        pool, page = self._pool, self._block_bytes
        is_awake = self._sleep is None
        num_asleep = 0 if self._sleep is None else len(self._sleep.blocks)
        live_tokens = self._note_live_peak()
        token_bytes = self._layout.token_bytes
        num_cached = pool.num_in_use - pool.num_committed
        return KVCacheStats(
            reserved_bytes=pool.num_blocks * page,
            capacity_bytes=pool.capacity * page,
            page_bytes=page,
            created_pages=pool.num_created * is_awake,
            free_pages=pool.num_free * is_awake,
            in_use_pages=pool.num_in_use * is_awake,
            retired_pages=0,
            live_bytes=live_tokens * token_bytes * is_awake,
            logical_bytes=self._num_tokens * token_bytes * is_awake,
            committed_bytes=pool.num_committed * page * is_awake,
            ahead_bytes=0,
            parked_bytes=0,
            cached_bytes=num_cached * page * is_awake,
            shared_bytes=(pool.num_seq_refs - pool.num_live) * page * is_awake,
            swapped_bytes=(self._swap.num_copied + num_asleep) * page,
            peak_committed_bytes=pool.peak_committed * page,
            peak_live_bytes=self._peak_live_tokens * token_bytes,
            num_live_seqs=len(self._seqs),
            peak_live_seqs=self._peak_live_seqs,
            map_calls=0,
            unmap_calls=self._discards,
            critical_pages=self._allocated,
            background_pages=0,
            adopted_pages=0,
            reclaimed_pages=0,
            aliased_pages=self._aliased,
            cow_copies=self._cow_copies,
            swap_out_pages=self._swap.swap_out_pages,
            swap_in_pages=self._swap.swap_in_pages,
            stall_us=0.0,
            num_steps=self._num_steps,
            live_byte_steps=self._live_byte_steps,
            committed_byte_steps=self._committed_byte_steps,
            worker_error="",
        )

    def trim(self, keep_free_pages: int = 0) -> int:
        self._check_usable()
        gone = self._pool.trim(keep_free_pages)
        if len(gone):
            self._storage.discard(gone, self._pool.has_memory)
            self._discards += 1
        return len(gone)

    def resize(self, capacity_bytes: int) -> None:
        """Move the cap, at most to the address space that was reserved at first."""
        self._check_usable()
        self._set_capacity(capacity_bytes)
        surplus = self._pool.num_in_use - self._pool.capacity
        if surplus > 0:
            self._prefixes.index.evict(surplus)
        self._give_back_surplus()

    def try_sleep(self) -> bool:
        self._check_usable()
        if self._pool.num_committed > self._swap.room:
            return False
        self._prefixes.index.flush()
        blocks = np.flatnonzero(self._pool.refs).astype(np.int32)
        self._sleep = _SleepImage(blocks, self._storage.read(blocks))
        self._pool.trim(0)
        everything = np.arange(self._pool.num_blocks, dtype=np.int32)
        self._storage.discard(everything, np.zeros(self._pool.num_blocks, np.bool_))
        self._discards += 1
        return True

    def try_wake(self) -> bool:
        self._check_open()
        if self._sleep is not None:
            self._storage.write(self._sleep.blocks, self._sleep.data)
            self._sleep = None
        return True

    def check_invariants(self) -> None:
        self._check_usable()
        self._prefixes.index.check_invariants()
        self._pool.check_invariants()
        check_books(
            self._pool,
            self._tables,
            [seq.row for seq in self._seqs.values()],
            self._prefixes.index,
            self._swap,
            self._num_tokens,
        )

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._sleep = None
        self._views.clear()
        self._swap.groups.clear()
        self._storage.close()

    def __enter__(self) -> PagedKVCache:
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
            "a PagedKVCache cannot be pickled: its memory belongs to this process; "
            "send its config and make a new one"
        )

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("the cache was closed")

    def _check_usable(self) -> None:
        self._check_open()
        if self._sleep is not None:
            raise ConfigError("the cache is asleep; call try_wake first")

    def _live(self, seq_id: int) -> _Sequence:
        seq = self._seqs.get(seq_id)
        if seq is None:
            self._refuse(seq_id)
        return seq

    def _refuse(self, seq_id: int) -> NoReturn:
        if seq_id in self._swap.groups:
            raise ConfigError(
                f"seq_id {seq_id} is swapped out; it can only be freed, or swapped in"
            )
        raise ConfigError(f"seq_id {seq_id} is not live; {len(self._seqs)} sequences are")

    def _rows(self, seq_ids: Sequence[int]) -> Rows:
        """Table rows of distinct live sequences."""
        seqs = self._seqs
        try:
            rows = [seqs[seq_id].row for seq_id in seq_ids]
        except KeyError as error:
            self._refuse(error.args[0])
        _check_distinct(seq_ids)
        return np.array(rows, np.intp)

    def _check_new(self, seq_ids: Sequence[int]) -> None:
        _check_distinct(seq_ids)
        for seq_id in seq_ids:
            if seq_id in self._seqs:
                raise ConfigError(f"seq_id {seq_id} is live already")
            if seq_id in self._swap.groups:
                raise ConfigError(f"seq_id {seq_id} is swapped out; its name is taken")

    def _refuse_lengths(self, seq_ids: Sequence[int], old: list[int], new: list[int]) -> NoReturn:
        limit = self._config.max_seq_len
        if len(old) != len(new):
            raise ConfigError(f"{len(new)} lengths are given for {len(old)} sequences")
        for seq_id, before, after in zip(seq_ids, old, new, strict=True):
            if not before <= after <= limit:
                raise ConfigError(
                    f"seq_id {seq_id} is extended to {after} rows; it must be between the current "
                    f"{before} and the maximum, {limit}"
                )
        raise AssertionError("unreachable")

    def _has_rows(self, count: int) -> bool:
        return len(self._seqs) + count <= self._config.max_num_seqs

    def _can_commit(self, num_blocks: int, *, admission: bool = False) -> bool:
        """Whether so many more blocks can be had, by evicting what is merely cached if need be."""
        low = self._low_blocks if admission and self._seqs else 0
        return num_blocks + low <= self._pool.room

    def _try_allocate(self, count: int) -> Blocks | None:
        if not self._can_commit(count):
            return None
        shortage = count - self._pool.num_unused
        if shortage > 0:
            self._prefixes.index.evict(shortage)
        blocks = self._pool.allocate(count)
        if self._clears_reused:
            self._storage.clear(blocks[self._pool.was_used[blocks]])
        self._pool.was_used[blocks] = True
        self._allocated += count
        return blocks

    def _admit(
        self,
        group: SequenceGroupSpec,
        path: PrefixNode | None,
        shared: Blocks,
        tail: PrefixNode | None,
        num_tail_tokens: int,
    ) -> Reservation | None:
        """Admit with the ``shared`` blocks of ``path`` and a copy of some of ``tail``'s rows."""
        index = self._prefixes.index
        count = len(group.seq_ids)
        num_own = self._tables.blocks_for(group.num_tokens) - len(shared)
        kept = shared if tail is None else np.append(shared, np.int32(tail.pages[0]))
        num_needed = count * num_own + self._pool.num_uncommitted(kept)
        if not self._can_commit(num_needed, admission=True):
            return None
        places = [self._prefixes.enter(group.cache_salt, path) for _ in group.seq_ids]
        self._pool.add_seq_refs(shared, count)
        if tail is not None:
            index.lock(tail)
        blocks = self._try_allocate(count * num_own)
        assert blocks is not None
        for i, (seq_id, place) in enumerate(zip(group.seq_ids, places, strict=True)):
            own = blocks[i * num_own : (i + 1) * num_own]
            if tail is not None:
                self._storage.copy_rows(tail.pages[0], int(own[0]), num_tail_tokens)
                self._cow_copies += 1
            self._enter(seq_id, np.concatenate([shared, own]), group.num_tokens, place)
        if tail is not None:
            index.unlock(tail)
        self._aliased += count * len(shared)
        num_cached = len(shared) * self._config.block_size + num_tail_tokens
        return Reservation(seq_ids=group.seq_ids, slots=(), num_cached_tokens=num_cached)

    def _note_lookups(
        self, group: SequenceGroupSpec, hit: PrefixHit, found: PrefixMatch, admitted: Reservation
    ) -> None:
        for _ in group.seq_ids:
            self._prefixes.index.note_lookup(
                len(hit.token_ids), admitted.num_cached_tokens, found.miss_reason
            )

    def _enter(self, seq_id: int, blocks: Blocks, num_tokens: int, place: PrefixPlace) -> None:
        self._seqs[seq_id] = _Sequence(self._tables.add(blocks, num_tokens), place)
        self._num_tokens += num_tokens
        self._peak_live_seqs = max(self._peak_live_seqs, len(self._seqs))

    def _remove(self, seq_id: int, *, keep_tail: bool) -> None:
        seq = self._seqs.pop(seq_id)
        self._num_tokens -= int(self._tables.lens[seq.row])
        self._prefixes.leave(seq.place, self._tables.blocks(seq.row), keep_tail=keep_tail)
        self._pool.drop_seq_refs(self._tables.remove(seq.row))

    def _plan_copies(self, rows: Rows, old: Lengths, new: Counts) -> list[int]:
        """Which sequences write to a last block that others refer to; the last of them owns it."""
        lasts = self._tables.last_blocks(rows, old)
        writes = (old % self._config.block_size != 0) & (new > old)
        is_shared = writes & (self._pool.refs[lasts] > 1)
        if not is_shared.any():
            return []
        copies: list[int] = []
        refs_left: dict[int, int] = {}
        for i in np.flatnonzero(is_shared).tolist():
            block = int(lasts[i])
            left = refs_left.get(block, int(self._pool.refs[block]))
            if left > 1:
                refs_left[block] = left - 1
                copies.append(i)
        return copies

    def _copy_last_block(self, row: int, length: int, target: np.int32) -> None:
        column, num_rows = divmod(length, self._config.block_size)
        source = self._tables.ids[row, column]
        self._storage.copy_rows(int(source), int(target), num_rows)
        self._tables.ids[row, column] = target
        self._pool.drop_seq_refs(np.array([source], np.int32))
        self._cow_copies += 1

    def _note_live_peak(self) -> int:
        """Tokens that exist, shared ones once. Called before they can become fewer."""
        live = self._num_tokens
        if self._pool.num_seq_refs != self._pool.num_live:
            rows = np.array([seq.row for seq in self._seqs.values()], np.intp)
            live = self._tables.num_distinct_tokens(rows, self._pool)
        self._peak_live_tokens = max(self._peak_live_tokens, live)
        return live

    def _set_capacity(self, capacity_bytes: int) -> None:
        capacity = capacity_bytes // self._block_bytes
        if not 1 <= capacity <= self._pool.num_blocks:
            raise ConfigError(
                f"the new cap in pages is {capacity}; it must be at least 1 and at most "
                f"{self._pool.num_blocks}, for which address space is reserved"
            )
        self._pool.capacity = capacity
        self._low_blocks = int(capacity * self._config.low_watermark)
        self._high_blocks = ceil(capacity * self._config.high_watermark)

    def _give_back_surplus(self) -> None:
        """Return free blocks above the high watermark, and all that the cap does not allow."""
        allowed = max(self._pool.capacity - self._pool.num_in_use, 0)
        self.trim(min(allowed, self._high_blocks))


def _check_distinct(seq_ids: Sequence[int]) -> None:
    if len(set(seq_ids)) != len(seq_ids):
        raise ConfigError(f"seq_ids {tuple(seq_ids)} name a sequence twice")


def _check_at_most(name: str, value: int, limit_name: str, limit: int) -> None:
    if not 0 <= value <= limit:
        raise ConfigError(f"{name} is {value}; it must be between 0 and {limit_name}, {limit}")
