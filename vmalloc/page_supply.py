"""Where pages come from when there are too few: the arena's cap and watermarks, and eviction.

Owns: nothing; the cap is the arena's.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from . import _core
from .config import KVCacheConfig
from .core_setup import high_pages, low_pages
from .errors import InvariantError
from .layout import KVLayout
from .prefix_index import PrefixIndex
from .supply_script import Outcome, SupplyScript

T = TypeVar("T")


class PageSupply:
    """Gets pages from an arena, evicting cached prefixes where that helps.

    Attributes:
        script: notes what calls come to, or says so; None: nobody else is to do the same.
        is_short: whether the last call found too few pages.
    """

    def __init__(
        self, arena: _core.KVArena, config: KVCacheConfig, layout: KVLayout, index: PrefixIndex
    ) -> None:
        self._arena = arena
        self._config = config
        self._layout = layout
        self._index = index
        self.script: SupplyScript | None = None
        self.is_short = False

    def try_grant(self, num_pages: int) -> bool:
        """Have so many pages created, and keep those that are new from use until ``end_grant``."""
        return self._arena.try_grant(num_pages)

    def end_grant(self, num_pages: int, *, keeps_pages: bool) -> None:
        """Use the new pages or destroy them; none is created on demand beyond ``num_pages``."""
        self._arena.end_grant(num_pages, keeps_pages)

    @property
    def max_pages(self) -> int:
        """The cap in pages."""
        return self._arena.max_pages()

    def resize(self, capacity_bytes: int) -> None:
        """Move the cap and the watermarks; what is cached beyond it goes."""
        max_pages = capacity_bytes // self._layout.page_bytes
        self._arena.resize(
            max_pages, low_pages(self._config, max_pages), high_pages(self._config, max_pages)
        )
        self._evict_noting(self._arena.stats()["created_pages"] - max_pages)

    def evicting(self, attempt: Callable[[], T]) -> T | None:
        """Try until it works or evicting does not help; None or what was answered last."""
        script = self.script
        if script is not None and script.is_repeated:
            return self._repeat(script, attempt)
        last_shortage = 0
        while True:
            answer = attempt()
            if answer is not None and answer is not False:
                return self._answer(answer, Outcome.GOT)
            shortage = self._arena.last_shortage()
            if shortage == 0:
                return self._answer(answer, Outcome.REFUSED)
            if script is not None and script.grow is not None and script.grow(shortage):
                continue
            # As short as before: a kernel may still read what was evicted, so it comes later.
            if shortage == last_shortage or not self._can_evict(shortage):
                return self._answer(answer, Outcome.SHORT)
            if script is not None:
                script.note(shortage)
            self._index.evict(shortage)
            last_shortage = shortage

    def _answer(self, answer: T, outcome: Outcome) -> T:
        self.is_short = outcome is Outcome.SHORT
        if self.script is not None:
            self.script.note(-1 - outcome)
        return answer

    def _repeat(self, script: SupplyScript, attempt: Callable[[], T]) -> T | None:
        """Do what was noted: evict as much, and get the pages if the other cache did."""
        while (what := script.next()) >= 0:
            self._index.evict(what)
        outcome = Outcome(-1 - what)
        self.is_short = outcome is Outcome.SHORT
        if outcome is not Outcome.GOT:
            return None
        answer = attempt()
        if answer is None or answer is False:
            # The memory is there, but held by the worker or by kernels that are not done.
            self._arena.wait_worker()
            self._arena.trim(self._arena.max_pages())
            answer = attempt()
        if answer is None or answer is False:
            raise InvariantError(
                f"this cache is {self._arena.last_shortage()} pages short where the one that "
                "decides was not"
            )
        return answer

    def keep_some_free(self, num_seqs: int) -> None:
        """Evict what was not used for longest, so that the worker finds pages to commit ahead."""
        if self.script is not None and self.script.is_repeated:
            self._evict_noting(0)
            return
        config, max_pages = self._config, self._arena.max_pages()
        num_ahead = num_seqs * (config.commit_ahead_tokens + 1) * config.token_bytes
        wanted = (
            low_pages(config, max_pages)
            + num_ahead // self._layout.page_bytes
            + len(self._layout.row_bytes)
        )
        self._evict_noting(min(wanted, max_pages // 2) - self._arena.available_pages())

    @contextmanager
    def down_to_the_last_page(self) -> Iterator[None]:
        """For who has no other to leave pages to: no low watermark meanwhile."""
        self._arena.set_low_pages(0)
        try:
            yield
        finally:
            self._arena.set_low_pages(low_pages(self._config, self._arena.max_pages()))

    def _evict_noting(self, num_pages: int) -> None:
        """Evict so many pages, where that is more than none, or as many as the other cache did."""
        script = self.script
        num_pages = max(0, num_pages)
        if script is not None:
            if script.is_repeated:
                num_pages = script.next()
            else:
                script.note(num_pages)
        if num_pages > 0:
            self._index.evict(num_pages)

    def _can_evict(self, num_pages: int) -> bool:
        """Whether so much is merely cached: what is not enough is not given up for nothing."""
        return self._arena.stats()["cached_pages"] >= num_pages
