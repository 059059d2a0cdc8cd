"""Where the slots of a vAttention cache lie: pure arithmetic over rows, pages and blocks.

Owns: nothing.  Thread-safety: immutable.

A slot starts on a page. A *block* is what a slot grows by: one page in each tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """Sizes that are the same for every slot and tensor.

    Attributes:
        row_bytes: one token in one tensor.
        page_bytes: one physical page.
        max_rows: most tokens of a sequence.
        lookahead_rows: rows past a sequence's end that are backed too.
    """

    row_bytes: int
    page_bytes: int
    max_rows: int
    lookahead_rows: int

    @property
    def rows_per_unit(self) -> int:
        """Fewest rows that end on a page."""
        return self.page_bytes // gcd(self.row_bytes, self.page_bytes)

    @property
    def slot_rows(self) -> int:
        """Rows from one slot's first to the next one's."""
        return self.round_up(self.max_rows)

    def round_up(self, num_rows: int) -> int:
        """So many rows or a few more, so that they end on a page."""
        return -(-num_rows // self.rows_per_unit) * self.rows_per_unit

    def rows_for(self, seq_len: int) -> int:
        """Rows that a sequence of ``seq_len`` tokens needs backed; 0 for an inactive slot."""
        return min(seq_len + self.lookahead_rows, self.max_rows) if seq_len else 0

    def rows_of(self, slot: int, first: int, end: int) -> range:
        """Rows ``[first, end)`` of a slot as rows of the tensors that hold all slots."""
        base = slot * self.slot_rows
        return range(base + first, base + end)

    def blocks(self, num_rows: int) -> int:
        """Blocks that the first ``num_rows`` rows of a slot lie in."""
        return -(-num_rows * self.row_bytes // self.page_bytes)

    def rows_in(self, num_blocks: int) -> int:
        """Whole rows that so many blocks hold."""
        return num_blocks * self.page_bytes // self.row_bytes
