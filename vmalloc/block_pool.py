"""Which blocks are in use, by whom, and which have memory: the paged backend's only ledger.

Owns: all block counts.  Thread-safety: none; one engine thread.

A block is in use while anything refers to it: a live sequence, a swapped-out group that shares it
with one, or the prefix index. It is *committed* while it is more than merely cached: a sequence or
a swapped group refers to it, or it is pinned. What is not committed can be had.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .errors import InvariantError

Blocks = NDArray[np.int32]
"""Block ids; no id twice where a method takes them."""


class BlockPool:
    """Blocks ``0 ... num_blocks - 1``, of which at most ``capacity`` are in use at once.

    Attributes:
        capacity: the cap, in blocks. Lowering it below what is in use forbids new blocks only.
        refs: per block, all references to it.
        seq_refs: per block, references of live sequences.
        holds: per block, swapped-out groups and pins that keep it.
        has_memory: per block, whether it was used since it was last given back to the system.
        was_used: per block, whether it ever held anything.
    """

    def __init__(self, num_blocks: int) -> None:
        self.capacity = num_blocks
        self.refs = np.zeros(num_blocks, np.int32)
        self.seq_refs = np.zeros(num_blocks, np.int32)
        self.holds = np.zeros(num_blocks, np.int32)
        self.has_memory = np.zeros(num_blocks, np.bool_)
        self.was_used = np.zeros(num_blocks, np.bool_)
        self.num_in_use = 0
        self.num_committed = 0
        self.num_live = 0  # blocks that live sequences refer to
        self.num_seq_refs = 0  # how often they do
        self.peak_committed = 0
        self._free: list[int] = []  # with memory; the last one freed is used first
        self._trimmed: list[int] = []  # without memory again
        self._next_fresh = 0  # from here on, never used

    @property
    def num_blocks(self) -> int:
        return len(self.refs)

    @property
    def num_free(self) -> int:
        """Blocks that have memory and no user."""
        return len(self._free)

    @property
    def num_created(self) -> int:
        """Blocks that have memory."""
        return self.num_in_use + self.num_free

    @property
    def room(self) -> int:
        """Blocks that could be had at most: all that are not committed."""
        return self.capacity - self.num_committed

    @property
    def num_unused(self) -> int:
        """Blocks that can be had at once; the rest of ``room`` is cached."""
        return self.capacity - self.num_in_use

    def allocate(self, count: int) -> Blocks:
        """Take blocks, each with one sequence's reference. Requires: ``count <= num_unused``."""
        if count > self.num_unused:
            raise InvariantError(f"{count} blocks are taken where {self.num_unused} can be had")
        blocks = np.array(self._take(count), np.int32)
        self.refs[blocks] = 1
        self.seq_refs[blocks] = 1
        self.has_memory[blocks] = True
        self.num_in_use += count
        self.num_live += count
        self.num_seq_refs += count
        self._commit(count)
        return blocks

    def add_seq_refs(self, blocks: Blocks, count: int = 1) -> None:
        """``count`` more live sequences refer to each of ``blocks``, which are in use."""
        seq_refs = self.seq_refs[blocks]
        self._commit(int(((seq_refs + self.holds[blocks]) == 0).sum()))
        self.num_live += int((seq_refs == 0).sum())
        self.num_seq_refs += count * len(blocks)
        self.seq_refs[blocks] += count
        self.refs[blocks] += count

    def drop_seq_refs(self, blocks: Blocks) -> None:
        """One live sequence less refers to each of ``blocks``."""
        self.seq_refs[blocks] -= 1
        left = blocks[self.seq_refs[blocks] == 0]
        self.num_live -= len(left)
        self.num_seq_refs -= len(blocks)
        self.num_committed -= int((self.holds[left] == 0).sum())
        self.drop_refs(blocks)

    def add_holds(self, blocks: Blocks, *, with_refs: bool) -> None:
        """Commit ``blocks``, which are in use; ``with_refs``: and refer to them."""
        self._commit(int(((self.seq_refs[blocks] + self.holds[blocks]) == 0).sum()))
        self.holds[blocks] += 1
        if with_refs:
            self.add_refs(blocks)

    def drop_holds(self, blocks: Blocks, *, with_refs: bool) -> None:
        """Undo ``add_holds``."""
        self.holds[blocks] -= 1
        self.num_committed -= int(((self.seq_refs[blocks] + self.holds[blocks]) == 0).sum())
        if with_refs:
            self.drop_refs(blocks)

    def add_refs(self, blocks: Blocks) -> None:
        """Something that commits nothing refers to ``blocks``, which are in use."""
        self.refs[blocks] += 1

    def drop_refs(self, blocks: Blocks) -> int:
        """Undo ``add_refs``; how many blocks became free."""
        self.refs[blocks] -= 1
        freed = blocks[self.refs[blocks] == 0].tolist()
        self._free += freed
        self.num_in_use -= len(freed)
        return len(freed)

    def num_uncommitted(self, blocks: Blocks) -> int:
        """How many of ``blocks`` are merely cached."""
        return int(((self.seq_refs[blocks] + self.holds[blocks]) == 0).sum())

    def trim(self, keep_free: int) -> Blocks:
        """Take memory from free blocks until ``keep_free`` are left; those that lost it.

        The lowest ids keep it, so that what goes is in long runs.
        """
        if len(self._free) <= keep_free:
            return np.zeros(0, np.int32)
        free = sorted(self._free)
        gone = np.array(free[keep_free:], np.int32)
        self._free = free[:keep_free][::-1]
        self._trimmed += gone[::-1].tolist()
        self.has_memory[gone] = False
        return gone

    def check_invariants(self) -> None:
        """Recount what can be told from the per-block counts alone."""
        committed = (self.seq_refs + self.holds) > 0
        free = np.zeros(self.num_blocks, np.bool_)
        free[self._free] = True
        _check_equal("blocks in use", self.num_in_use, int((self.refs > 0).sum()))
        _check_equal("committed blocks", self.num_committed, int(committed.sum()))
        _check_equal("live blocks", self.num_live, int((self.seq_refs > 0).sum()))
        _check_equal("references of sequences", self.num_seq_refs, int(self.seq_refs.sum()))
        _check_equal("created blocks", self.num_created, int(self.has_memory.sum()))
        _check_equal("distinct free blocks", self.num_free, int(free.sum()))
        _check_equal("free blocks in use", 0, int((free & (self.refs > 0)).sum()))
        _check_equal("committed blocks that are free", 0, int((committed & (self.refs == 0)).sum()))
        _check_equal(
            "blocks in use without memory", 0, int(((self.refs > 0) & ~self.has_memory).sum())
        )
        _check_equal(
            "used and trimmed blocks", self._next_fresh, self.num_created + len(self._trimmed)
        )

    def _take(self, count: int) -> list[int]:
        taken: list[int] = []
        for stack in (self._free, self._trimmed):
            while len(taken) < count and stack:
                taken.append(stack.pop())
        num_fresh = count - len(taken)
        taken += range(self._next_fresh, self._next_fresh + num_fresh)
        self._next_fresh += num_fresh
        return taken

    def _commit(self, count: int) -> None:
        self.num_committed += count
        self.peak_committed = max(self.peak_committed, self.num_committed)


def _check_equal(what: str, booked: int, counted: int) -> None:
    if booked != counted:
        raise InvariantError(f"{what}: {booked} in the books, {counted} counted")
