"""Block tables: which blocks hold the rows of each sequence.

Owns: the table and the lengths, one row per sequence.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .block_pool import BlockPool, Blocks

Rows = NDArray[np.intp]
Lengths = NDArray[np.int32]
Counts = NDArray[np.int64]


class BlockTables:
    """A persistent ``[num_rows, max_blocks]`` table, so that a batch is one gather.

    Attributes:
        block_size: tokens of a block.
        ids: block ids; zeros past a sequence's last block.
        lens: tokens of each sequence; zero in free rows.
    """

    def __init__(self, num_rows: int, max_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.ids = np.zeros((num_rows, max_blocks), np.int32)
        self.lens = np.zeros(num_rows, np.int32)
        self._free_rows = list(range(num_rows))[::-1]

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold ``num_tokens``."""
        return -(-num_tokens // self.block_size)

    def add(self, blocks: Blocks, num_tokens: int) -> int:
        """Enter a sequence; its row."""
        row = self._free_rows.pop()
        self.set(row, blocks, num_tokens)
        return row

    def set(self, row: int, blocks: Blocks, num_tokens: int) -> None:
        """Replace what a sequence has."""
        self.ids[row, : self.blocks_for(int(self.lens[row]))] = 0
        self.ids[row, : len(blocks)] = blocks
        self.lens[row] = num_tokens

    def remove(self, row: int) -> Blocks:
        """Take a sequence out; the blocks it had."""
        blocks: Blocks = self.blocks(row).copy()
        self.set(row, blocks[:0], 0)
        self._free_rows.append(row)
        return blocks

    def blocks(self, row: int) -> Blocks:
        """The blocks of a sequence, as a view."""
        used: Blocks = self.ids[row, : self.blocks_for(int(self.lens[row]))]
        return used

    def truncate(self, row: int, num_tokens: int) -> Blocks:
        """Shorten a sequence; the blocks it no longer has."""
        cut = self.blocks(row)[self.blocks_for(num_tokens) :]
        dropped: Blocks = cut.copy()
        cut[:] = 0
        self.lens[row] = num_tokens
        return dropped

    def gather(self, rows: Rows, width: int) -> Blocks:
        """``[len(rows), width]`` block ids of a batch, as a copy."""
        table: Blocks = self.ids[rows, :width]
        return table

    def num_new_blocks(self, old: Lengths, new: Counts) -> Counts:
        """Per sequence, blocks to add so that ``old`` tokens become ``new``."""
        full = self.block_size - 1
        counts: Counts = (new + full) // self.block_size - (old + full) // self.block_size
        return counts

    def append(self, rows: Rows, counts: Counts, blocks: Blocks) -> None:
        """Give each sequence its ``counts`` next blocks; the lengths are set by the caller."""
        columns = (self.lens[rows] + (self.block_size - 1)) // self.block_size
        first = np.cumsum(counts) - counts
        within = np.arange(len(blocks)) - np.repeat(first, counts)
        self.ids[np.repeat(rows, counts), np.repeat(columns, counts) + within] = blocks

    def last_blocks(self, rows: Rows, lens: Lengths) -> Blocks:
        """The block that row ``lens`` is in, for each sequence; anything where it has none."""
        columns = np.minimum(lens // self.block_size, self.ids.shape[1] - 1)
        lasts: Blocks = self.ids[rows, columns]
        return lasts

    def num_distinct_tokens(self, rows: Rows, pool: BlockPool) -> int:
        """Tokens of all live sequences, those in shared blocks counted once.

        Every block is full but for those that are the last of all who refer to them.
        """
        lens = self.lens[rows]
        partial = lens % self.block_size != 0
        lasts = self.last_blocks(rows[partial], lens[partial])
        blocks, inverse, counts = np.unique(lasts, return_inverse=True, return_counts=True)
        filled = np.zeros(len(blocks), np.int64)
        np.maximum.at(filled, inverse, lens[partial] % self.block_size)
        is_last_of_all = counts == pool.seq_refs[blocks]
        missing = (self.block_size - filled)[is_last_of_all].sum()
        return pool.num_live * self.block_size - int(missing)
