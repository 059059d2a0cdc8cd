"""At which token counts pages become full: pure arithmetic for the prefix index.

Owns: nothing but what it computed so far.  Thread-safety: none; one engine thread.

Rows follow each other without gaps, so page ``p`` of a region is full after
``ceil((p + 1) * page_bytes / row_bytes)`` tokens. Regions with rows of one size fill their pages
together; others take turns.
"""

from __future__ import annotations

from collections.abc import Sequence


class PageSteps:
    """The token counts, in order, after which one or more pages are full."""

    def __init__(self, row_bytes: Sequence[int], page_bytes: int) -> None:
        self._row_bytes = tuple(row_bytes)
        self._page_bytes = page_bytes
        self._ends: list[int] = []
        self._pages: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self._next_page = [0] * len(row_bytes)

    def end(self, step: int) -> int:
        """Tokens after which the pages of step 1, 2, ... are full."""
        while len(self._ends) < step:
            self._grow()
        return self._ends[step - 1]

    def pages(self, step: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Regions, and page numbers in them, of the pages that step 1, 2, ... fills."""
        while len(self._ends) < step:
            self._grow()
        return self._pages[step - 1]

    def full_pages(self, region: int, num_tokens: int) -> int:
        """Pages of the region that ``num_tokens`` rows fill."""
        return num_tokens * self._row_bytes[region] // self._page_bytes

    def whole_rows(self, region: int, num_pages: int) -> int:
        """Whole rows that the first ``num_pages`` pages of the region hold."""
        return num_pages * self._page_bytes // self._row_bytes[region]

    def has_part(self, region: int, num_tokens: int) -> bool:
        """Whether the last of ``num_tokens`` rows ends within a page."""
        return num_tokens * self._row_bytes[region] % self._page_bytes != 0

    def _grow(self) -> None:
        end = min(self._filled_after(region) for region in range(len(self._row_bytes)))
        regions: list[int] = []
        numbers: list[int] = []
        for region in range(len(self._row_bytes)):
            while self._filled_after(region) == end:
                regions.append(region)
                numbers.append(self._next_page[region])
                self._next_page[region] += 1
        self._ends.append(end)
        self._pages.append((tuple(regions), tuple(numbers)))

    def _filled_after(self, region: int) -> int:
        num_bytes = (self._next_page[region] + 1) * self._page_bytes
        return -(-num_bytes // self._row_bytes[region])
