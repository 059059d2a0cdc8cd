"""How a virtual cache gives all its memory back, and takes it again.

Owns: the group that its sequences are while it sleeps.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from collections.abc import Callable

from . import _core
from .page_supply import PageSupply
from .prefix_index import PrefixIndex
from .scratch_slot import ScratchSlot
from .swapped_groups import SwappedGroup


class VirtualSleep:
    """Between ``try_begin`` and ``try_end`` no page is left but pinned ones.

    Who falls asleep can wake: what was committed is within the cap, so it fits again, and nobody
    else takes pages or moves the cap meanwhile.
    """

    def __init__(
        self,
        arena: _core.KVArena,
        supply: PageSupply,
        scratch: ScratchSlot,
        index: PrefixIndex,
    ) -> None:
        self._arena = arena
        self._supply = supply
        self._scratch = scratch
        self._index = index
        self._group: SwappedGroup | None = None  # set while it sleeps, also one of no sequence

    @property
    def is_asleep(self) -> bool:
        """From the moment that the sequences are in host memory, whatever is thrown then."""
        return self._group is not None

    def try_begin(self, swap_out: Callable[[], SwappedGroup | None]) -> bool:
        """Swap every sequence out by ``swap_out``, and give all memory back.

        Returns:
            False, and nothing has changed, if not all of it could come back under the cap, or
            ``swap_out`` gives None.

        Raises:
            ConfigError: a step is open.
            DriverError: nothing has changed; or, if ``is_asleep``, not all memory could go.
        """
        self._arena.check_between_steps()  # asleep, nobody could end it
        raw = self._arena.stats()
        if raw["committed_pages"] > raw["max_pages"]:
            return False  # after a resize to less
        self._group = swap_out()
        if self._group is None:
            return False
        self._index.flush()
        self._give_back()
        return True

    def try_end(self, swap_in: Callable[[SwappedGroup], bool]) -> bool:
        """Undo ``try_begin``, the sequences by ``swap_in``; True if it is awake.

        Where the machine lacks the memory it is False, and none is taken.
        """
        if self._group is None:
            self._arena.max_pages()  # a closed one is neither
            return True
        # Nothing runs, and what slept had these pages before: no watermark keeps them from it.
        with self._supply.down_to_the_last_page():
            is_back = self._scratch.try_return(self._supply.evicting) and swap_in(self._group)
        if is_back:
            self._group = None
        else:
            self._give_back()
        return is_back

    def _give_back(self) -> None:
        self._scratch.give_up()
        self._arena.wait_worker()  # else pages that it was told to create come after all are gone
        self._arena.trim(0)
