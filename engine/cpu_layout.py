"""How KV rows and pages are cut on the CPU, where nobody said.

The attention kernels read one layer at a time, so a layer's rows that follow each other suit them
(by a few percent, or not at all); a page should not hold many more tokens than a block, or short
sequences waste what they do not fill; and Linux maps no more than 65,530 stretches of pages for a
process. docs/benchmarks.md has the table of step times, waste and sharing by both dials ("The
layout on the CPU").
Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config import DEFAULT_PAGE_BYTES, LayerKVSpec

PAGE_TOKENS = 16
"""Tokens that a page is to hold, as a block of the paged backend does."""

MIN_PAGE_BYTES = 16 * 1024
"""Smaller ones would be mapped the more often; not measured."""

MAX_PAGES = 1 << 15
"""Half of the mappings that a process may have, so that a full pool stays below the limit."""


@dataclass(frozen=True, slots=True)
class CpuLayout:
    """A page in bytes, and the layers whose K and V of a token share a row."""

    page_bytes: int
    layers_per_group: int


def choose_layout(
    layers: Sequence[LayerKVSpec],
    cap_bytes: int,
    page_bytes: int | None = None,
    layers_per_group: int | None = None,
) -> CpuLayout:
    """The layout for a cap; what is given stays.

    One layer a row, in pages of about ``PAGE_TOKENS`` tokens. Where such pages are so small that a
    pool of them passes ``MAX_PAGES``, pages grow up to the driver's default, and rows with them.
    """
    row_bytes = max(layer.token_bytes for layer in layers)
    if page_bytes is None:
        wanted = PAGE_TOKENS * row_bytes * (layers_per_group or 1)
        page_bytes = MIN_PAGE_BYTES
        while page_bytes < DEFAULT_PAGE_BYTES and (
            2 * page_bytes <= wanted or page_bytes * MAX_PAGES < cap_bytes
        ):
            page_bytes *= 2
    if layers_per_group is None:
        fitting = page_bytes // (PAGE_TOKENS * row_bytes)
        layers_per_group = min(max(1, fitting), len(layers))
    return CpuLayout(page_bytes, layers_per_group)
