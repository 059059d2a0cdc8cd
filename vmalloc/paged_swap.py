"""Sequence groups of the paged backend that wait in host memory.

Owns: swapped groups, and their share of the swap space.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .block_pool import BlockPool, Blocks
from .block_storage import BlockStorage
from .block_views import BlockData
from .paged_prefix import PrefixPlace

_COPIED = -1


@dataclass(slots=True)
class SwappedSequence:
    """One sequence of a group: its blocks as positions in ``SwappedGroup.blocks``."""

    positions: NDArray[np.intp]
    num_tokens: int
    place: PrefixPlace


@dataclass(slots=True)
class SwappedGroup:
    """Sequences that were swapped out together.

    Attributes:
        blocks: every block of the group once: its id where it stayed because others share it,
            ``-1`` where it was copied out.
        data: contents of those copied out, in order.
        members: by sequence id.
    """

    blocks: Blocks
    data: BlockData
    members: dict[int, SwappedSequence]

    @property
    def kept(self) -> Blocks:
        """The blocks that stayed."""
        kept: Blocks = self.blocks[self.blocks != _COPIED]
        return kept

    @property
    def num_copied(self) -> int:
        return int((self.blocks == _COPIED).sum())


class SwapSpace:
    """Host memory for swapped groups, and moving them there and back.

    Attributes:
        num_copied: blocks that are there now.
        swap_out_pages, swap_in_pages: blocks copied so far.
        groups: by the id of each of their sequences.
    """

    def __init__(self, pool: BlockPool, storage: BlockStorage, max_blocks: int) -> None:
        self._pool = pool
        self._storage = storage
        self._max_blocks = max_blocks
        self.num_copied = 0
        self.swap_out_pages = 0
        self.swap_in_pages = 0
        self.groups: dict[int, SwappedGroup] = {}

    @property
    def room(self) -> int:
        """Blocks that can be copied out now."""
        return self._max_blocks - self.num_copied

    def try_put(self, seqs: dict[int, tuple[Blocks, int, PrefixPlace]]) -> bool:
        """Take the blocks, lengths and places of live sequences; False where no space is left.

        On success the sequences' references are gone. A block stays where another live sequence, a
        swapped group or a pin keeps it anyway: moving it would free nothing.
        """
        lists = [blocks for blocks, _, _ in seqs.values()]
        blocks, positions, counts = np.unique(
            np.concatenate([np.zeros(0, np.int32), *lists]), return_inverse=True, return_counts=True
        )
        stays = (self._pool.seq_refs[blocks] - counts + self._pool.holds[blocks]) > 0
        leaving = blocks[~stays]
        if len(leaving) > self.room:
            return False
        group = SwappedGroup(
            np.where(stays, blocks, _COPIED).astype(np.int32), self._storage.read(leaving), {}
        )
        self._pool.add_holds(group.kept, with_refs=True)
        first = 0
        for seq_id, (own, num_tokens, place) in seqs.items():
            own_positions = positions[first : first + len(own)]
            first += len(own)
            group.members[seq_id] = SwappedSequence(own_positions, num_tokens, place)
            self.groups[seq_id] = group
            self._pool.drop_seq_refs(own)
        self.num_copied += len(leaving)
        self.swap_out_pages += len(leaving)
        return True

    def take(self, group: SwappedGroup, blocks: Blocks) -> dict[int, Blocks]:
        """Bring a group back into freshly allocated ``blocks``; each sequence's blocks."""
        kept = group.kept
        self._storage.write(blocks, group.data)
        all_blocks = group.blocks.copy()
        all_blocks[group.blocks == _COPIED] = blocks
        tables = {seq_id: all_blocks[seq.positions] for seq_id, seq in group.members.items()}
        for table in tables.values():
            self._pool.add_seq_refs(table)
        self._pool.drop_seq_refs(blocks)
        self._pool.drop_holds(kept, with_refs=True)
        for seq_id in group.members:
            del self.groups[seq_id]
        self.num_copied -= len(blocks)
        self.swap_in_pages += len(blocks)
        return tables

    def drop(self, seq_id: int) -> None:
        """End a swapped sequence, and let go of what no other in its group needs."""
        group = self.groups.pop(seq_id)
        del group.members[seq_id]
        needed = np.zeros(len(group.blocks), np.bool_)
        for seq in group.members.values():
            needed[seq.positions] = True
        is_copied = group.blocks == _COPIED
        self._pool.drop_holds(group.blocks[~needed & ~is_copied], with_refs=True)
        self.num_copied -= int((~needed & is_copied).sum())
        group.data = [contents[needed[is_copied]] for contents in group.data]
        group.blocks = group.blocks[needed]
        moved = np.cumsum(needed) - 1
        for seq in group.members.values():
            seq.positions = moved[seq.positions]

    def distinct_groups(self) -> list[SwappedGroup]:
        """Every group once."""
        return list({id(group): group for group in self.groups.values()}.values())
