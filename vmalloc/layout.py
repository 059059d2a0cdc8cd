"""Where K and V of a token lie: pure arithmetic over bytes, rows and pages.

Owns: nothing.  Thread-safety: immutable.

A *row* is what one token stores in one address range (*region*): the K and V of a group of
``layers_per_group`` layers, side by side, or with ``kv_split`` its K or its V alone. Rows follow
each other without gaps, so a row need not divide a page.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import KVCacheConfig


@dataclass(frozen=True, slots=True)
class LayerPlacement:
    """One layer's K and V: the region each is in, and the byte offset within a row."""

    k_region: int
    k_offset: int
    v_region: int
    v_offset: int


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Sizes of every region, in bytes, and the place of every layer.

    Attributes:
        page_bytes: one physical page.
        row_bytes: per region, one token.
        slot_bytes: per region, the distance between slots: a multiple of the page, so that no page
            belongs to two slots, and of the row, so that one strided tensor spans all slots.
        placements: per layer.
        num_slots, max_seq_len: slots, and tokens of each.
    """

    page_bytes: int
    row_bytes: tuple[int, ...]
    slot_bytes: tuple[int, ...]
    placements: tuple[LayerPlacement, ...]
    num_slots: int
    max_seq_len: int

    @property
    def reserved_bytes(self) -> int:
        """Address space over all regions."""
        return self.num_slots * sum(self.slot_bytes)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all regions."""
        return sum(self.row_bytes)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that one sequence of ``num_tokens`` needs, over all regions."""
        return sum(-(-num_tokens * row // self.page_bytes) for row in self.row_bytes)


def plan_layout(config: KVCacheConfig, page_bytes: int) -> KVLayout:
    """Lay out ``config.layers`` over pages of ``page_bytes``."""
    group_size = config.layers_per_group or len(config.layers)
    row_bytes: list[int] = []
    placements: list[LayerPlacement] = []
    for first in range(0, len(config.layers), group_size):
        group = config.layers[first : first + group_size]
        k_region = len(row_bytes)
        v_region = k_region + 1 if config.kv_split else k_region
        k_end = v_end = 0
        for layer in group:
            if config.kv_split:
                placements.append(LayerPlacement(k_region, k_end, v_region, v_end))
                k_end += layer.k_bytes
                v_end += layer.v_bytes
            else:
                v_offset = k_end + layer.k_bytes
                placements.append(LayerPlacement(k_region, k_end, v_region, v_offset))
                k_end = v_offset + layer.v_bytes
        row_bytes += [k_end, v_end] if config.kv_split else [k_end]
    return KVLayout(
        page_bytes=page_bytes,
        row_bytes=tuple(row_bytes),
        slot_bytes=tuple(_slot_bytes(row, page_bytes, config.max_seq_len) for row in row_bytes),
        placements=tuple(placements),
        num_slots=config.num_slots or 2 * config.max_num_seqs,
        max_seq_len=config.max_seq_len,
    )


def _slot_bytes(row_bytes: int, page_bytes: int, max_rows: int) -> int:
    rows_per_unit = page_bytes // gcd(row_bytes, page_bytes)
    return -(-max_rows // rows_per_unit) * rows_per_unit * row_bytes
