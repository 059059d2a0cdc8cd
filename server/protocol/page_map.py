"""Bodies of the page map: every slot's pages, and the totals beside them.

Owns: nothing.  Thread-safety: plain values.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .base import ApiResponse

Kind = Literal["live", "shared", "ahead", "parked", "retired"]
Run = Annotated[tuple[Kind, int], Field(description="[kind, number of neighbouring pages]")]


class SlotEntry(ApiResponse):
    """One slot that has pages; ``runs`` has a list for each region."""

    slot_idx: int
    seq_id: int | None
    request_id: str | None
    num_tokens: int
    is_padding: bool
    runs: list[list[Run]]


class PageMapBody(ApiResponse):
    """``vmalloc.PageMap``."""

    backend: str
    is_asleep: bool
    page_bytes: int
    row_bytes: list[int]
    slot_pages: list[int]
    num_slots: int
    shared_refs: int
    held_pages: int
    cached_pages: int
    slots: list[SlotEntry]


class PageMapTotals(ApiResponse):
    """Counts of the same moment, and rates over the last seconds."""

    reserved_bytes: int
    capacity_bytes: int
    committed_bytes: int
    live_bytes: int
    ahead_bytes: int
    parked_bytes: int
    cached_bytes: int
    shared_bytes: int
    swapped_bytes: int
    free_pages: int
    retired_pages: int
    running_seqs: int
    running: int
    waiting: int
    swapped: int
    preemptions: int
    prefix_hit_tokens: int
    prefix_queried_tokens: int
    cow_copies: int
    generated_tokens: int
    mapped_pages: int
    tokens_per_s: float
    pages_mapped_per_s: float


class RankTotals(ApiResponse):
    """Counts of one rank."""

    reserved_bytes: int
    capacity_bytes: int
    committed_bytes: int
    live_bytes: int
    ahead_bytes: int
    parked_bytes: int
    cached_bytes: int
    shared_bytes: int
    swapped_bytes: int
    created_pages: int
    free_pages: int
    in_use_pages: int
    retired_pages: int
    critical_pages: int
    background_pages: int
    stall_us: float


class RankEntry(ApiResponse):
    """One rank of a tensor-parallel engine; ``peak_rss_bytes``: most memory its process had."""

    rank: int
    peak_rss_bytes: int
    map: PageMapBody
    totals: RankTotals


class PageMapFrame(ApiResponse):
    """The page map at one moment; ``time`` in seconds of the Unix clock.

    With several ranks ``map`` and ``totals`` are of all: a page is what all ranks have of it, and
    ``ranks`` has each; else ``ranks`` is empty.
    """

    time: float
    state: str
    model: str
    map: PageMapBody
    totals: PageMapTotals
    ranks: list[RankEntry]


class PageMapState(ApiResponse):
    """Why there is no page map now."""

    state: str
    detail: str
