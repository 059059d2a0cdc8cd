"""Whether all ranks have the same versions, model and settings.

Owns: nothing.  Thread-safety: as the channel's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from ..errors import RankMismatchError
from .rank_channel import RankChannel

Fact = str | int | float | bool | None
_ABSENT = "nothing"


def agree(channel: RankChannel, facts: Mapping[str, Fact]) -> None:
    """Compare ``facts`` over all ranks; every rank calls this with what it has.

    Raises ``RankMismatchError`` in all ranks if anything differs, naming each fact that does, its
    values and the ranks that have them.
    """
    answers = channel.gather(json.dumps(dict(facts)).encode())
    if channel.rank == 0:
        text = json.dumps(find_differences([json.loads(answer) for answer in answers])).encode()
        channel.send(text)
    else:
        text = channel.receive()
    differences: list[list[str]] = json.loads(text)
    if differences:
        lines = "; ".join(f"{fact} is {values}" for fact, values in differences)
        raise RankMismatchError(differences[0][0], f"the ranks do not agree: {lines}")


def find_differences(facts: Sequence[Mapping[str, Fact]]) -> list[tuple[str, str]]:
    """What differs between the ranks' facts: ``(fact, "'a' on rank 0 and 'b' on ranks 1, 2")``."""
    names = dict.fromkeys(name for one in facts for name in one)
    differences = []
    for name in names:
        ranks_of: dict[str, list[int]] = {}
        for rank, one in enumerate(facts):
            value = repr(one[name]) if name in one else _ABSENT
            ranks_of.setdefault(value, []).append(rank)
        if len(ranks_of) > 1:
            values = " and ".join(f"{value} on {_named(r)}" for value, r in ranks_of.items())
            differences.append((name, values))
    return differences


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
