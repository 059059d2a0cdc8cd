"""The tokens of one step, packed into rows: what the model runner computes.

Owns: nothing.  Thread-safety: immutable but for its lists, which nobody changes.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from collections.abc import Set
from dataclasses import dataclass

from .sequence import Sequence


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Sequences and the tokens of each that a step computes, one after the other.

    Attributes:
        seq_ids: the sequences.
        num_new_tokens: rows of each.
        token_ids: of all rows.
        positions: of all rows, in their sequences.
        rows: those whose logits are wanted.
    """

    seq_ids: list[int]
    num_new_tokens: list[int]
    token_ids: list[int]
    positions: list[int]
    rows: list[int]

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has one row, and its logits are wanted."""
        return len(self.rows) == len(self.token_ids) == len(self.seq_ids)


def pack(
    seqs: SequenceABC[Sequence],
    num_new_tokens: SequenceABC[int],
    all_rows: Set[int] = frozenset(),
) -> PackedBatch:
    """The next ``num_new_tokens[i]`` tokens of each sequence.

    Wanted are every new row of the sequences whose place is in ``all_rows``, and the last row of
    the others that reach their last known token.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    kept_rows: list[int] = []
    for idx, (seq, num_new) in enumerate(zip(seqs, num_new_tokens, strict=True)):
        start = seq.num_computed_tokens
        end = start + num_new
        if num_new == 1:
            token_ids.append(seq.token_ids[start])
            positions.append(start)
        else:
            token_ids.extend(seq.token_ids[start:end])
            positions.extend(range(start, end))
        if all_rows and idx in all_rows:
            kept_rows.extend(range(len(token_ids) - num_new, len(token_ids)))
        elif end == len(seq.token_ids):
            kept_rows.append(len(token_ids) - 1)
    seq_ids = [seq.seq_id for seq in seqs]
    return PackedBatch(seq_ids, list(num_new_tokens), token_ids, positions, kept_rows)
