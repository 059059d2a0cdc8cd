"""Medians with their spreads, and when one side is ahead of the other.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower", "neither"]
Verdict = Literal["better", "worse", "tie", "unknown"]
"""Of the first side. ``"unknown"``: one run each, or nothing to compare, or no direction."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Values of several runs.

    Attributes:
        median, low, high: the middle, the smallest and the largest.
        count: how many there were.
    """

    median: float
    low: float
    high: float
    count: int

    def overlaps(self, other: Spread) -> bool:
        """Whether the ranges have a value in common."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True, slots=True)
class Comparison:
    """The first side over the other.

    Attributes:
        ratio: of the values of each round; None where a value is missing, or the other one is 0.
        verdict: of the first side.
    """

    ratio: Spread | None
    verdict: Verdict


def spread(values: Sequence[float | None]) -> Spread | None:
    """Median, smallest and largest; None if a value is missing, or there is none."""
    known = [value for value in values if value is not None]
    if not known or len(known) != len(values):
        return None
    return Spread(statistics.median(known), min(known), max(known), len(known))


def compare(
    first: Sequence[float | None], other: Sequence[float | None], better: Better
) -> Comparison:
    """Compare values of the same rounds, in order.

    The ratio is that of each round, so that what slows a machine down for a while slows both
    sides. A side is ahead only if all of its values are: where the ranges of the values overlap, it
    is a tie.
    """
    ours, theirs = spread(first), spread(other)
    if ours is None or theirs is None or len(first) != len(other):
        return Comparison(None, "unknown")
    ratios = [
        _ratio(a, b) for a, b in zip(first, other, strict=True) if a is not None and b is not None
    ]
    ratio = spread(ratios)
    if better == "neither" or ours.count < 2:
        return Comparison(ratio, "unknown")
    if ours.overlaps(theirs):
        return Comparison(ratio, "tie")
    is_higher = ours.low > theirs.high
    return Comparison(ratio, "better" if is_higher == (better == "higher") else "worse")


def chance_of_no_tie(num_runs: int) -> float:
    """Share of comparisons between equals in which one side is ahead by chance alone.

    Of all orders in which the values of two sides of ``num_runs`` each can stand, those two in
    which they stand apart.
    """
    return 2 / math.comb(2 * num_runs, num_runs)


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear between the two nearest; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def _ratio(ours: float, theirs: float) -> float | None:
    if theirs == 0:
        return 1.0 if ours == 0 else None
    return ours / theirs
