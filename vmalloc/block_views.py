"""Blocks of the paged backend as bytes on the host and as tensors.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .config import DTYPE_BYTES, KVCacheConfig
from .errors import ConfigError
from .layout import KVLayout

BlockData = list[NDArray[np.uint8]]
"""Contents of some blocks in host memory: per region, ``[blocks, bytes of a block]``."""

BlockCopy = tuple[int, int, int]
"""Source block, target block, and how many leading rows to copy."""


def block_views(
    regions: Sequence[Tensor], config: KVCacheConfig, layout: KVLayout, layer_idx: int
) -> tuple[Tensor, Tensor]:
    """K and V of one layer over all blocks of ``regions``.

    Args:
        regions: per region of the layout, ``[num_blocks, bytes of a block]`` bytes.

    Returns:
        Two tensors ``[num_blocks, block_size, num_kv_heads, head_dim]``.

    Raises:
        ConfigError: elements would not be aligned.
    """
    spec = config.layers[layer_idx]
    place = layout.placements[layer_idx]
    itemsize = DTYPE_BYTES[spec.dtype]

    def view(region: int, offset: int, head_dim: int) -> Tensor:
        row_bytes = layout.row_bytes[region]
        if offset % itemsize or row_bytes % itemsize:
            raise ConfigError(
                f"rows of {row_bytes} bytes with {spec.dtype} at byte {offset} are not aligned to "
                f"its {itemsize} bytes; keep layers of one dtype together (layers_per_group)"
            )
        elements = regions[region].view(-1).view(getattr(torch, spec.dtype))
        row = row_bytes // itemsize
        return elements.as_strided(
            (len(regions[region]), config.block_size, spec.num_kv_heads, head_dim),
            (config.block_size * row, row, head_dim, 1),
            offset // itemsize,
        )

    return (
        view(place.k_region, place.k_offset, spec.k_head_dim),
        view(place.v_region, place.v_offset, spec.v_head_dim),
    )
