"""How calls for pages went, noted by the cache that decides for the others to do the same.

Owns: the notes of one operation.  Thread-safety: none; one engine thread.

Caches of equal configs that are told the same calls hold the same rows. Only *when* memory comes
free differs between them: background threads and fences keep their own time. What depends on that
is whether a call finds its pages, and what is evicted for it; so both are noted where the decision
is made, and repeated elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

from .errors import InvariantError


class Outcome(IntEnum):
    """What a call for pages came to."""

    GOT = 0
    SHORT = 1
    """Too few pages."""
    REFUSED = 2
    """No slot, or no mapping: pages would not have helped."""


class SupplyScript:
    """The calls for pages that one operation of a cache makes, in their order.

    Args:
        notes: those of the deciding cache, to be repeated; None: to be written here.
        grow: asks for so many more pages than there are; False if nobody has them. Only for the
            cache that decides.

    Attributes:
        notes: what was noted, or is left to be repeated: an outcome or a number of pages to
            evict, as the operation has it.
        is_repeated: whether it says what to do.
    """

    __slots__ = ("grow", "is_repeated", "notes")

    def __init__(
        self, notes: list[int] | None = None, grow: Callable[[int], bool] | None = None
    ) -> None:
        self.is_repeated = notes is not None
        self.notes = [] if notes is None else notes
        self.grow = grow

    def note(self, what: int) -> None:
        """Write one number down."""
        self.notes.append(what)

    def next(self) -> int:
        """The next number to go by.

        Raises ``InvariantError`` if the cache asks for more than the other one did.
        """
        if not self.notes:
            raise InvariantError("this cache asks for pages where the one that decides did not")
        return self.notes.pop(0)
