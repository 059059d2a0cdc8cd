"""Lognormal lengths that are cut to a range and keep the mean that was asked for.

Owns: nothing.  Thread-safety: pure functions; what is drawn depends on the generator alone.
"""

from __future__ import annotations

import math

import numpy as np

LOG_STD = 1.0
"""Standard deviation of the logarithm of every length; uncut, 1.31 times the mean."""


def draw_lengths(
    rng: np.random.Generator, mean: float, count: int, *, minimum: int, maximum: int
) -> list[int]:
    """``count`` lengths from ``minimum`` to ``maximum``, whose mean after the cut is ``mean``."""
    drawn = rng.lognormal(_location(mean, minimum, maximum), LOG_STD, count)
    lengths: list[int] = np.clip(np.rint(drawn), minimum, maximum).astype(int).tolist()
    return lengths


def _location(mean: float, minimum: int, maximum: int) -> float:
    """Mean of the logarithm for which the cut lengths have ``mean``; by bisection."""
    low, high = 0.0, math.log(maximum)
    for _ in range(60):
        middle = (low + high) / 2
        if _cut_mean(middle, minimum, maximum) < mean:
            low = middle
        else:
            high = middle
    return low


def _cut_mean(location: float, minimum: int, maximum: int) -> float:
    """Mean of a lognormal length that is cut to ``minimum..maximum``."""
    bottom = (math.log(minimum) - location) / LOG_STD
    top = (math.log(maximum) - location) / LOG_STD
    inside = math.exp(location + LOG_STD**2 / 2) * (
        _normal_cdf(top - LOG_STD) - _normal_cdf(bottom - LOG_STD)
    )
    return minimum * _normal_cdf(bottom) + inside + maximum * (1 - _normal_cdf(top))


def _normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))
