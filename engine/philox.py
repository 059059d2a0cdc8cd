"""Philox4x32-10: random numbers that are a pure function of a key and a counter.

From Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11).
Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UInt64s = NDArray[np.uint64]

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = np.uint64(0x9E3779B9)
_WEYL_1 = np.uint64(0xBB67AE85)
_NUM_ROUNDS = 10


def philox4x32(
    counter: tuple[UInt64s, UInt64s, UInt64s, UInt64s], key: tuple[UInt64s, UInt64s]
) -> tuple[UInt64s, UInt64s, UInt64s, UInt64s]:
    """Ten rounds over arrays of 32-bit words held in uint64, all of one shape; four words out."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (product_1 >> _SHIFT) ^ c1 ^ k0,
            product_1 & _LOW,
            (product_0 >> _SHIFT) ^ c3 ^ k1,
            product_0 & _LOW,
        )
        k0 = (k0 + _WEYL_0) & _LOW
        k1 = (k1 + _WEYL_1) & _LOW
    return c0, c1, c2, c3


def uniforms(seeds: list[int], choice_idx: list[int], positions: list[int]) -> NDArray[np.float64]:
    """One float64 in ``[0, 1)`` per (seed, choice index, token position), with 53 random bits."""
    seed = np.array(seeds, dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    choice = np.array(choice_idx, dtype=np.uint64)
    zero = np.zeros_like(seed)
    high, low, _, _ = philox4x32((position, choice, zero, zero), (seed & _LOW, seed >> _SHIFT))
    bits = (high >> np.uint64(5)) * np.uint64(1 << 26) + (low >> np.uint64(6))
    numbers: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return numbers
