"""Live sequences of the paged backend: their blocks, and how these are shared and copied.

Owns: seq_id -> row of the block tables.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from .backend import SequenceGroupSpec
from .block_pool import BlockPool, Blocks
from .block_storage import BlockStorage
from .block_supply import BlockSupply
from .block_table import BlockTables, Counts, Lengths, Rows
from .block_views import BlockCopy
from .errors import ConfigError
from .paged_prefix import PrefixPlace, SequencePrefixes, path_blocks
from .paged_swap import SwappedGroup, SwapSpace
from .prefix_node import PrefixMatch, PrefixNode
from .reorder import check_reorder


@dataclass(slots=True)
class LiveSequence:
    """A row of the block tables, and a place in the prefix index."""

    row: int
    place: PrefixPlace


class PagedSequences:
    """Sequences by id. Whatever fails for lack of blocks or rows changes nothing.

    Attributes:
        tables: blocks and lengths of all of them.
        num_tokens: tokens of all of them, shared ones counted for each.
        num_aliased: references taken to blocks that somebody had already.
        num_copies: blocks copied, whole or in part, so that a sequence could write to its own.
        peak: most that were live at once.
        peak_tokens: most tokens that existed at once, shared ones counted once.
    """

    def __init__(
        self,
        pool: BlockPool,
        storage: BlockStorage,
        supply: BlockSupply,
        tables: BlockTables,
        prefixes: SequencePrefixes,
        swap: SwapSpace,
    ) -> None:
        self.tables = tables
        self.num_tokens = 0
        self.num_aliased = 0
        self.num_copies = 0
        self.peak = 0
        self.peak_tokens = 0
        self._pool = pool
        self._storage = storage
        self._supply = supply
        self._prefixes = prefixes
        self._swap = swap
        self._seqs: dict[int, LiveSequence] = {}

    def __len__(self) -> int:
        return len(self._seqs)

    def get(self, seq_id: int) -> LiveSequence:
        """A live sequence."""
        seq = self._seqs.get(seq_id)
        if seq is None:
            self._refuse(seq_id)
        return seq

    def ids(self) -> list[int]:
        """All live sequences."""
        return list(self._seqs)

    def length(self, seq_id: int) -> int:
        """Tokens of a live sequence."""
        return int(self.tables.lens[self.get(seq_id).row])

    def rows(self, seq_ids: Sequence[int]) -> Rows:
        """Table rows of distinct live sequences."""
        seqs = self._seqs
        try:
            rows = [seqs[seq_id].row for seq_id in seq_ids]
        except KeyError as error:
            self._refuse(error.args[0])
        check_distinct(seq_ids)
        return np.array(rows, np.intp)

    def all_rows(self) -> Rows:
        """Table rows of all of them."""
        return np.array([seq.row for seq in self._seqs.values()], np.intp)

    def has_rows(self, count: int) -> bool:
        """Whether so many more can be live."""
        return len(self._seqs) + count <= len(self.tables.lens)

    def check_new(self, seq_ids: Sequence[int]) -> None:
        """Refuse names that are taken."""
        check_distinct(seq_ids)
        for seq_id in seq_ids:
            if seq_id in self._seqs:
                raise ConfigError(f"seq_id {seq_id} is live already")
            if seq_id in self._swap.groups:
                raise ConfigError(f"seq_id {seq_id} is swapped out; its name is taken")

    def try_admit(self, group: SequenceGroupSpec, found: PrefixMatch | None) -> int | None:
        """Admit a group with the prefix that was found; the cached tokens of each, or None."""
        if found is None:
            return self._admit(group, None, np.zeros(0, np.int32))
        shared = path_blocks(found)
        if found.tail is not None:
            admitted = self._admit(group, found.path, shared, (found.tail, found.num_tail_tokens))
            if admitted is not None:
                return admitted
        # There may be room once the tail itself can be evicted.
        return self._admit(group, found.path, shared)

    def try_extend(self, seq_ids: Sequence[int], num_tokens: Sequence[int], limit: int) -> bool:
        """Back rows up to ``num_tokens``, each between the current number and ``limit``."""
        rows = self.rows(seq_ids)
        new = np.array(num_tokens, np.int64)
        old = self.tables.lens[rows]
        if len(new) != len(rows) or (new < old).any() or (new > limit).any():
            _refuse_lengths(seq_ids, old.tolist(), new.tolist(), limit)
        copies = self._plan_copies(rows, old, new)
        num_new = self.tables.num_new_blocks(old, new)
        num_grown = int(num_new.sum())
        if num_grown or copies:
            blocks = self._supply.try_allocate(num_grown + len(copies))
            if blocks is None:
                return False
            if copies:
                self._copy_last_blocks(rows[copies], old[copies], blocks[num_grown:])
            self.tables.append(rows, num_new, blocks[:num_grown])
        self.tables.lens[rows] = new
        self.num_tokens += int(new.sum()) - int(old.sum())
        return True

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """Drop rows from ``num_tokens`` on."""
        seq, length = self.get(seq_id), self.length(seq_id)
        check_between("num_tokens", num_tokens, "the rows the sequence has", length)
        self.note_live_tokens()
        self._prefixes.truncate(seq.place, num_tokens)
        self._pool.drop_seq_refs(self.tables.truncate(seq.row, num_tokens))
        self.num_tokens -= length - num_tokens

    def try_fork(self, parent_id: int, child_ids: Sequence[int], num_tokens: int | None) -> bool:
        """Share the blocks of the parent's first rows with children, the last one too."""
        parent, length = self.get(parent_id), self.length(parent_id)
        num_tokens = length if num_tokens is None else num_tokens
        check_between("num_tokens", num_tokens, "the rows the parent has", length)
        self.check_new(child_ids)
        if not self.has_rows(len(child_ids)):
            return False
        blocks = self.tables.blocks(parent.row)[: self.tables.blocks_for(num_tokens)].copy()
        self._pool.add_seq_refs(blocks, len(child_ids))
        for child_id in child_ids:
            place = self._prefixes.enter_at(parent.place, num_tokens)
            self._enter(child_id, blocks, num_tokens, place)
        self.num_aliased += len(child_ids) * len(blocks)
        return True

    def reorder(self, seq_ids: Sequence[int], parent_idx: Sequence[int]) -> None:
        """Give every sequence the blocks of its parent; the new ones first, then drop the old."""
        lens = self.tables.lens[self.rows(seq_ids)].tolist()
        check_reorder(seq_ids, parent_idx, lens)
        self.note_live_tokens()
        moves = []
        for seq_id, i, parent in zip(seq_ids, range(len(lens)), parent_idx, strict=True):
            if i != parent:
                source = self._seqs[seq_ids[parent]]
                blocks = self.tables.blocks(source.row).copy()
                self._pool.add_seq_refs(blocks)
                place = self._prefixes.enter_at(source.place, lens[i])
                moves.append((self._seqs[seq_id], blocks, place))
                self.num_aliased += len(blocks)
        for seq, blocks, place in moves:
            old = self.tables.blocks(seq.row).copy()
            self._prefixes.leave(seq.place, old, keep_tail=False)
            self._pool.drop_seq_refs(old)
            self.tables.set(seq.row, blocks, lens[0])
            seq.place = place

    def register(self, seq_id: int, token_ids: Sequence[int], num_tokens: int) -> None:
        """Say which tokens the first rows hold."""
        seq, length = self.get(seq_id), self.length(seq_id)
        check_between("num_tokens", num_tokens, "the tokens given", len(token_ids))
        check_between("num_tokens", num_tokens, "the rows the sequence has", length)
        self._prefixes.register(seq.place, token_ids, num_tokens, self.tables.ids[seq.row])

    def free(self, seq_ids: Sequence[int], *, keep_tail: bool) -> None:
        """End sequences, swapped-out ones too."""
        check_distinct(seq_ids)
        for seq_id in seq_ids:
            if seq_id not in self._swap.groups:
                self.get(seq_id)
        self.note_live_tokens()
        for seq_id in seq_ids:
            if seq_id in self._swap.groups:
                self._swap.drop(seq_id)
            else:
                self._pool.drop_seq_refs(self._leave(seq_id, keep_tail=keep_tail))

    def try_swap_out(self, seq_ids: Sequence[int]) -> bool:
        """Move a group to the swap space."""
        self.rows(seq_ids)
        group = {}
        for seq_id in seq_ids:
            seq = self._seqs[seq_id]
            blocks = self.tables.blocks(seq.row).copy()
            group[seq_id] = (blocks, self.length(seq_id), seq.place)
        self.note_live_tokens()
        if not self._swap.try_put(group):
            return False
        for seq_id in seq_ids:
            self._leave(seq_id, keep_tail=False)
        return True

    def try_swap_in(self, seq_ids: Sequence[int]) -> bool:
        """Bring a whole group back."""
        check_distinct(seq_ids)
        if not seq_ids:
            return True
        group = self._swapped_group(seq_ids)
        if not self.has_rows(len(seq_ids)):
            return False
        blocks = self._supply.try_allocate(group.num_copied)
        if blocks is None:
            return False
        for seq_id, table in self._swap.take(group, blocks).items():
            seq = group.members[seq_id]
            self._prefixes.return_to_root(seq.place)
            self._enter(seq_id, table, seq.num_tokens, seq.place)
        return True

    def note_live_tokens(self) -> int:
        """Tokens that exist, shared ones once. Called before they can become fewer."""
        live = self.num_tokens
        if self._pool.num_seq_refs != self._pool.num_live:
            live = self.tables.num_distinct_tokens(self.all_rows(), self._pool)
        self.peak_tokens = max(self.peak_tokens, live)
        return live

    def _admit(
        self,
        group: SequenceGroupSpec,
        path: PrefixNode | None,
        shared: Blocks,
        tail: tuple[PrefixNode, int] | None = None,
    ) -> int | None:
        """Admit with the ``shared`` blocks of ``path`` and a copy of leading rows of ``tail``."""
        count = len(group.seq_ids)
        num_own = self.tables.blocks_for(group.num_tokens) - len(shared)
        kept = shared if tail is None else np.append(shared, np.int32(tail[0].pages[0]))
        num_needed = count * num_own + self._pool.num_uncommitted(kept)
        if not self._supply.has_room(num_needed, above_low=len(self._seqs) > 0):
            return None
        places = [self._prefixes.enter(group.cache_salt, path) for _ in group.seq_ids]
        self._pool.add_seq_refs(shared, count)
        if tail is not None:
            self._prefixes.index.lock(tail[0])
        blocks = self._supply.try_allocate(count * num_own)
        assert blocks is not None  # there was room
        own_blocks = blocks.reshape(count, num_own)
        for seq_id, place, own in zip(group.seq_ids, places, own_blocks, strict=True):
            self._enter(seq_id, np.concatenate([shared, own]), group.num_tokens, place)
        if tail is not None:
            source, num_rows = tail[0].pages[0], tail[1]
            self._copy((source, int(own[0]), num_rows) for own in own_blocks)
            self._prefixes.index.unlock(tail[0])
        self.num_aliased += count * len(shared)
        return len(shared) * self.tables.block_size + (0 if tail is None else tail[1])

    def _enter(self, seq_id: int, blocks: Blocks, num_tokens: int, place: PrefixPlace) -> None:
        self._seqs[seq_id] = LiveSequence(self.tables.add(blocks, num_tokens), place)
        self.num_tokens += num_tokens
        self.peak = max(self.peak, len(self._seqs))

    def _leave(self, seq_id: int, *, keep_tail: bool) -> Blocks:
        """Take a sequence out; its blocks, whose references are the caller's to drop."""
        self.num_tokens -= self.length(seq_id)
        seq = self._seqs.pop(seq_id)
        self._prefixes.leave(seq.place, self.tables.blocks(seq.row), keep_tail=keep_tail)
        return self.tables.remove(seq.row)

    def _plan_copies(self, rows: Rows, old: Lengths, new: Counts) -> list[int]:
        """Which sequences write to a last block that others refer to; the last of them owns it."""
        lasts = self.tables.last_blocks(rows, old)
        writes = (old % self.tables.block_size != 0) & (new > old)
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

    def _copy_last_blocks(self, rows: Rows, lens: Lengths, targets: Blocks) -> None:
        """Give sequences a last block of their own, with the rows that they have in it."""
        columns, num_rows = np.divmod(lens, self.tables.block_size)
        sources = self.tables.ids[rows, columns]
        self._copy(zip(sources.tolist(), targets.tolist(), num_rows.tolist(), strict=True))
        self.tables.ids[rows, columns] = targets
        for source in sources:  # which may be the last block of several
            self._pool.drop_seq_refs(np.array([source], np.int32))

    def _copy(self, copies: Iterable[BlockCopy]) -> None:
        batch = list(copies)
        self._storage.copy_rows(batch)
        self.num_copies += len(batch)

    def _swapped_group(self, seq_ids: Sequence[int]) -> SwappedGroup:
        for seq_id in seq_ids:
            if seq_id not in self._swap.groups:
                raise ConfigError(f"seq_id {seq_id} is not swapped out")
        group = self._swap.groups[seq_ids[0]]
        if set(group.members) != set(seq_ids):
            raise ConfigError(
                f"seq_ids {tuple(seq_ids)} are not a group; those swapped out together are "
                f"{tuple(group.members)}"
            )
        return group

    def _refuse(self, seq_id: int) -> NoReturn:
        if seq_id in self._swap.groups:
            raise ConfigError(f"seq_id {seq_id} is swapped out; it can only be freed or swapped in")
        raise ConfigError(f"seq_id {seq_id} is not live; {len(self._seqs)} sequences are")


def check_distinct(seq_ids: Sequence[int]) -> None:
    """Refuse a sequence that is named twice."""
    if len(set(seq_ids)) != len(seq_ids):
        raise ConfigError(f"seq_ids {tuple(seq_ids)} name a sequence twice")


def check_between(name: str, value: int, limit_name: str, limit: int) -> None:
    """Refuse a number below 0 or above its limit."""
    if not 0 <= value <= limit:
        raise ConfigError(f"{name} is {value}; it must be between 0 and {limit_name}, {limit}")


def _refuse_lengths(seq_ids: Sequence[int], old: list[int], new: list[int], limit: int) -> NoReturn:
    if len(old) != len(new):
        raise ConfigError(f"{len(new)} lengths are given for {len(old)} sequences")
    bad = next(i for i in range(len(old)) if not old[i] <= new[i] <= limit)
    raise ConfigError(
        f"seq_id {seq_ids[bad]} is extended to {new[bad]} rows; it must be between the current "
        f"{old[bad]} and the maximum, {limit}"
    )
