"""The memory behind the blocks of the paged backend.

Owns: one anonymous mapping per region, and the tensor views of it.  Thread-safety: none; one engine
thread.

Memory is reserved at once and taken by the system's page when a row is first written. It goes back
by the system's page too: a page (4 KiB) that two blocks share goes when neither has memory left, so
a block whose size is no multiple of it may leave its edges behind.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .block_pool import Blocks
from .config import DTYPE_BYTES, KVCacheConfig
from .errors import ConfigError
from .layout import KVLayout

BlockData = list[NDArray[np.uint8]]
"""Contents of some blocks: per region, ``[blocks, bytes of a block]``."""

_MAP_NORESERVE = 0x4000  # Linux; the mmap module names it from Python 3.13 on


class BlockStorage(Protocol):
    """What the paged backend does with the memory of its blocks."""

    @property
    def name(self) -> str:
        """Name of the driver: ``"host"`` or ``"null"``."""
        ...

    def layer_views(self, layer_idx: int) -> tuple[Tensor, Tensor]: ...

    def copy_rows(self, source: int, target: int, num_rows: int) -> None:
        """Copy the first rows of one block, all layers, to another."""
        ...

    def clear(self, blocks: Blocks) -> None: ...

    def read(self, blocks: Blocks) -> BlockData: ...

    def write(self, blocks: Blocks, data: BlockData) -> None: ...

    def discard(self, blocks: Blocks, has_memory: NDArray[np.bool_]) -> None:
        """Give ``blocks`` back to the system; ``has_memory`` says which blocks still need it."""
        ...

    def close(self) -> None: ...


class NullBlockStorage:
    """No memory at all, for simulations."""

    name = "null"

    def layer_views(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        raise ConfigError("the null driver only counts pages; it has no tensors")

    def copy_rows(self, source: int, target: int, num_rows: int) -> None:
        """Nothing to copy."""

    def clear(self, blocks: Blocks) -> None:
        """Nothing to clear."""

    def read(self, blocks: Blocks) -> BlockData:
        return []

    def write(self, blocks: Blocks, data: BlockData) -> None:
        """Nothing to write."""

    def discard(self, blocks: Blocks, has_memory: NDArray[np.bool_]) -> None:
        """Nothing to give back."""

    def close(self) -> None:
        """Nothing to close."""


class HostBlockStorage:
    """Blocks in ordinary memory of this process."""

    name = "host"

    def __init__(self, config: KVCacheConfig, layout: KVLayout, num_blocks: int) -> None:
        self._config = config
        self._layout = layout
        self._num_blocks = num_blocks
        self._maps: list[mmap.mmap] = []
        self._regions: BlockData = []
        for row_bytes in layout.row_bytes:
            num_bytes = num_blocks * config.block_size * row_bytes
            region = mmap.mmap(
                -1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            )
            with suppress(OSError):  # a kernel without huge pages
                region.madvise(mmap.MADV_NOHUGEPAGE)  # else the first row would take 2 MiB
            self._maps.append(region)
            self._regions.append(np.frombuffer(region, np.uint8).reshape(num_blocks, -1))

    def layer_views(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        spec = self._config.layers[layer_idx]
        place = self._layout.placements[layer_idx]
        heads = spec.num_kv_heads
        return (
            self._view(place.k_region, place.k_offset, spec.dtype, heads, spec.k_head_dim),
            self._view(place.v_region, place.v_offset, spec.dtype, heads, spec.v_head_dim),
        )

    def copy_rows(self, source: int, target: int, num_rows: int) -> None:
        for region, row_bytes in zip(self._regions, self._layout.row_bytes, strict=True):
            num_bytes = num_rows * row_bytes
            region[target, :num_bytes] = region[source, :num_bytes]

    def clear(self, blocks: Blocks) -> None:
        for region in self._regions:
            region[blocks] = 0

    def read(self, blocks: Blocks) -> BlockData:
        return [region[blocks] for region in self._regions]

    def write(self, blocks: Blocks, data: BlockData) -> None:
        for region, contents in zip(self._regions, data, strict=True):
            region[blocks] = contents

    def discard(self, blocks: Blocks, has_memory: NDArray[np.bool_]) -> None:
        # Whole runs without memory, so that a page whose blocks all left goes with the last one.
        edges = np.diff(has_memory.astype(np.int8), prepend=1, append=1)
        starts, ends = np.flatnonzero(edges == -1), np.flatnonzero(edges == 1)
        for run in np.unique(np.searchsorted(starts, blocks, side="right") - 1):
            for mapping, region in zip(self._maps, self._regions, strict=True):
                _discard_bytes(mapping, starts[run] * region.shape[1], ends[run] * region.shape[1])

    def close(self) -> None:
        # The mappings go when their last tensor does; until then they read as zeros.
        for mapping in self._maps:
            mapping.madvise(mmap.MADV_DONTNEED)
        self._maps.clear()
        self._regions.clear()

    def _view(self, region: int, offset: int, dtype: str, heads: int, head_dim: int) -> Tensor:
        itemsize = DTYPE_BYTES[dtype]
        row_bytes = self._layout.row_bytes[region]
        if offset % itemsize or row_bytes % itemsize:
            raise ConfigError(
                f"rows of {row_bytes} bytes with {dtype} at byte {offset} are not aligned to its "
                f"{itemsize} bytes; keep layers of one dtype together (layers_per_group)"
            )
        elements = torch.from_numpy(self._regions[region].reshape(-1)).view(getattr(torch, dtype))
        row = row_bytes // itemsize
        return elements.as_strided(
            (self._num_blocks, self._config.block_size, heads, head_dim),
            (self._config.block_size * row, row, head_dim, 1),
            offset // itemsize,
        )


def make_block_storage(config: KVCacheConfig, layout: KVLayout, num_blocks: int) -> BlockStorage:
    """The storage that ``config.driver`` names; ``"auto"`` is the host's memory."""
    if config.driver == "null":
        return NullBlockStorage()
    return HostBlockStorage(config, layout, num_blocks)


def _discard_bytes(mapping: mmap.mmap, start: int, end: int) -> None:
    start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    if end < len(mapping):  # past the end there is nobody to share the last page with
        end = end // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end:
        mapping.madvise(mmap.MADV_DONTNEED, int(start), int(end - start))
