"""Which pages every slot has, and what for: the picture behind the counts of ``KVCacheStats``.

Owns: nothing.  Thread-safety: frozen values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

PageKind = Literal["live", "shared", "ahead", "parked", "retired"]

PAGE_KINDS: tuple[PageKind, ...] = ("live", "shared", "ahead", "parked", "retired")
"""What a page in a slot can be.

live: rows of the slot's sequence need it. shared: likewise, and other sequences have it too.
ahead: mapped past the end of the sequence, before it is needed. parked: still mapped in a free
slot, warm for the next sequence. retired: mapped only until the kernels that may still read it are
done.
"""


class PageRun(NamedTuple):
    """So many neighbouring pages of one kind."""

    kind: PageKind
    num_pages: int


@dataclass(frozen=True, slots=True)
class SlotPages:
    """The pages of one slot.

    Attributes:
        slot_idx: the slot; for the paged backend the sequence's row of the block table.
        seq_id: the sequence that has the slot; None: none has.
        num_tokens: its tokens; 0 without a sequence.
        runs: for each region the kinds of its pages, from the slot's first page on.
        request_id: the request that the sequence belongs to, where an engine says so.
        is_padding: whether it is the slot that padded batches write to.
    """

    slot_idx: int
    seq_id: int | None
    num_tokens: int
    runs: tuple[tuple[PageRun, ...], ...]
    request_id: str | None = None
    is_padding: bool = False

    def num_pages(self, kind: PageKind | None = None) -> int:
        """Pages of one kind, or of all, over all regions."""
        return sum(
            run.num_pages for region in self.runs for run in region if kind in (None, run.kind)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PageMap:
    """Every slot that has pages, at one moment.

    Once the background worker has nothing to do, and with ``KVCacheStats`` of the same moment::

        num_pages("live") + num_pages("shared") - shared_refs + held_pages == committed pages
        num_pages("ahead") == ahead pages, num_pages("parked") == parked pages
        cached_pages == cached pages

    A retired page counts once for each slot that still maps it, also if it is in use elsewhere.

    Attributes:
        backend: ``"virtual"`` or ``"paged"``.
        is_asleep: whether the memory was given back until ``try_wake``.
        page_bytes: one page; in the paged backend one block.
        row_bytes: bytes of a token in each region. A row need not divide a page.
        slot_pages: pages that one slot could have at most in each region.
        num_slots: slots there are, most of them without pages.
        shared_refs: places of shared pages beyond the first of each.
        held_pages: pages that no slot has, kept for swapped-out sequences, pins and padding.
        cached_pages: pages that only the prefix index refers to; no slot has them.
        slots: slots with pages, by ``slot_idx``.
    """

    backend: str
    is_asleep: bool
    page_bytes: int
    row_bytes: tuple[int, ...]
    slot_pages: tuple[int, ...]
    num_slots: int
    shared_refs: int
    held_pages: int
    cached_pages: int
    slots: tuple[SlotPages, ...]

    def num_pages(self, kind: PageKind | None = None) -> int:
        """Places of one kind, or of all, over all slots and regions."""
        return sum(slot.num_pages(kind) for slot in self.slots)

    def with_requests(self, request_of: Mapping[int, str]) -> PageMap:
        """The same, with the request of every sequence that ``request_of`` knows."""
        return replace(
            self,
            slots=tuple(
                slot
                if slot.seq_id is None
                else replace(slot, request_id=request_of.get(slot.seq_id))
                for slot in self.slots
            ),
        )


def read_runs(runs: Iterable[tuple[str, int]]) -> tuple[PageRun, ...]:
    """Runs as the core tells them."""
    return tuple(PageRun(cast(PageKind, kind), num_pages) for kind, num_pages in runs)
