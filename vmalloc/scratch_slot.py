"""The slot that padded batches point at: mapped, and of no sequence.

Owns: which slot it is.  Thread-safety: none; one engine thread.

It holds no row, but keeps one backed, and what a kernel may read after it. So it counts among the
committed pages, and not among live bytes.
"""

from __future__ import annotations

from collections.abc import Callable

from . import _core
from .config import KVCacheConfig
from .errors import ConfigError
from .layout import KVLayout

Evicting = Callable[[Callable[[], list[int] | None]], list[int] | None]
"""Calls something until it has an answer, or evicting cached prefixes does not help."""


class ScratchSlot:
    """Taken at first use, given up while the cache sleeps, and gone with the arena.

    Attributes:
        slot: its index; None while it is not taken.
    """

    def __init__(self, arena: _core.KVArena, config: KVCacheConfig, layout: KVLayout) -> None:
        self.slot: int | None = None
        self._arena = arena
        self._config = config
        self._layout = layout
        self._was_given_up = False

    @property
    def num_pages(self) -> int:
        """Pages it keeps committed."""
        if self.slot is None:
            return 0
        backed = min(1 + self._config.lookahead_tokens, self._config.max_seq_len)
        return self._layout.pages_for(backed)

    def take(self, evicting: Evicting) -> int:
        """The slot, taken now if it was not.

        Raises:
            ConfigError: there is no slot or no memory left for it.
        """
        if self.slot is None:
            num_slots, max_num_seqs = self._layout.num_slots, self._config.max_num_seqs
            if num_slots <= max_num_seqs:
                raise ConfigError(
                    f"num_slots is {num_slots} and max_num_seqs {max_num_seqs}; batches are padded "
                    "with a slot of its own, so num_slots must be larger"
                )
            if not self._try_take(evicting):
                raise ConfigError(
                    "no page is left for the slot that batches are padded with; ask for a padded "
                    "view once before the first sequence is admitted"
                )
        assert self.slot is not None
        return self.slot

    def give_up(self) -> None:
        """Let the arena have it while the cache sleeps."""
        if self.slot is not None:
            self._was_given_up = True
            self._arena.free([self.slot])
            self.slot = None

    def try_return(self, evicting: Evicting) -> bool:
        """Undo ``give_up``, if there was one; False if there is no room."""
        return not self._was_given_up or self._try_take(evicting)

    def _try_take(self, evicting: Evicting) -> bool:
        if self.slot is None:
            slots = evicting(lambda: self._arena.try_admit(1, 0, 1))
            if slots is None:
                return False
            (self.slot,) = slots
            self._was_given_up = False
        return True
