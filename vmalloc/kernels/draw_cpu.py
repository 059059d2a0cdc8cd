"""Random draws of tokens on the CPU, and the random numbers behind them.

The numbers are Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11):
a pure function of a request's seed, the number of its choice and the token's position.
Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from .. import _core
from ..errors import ConfigError


@dataclass(slots=True)
class RandomKeys:
    """What fixes one random number each.

    Attributes:
        seeds: 64 bits.
        choice_idx, positions: 32 bits.
    """

    seeds: list[int] = field(default_factory=list)
    choice_idx: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)

    def uniforms(self) -> NDArray[np.float64]:
        """One number in ``[0, 1)`` for each, with 53 random bits."""
        return np.array(_core.uniforms(self.seeds, self.choice_idx, self.positions))


def draw(
    logits: torch.Tensor,
    rows: Sequence[int],
    temperatures: Sequence[float],
    keys: RandomKeys,
) -> list[int]:
    """A token for each of ``rows``: where the cumulative distribution of
    ``softmax(logits[row] / temperature)``, in vocabulary order, passes the key's random number.

    A token depends on its own row, temperature and key alone, on one instruction set.

    Args:
        logits: float32 ``[num_rows, vocab_size]``, contiguous, on the CPU. A row with a NaN or
            without a finite maximum gives any token.
        temperatures: above 0 as float32.

    Raises ``ConfigError`` naming what is out of range.
    """
    if logits.dtype != torch.float32 or not logits.is_cpu or not logits.is_contiguous():
        raise ConfigError(
            f"logits are {logits.dtype} on {logits.device} with strides {logits.stride()}, must be "
            "contiguous torch.float32 on cpu"
        )
    num_rows, vocab_size = logits.shape
    return _core.draw(
        logits.data_ptr(),
        num_rows,
        vocab_size,
        rows,
        temperatures,
        keys.seeds,
        keys.choice_idx,
        keys.positions,
    )
