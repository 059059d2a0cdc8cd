"""Sizes, shapes and types as callers give them: checked, and as Python's own.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch

from .errors import ConfigError

MOST_BYTES = (1 << 63) - 1
"""No size can be more: torch counts in int64."""


def checked_size(name: str, value: int, least: int) -> int:
    """The value as an int of Python's own, if it is a number of things from ``least`` on.

    Raises:
        ConfigError: naming it, and the limit.
    """
    try:
        size = int(index(value))
    except TypeError:
        raise ConfigError(f"{name} is {value!r}; it must be an integer") from None
    if not least <= size <= MOST_BYTES:
        limit = f"at least {least}" if size < least else f"at most {MOST_BYTES}"
        raise ConfigError(f"{name} is {size}; it must be {limit}")
    return size


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The sizes of all dims.

    Raises:
        ConfigError: there is none, or one is no integer above 0.
    """
    try:
        sizes = tuple(int(index(size)) for size in shape)
    except TypeError:
        raise ConfigError(f"shape is {shape!r}; it must be a sequence of integers") from None
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"shape is {sizes}; it must have a dim, and 1 or more of each")
    return sizes


def checked_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """The type of this name.

    Raises:
        ConfigError: torch has no such type.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype is {dtype!r}; it must be a torch.dtype, or the name of one")
    return found
