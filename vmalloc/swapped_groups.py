"""Which sequences of the virtual backend are in host memory, and with whom they went there.

Owns: seq_id -> group. The copies are the arena's.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import _core
from .errors import ConfigError


@dataclass(slots=True)
class SwappedGroup:
    """Sequences that went to host memory together.

    Attributes:
        group: the arena's name for them.
        seq_ids: in the order of the arena's slots; None for one that was freed since.
    """

    group: int
    seq_ids: list[int | None]

    @property
    def left(self) -> list[int]:
        """Those that were not freed."""
        return [seq_id for seq_id in self.seq_ids if seq_id is not None]


class SwappedGroups:
    """Looks up swapped-out sequences."""

    def __init__(self) -> None:
        self._group_of: dict[int, SwappedGroup] = {}

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._group_of

    def __len__(self) -> int:
        return len(self._group_of)

    def add(self, group: SwappedGroup) -> None:
        """Note that a group went out."""
        self._group_of.update(dict.fromkeys(group.left, group))

    def remove(self, group: SwappedGroup) -> None:
        """Note that a group came back."""
        for seq_id in group.left:
            del self._group_of[seq_id]

    def find(self, seq_ids: Sequence[int]) -> SwappedGroup:
        """The group that ``seq_ids`` are.

        Raises:
            ConfigError: one is not swapped out, or they are not a whole group.
        """
        for seq_id in seq_ids:
            if seq_id not in self._group_of:
                raise ConfigError(f"seq_id {seq_id} is not swapped out")
        left = self._group_of[seq_ids[0]].left if seq_ids else []
        if not seq_ids or sorted(left) != sorted(seq_ids):
            raise ConfigError(
                f"seq_ids {tuple(seq_ids)} are not a group; those swapped out together are "
                f"{tuple(left)}"
            )
        return self._group_of[seq_ids[0]]

    def groups(self) -> list[list[int]]:
        """The sequences of every group that were not freed."""
        distinct = {group.group: group for group in self._group_of.values()}
        return [group.left for group in distinct.values()]

    def drop(self, arena: _core.KVArena, seq_id: int) -> None:
        """Forget one sequence and the copies that it alone needed."""
        group = self._group_of[seq_id]
        idx = group.seq_ids.index(seq_id)
        arena.drop_swapped(group.group, idx)
        group.seq_ids[idx] = None
        del self._group_of[seq_id]
