"""Which beams stay where they are and which must be built anew.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .errors import ConfigError


@dataclass(frozen=True, slots=True)
class ReorderPlan:
    """What ``KVBackend.try_reorder`` has to do; all numbers are places in ``seq_ids``.

    Attributes:
        num_tokens: length of every sequence.
        stays: parent -> the child that goes on in its memory.
        built: parent -> its other children.
        dropped: parents that nobody goes on from.
    """

    num_tokens: int
    stays: dict[int, int]
    built: dict[int, list[int]]
    dropped: list[int]


def check_reorder(
    seq_ids: Sequence[int], parent_idx: Sequence[int], num_tokens: Sequence[int]
) -> int:
    """The length that all sequences have; 0 for none.

    Raises:
        ConfigError: a sequence is named twice, a parent is not one of them, or lengths differ.
    """
    count = len(seq_ids)
    if len(set(seq_ids)) != count:
        raise ConfigError(f"seq_ids {tuple(seq_ids)} name a sequence twice")
    if len(parent_idx) != count or any(not 0 <= parent < count for parent in parent_idx):
        raise ConfigError(
            f"parent_idx is {tuple(parent_idx)}; it must name one of {count} sequences for each"
        )
    if len(set(num_tokens)) > 1:
        raise ConfigError(f"sequences to reorder have {tuple(num_tokens)} tokens; must be equal")
    return num_tokens[0] if num_tokens else 0


def plan_reorder(
    seq_ids: Sequence[int], parent_idx: Sequence[int], num_tokens: Sequence[int]
) -> ReorderPlan:
    """Let as many sequences as possible stay in place, each under its own name if it can.

    Raises:
        ConfigError: see ``check_reorder``.
    """
    length = check_reorder(seq_ids, parent_idx, num_tokens)
    stays = {parent: child for child, parent in reversed(list(enumerate(parent_idx)))}
    stays.update({child: child for child, parent in enumerate(parent_idx) if parent == child})
    built: dict[int, list[int]] = {}
    for child, parent in enumerate(parent_idx):
        if stays[parent] != child:
            built.setdefault(parent, []).append(child)
    dropped = [parent for parent in range(len(seq_ids)) if parent not in stays]
    return ReorderPlan(length, stays, built, dropped)
