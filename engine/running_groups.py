"""The groups that have memory, sorted so that a step need not look at each of them anew.

Owns: their order.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from .schedule import ScheduledGroup
from .sequence import Sequence
from .sequence_group import SequenceGroup


class RunningGroups(Collection[SequenceGroup]):
    """Running groups in the order in which they got memory.

    A group of one sequence that decodes does so until it ends or loses its memory: it is *steady*,
    and its part in a step is always the same. There may be thousands of them; all others are
    looked at in every step.

    Attributes:
        unsteady: groups that prefill, and those of several sequences.
    """

    def __init__(self) -> None:
        self._groups: dict[SequenceGroup, None] = {}
        self.unsteady: dict[SequenceGroup, None] = {}
        self._steady: dict[SequenceGroup, ScheduledGroup] = {}
        self._steady_seqs: dict[SequenceGroup, Sequence] = {}
        self._decoding: dict[SequenceGroup, ScheduledGroup] = {}  # unsteady ones that decode

    def __len__(self) -> int:
        return len(self._groups)

    def __contains__(self, group: object) -> bool:
        return group in self._groups

    def __iter__(self) -> Iterator[SequenceGroup]:
        return iter(self._groups)

    def add(self, group: SequenceGroup) -> None:
        """It has memory now."""
        self._groups[group] = self.unsteady[group] = None

    def remove(self, group: SequenceGroup) -> None:
        """It ended, or its memory is gone."""
        del self._groups[group]
        if group in self._steady:
            del self._steady[group], self._steady_seqs[group]
        else:
            del self.unsteady[group]
            self._decoding.pop(group, None)

    def find_decoding(self) -> None:
        """Look which of the unsteady groups decode."""
        self._decoding.clear()
        for group in list(self.unsteady):
            if group.is_decoding:
                self.note_decoding(group)

    def note_decoding(self, group: SequenceGroup) -> ScheduledGroup:
        """An unsteady group decodes; its part in a step."""
        part = ScheduledGroup(group, list(group.active), [1] * len(group.active))
        if group.width == 1:
            del self.unsteady[group]
            self._steady[group] = part
            self._steady_seqs[group] = part.seqs[0]
        else:
            self._decoding[group] = part
        return part

    def decode_parts(self) -> list[ScheduledGroup]:
        """What the groups that decode add to a step."""
        return [*self._steady.values(), *self._decoding.values()]

    def decode_seqs(self) -> list[Sequence]:
        """The sequences of ``decode_parts()``, in its order."""
        seqs = list(self._steady_seqs.values())
        for part in self._decoding.values():
            seqs += part.seqs
        return seqs

    def unready(self) -> list[SequenceGroup]:
        """Groups that do not decode."""
        return [group for group in self.unsteady if group not in self._decoding]

    def num_seats(self) -> int:
        """Sequences of the KV cache that they take up, or will take up."""
        return len(self._steady) + sum(group.num_seats for group in self.unsteady)

    def num_seqs(self) -> int:
        """Their unfinished sequences."""
        return len(self._steady) + sum(len(group.active) for group in self.unsteady)
