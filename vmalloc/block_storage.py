"""The memory behind the blocks of the paged backend.

Owns: one anonymous mapping per region, and the tensor views of it.  Thread-safety: none; one engine
thread.

Memory is reserved at once and taken by the system's page when a row is first written. It goes back
by the system's page too: a page (4 KiB) that two blocks share goes when neither has memory left, so
a block whose size is no multiple of it may leave its edges behind.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .block_pool import Blocks
from .block_views import BlockCopy, BlockData, block_views
from .config import KVCacheConfig
from .errors import ConfigError
from .layout import KVLayout
from .torch_block_storage import TorchBlockStorage

_MAP_NORESERVE = 0x4000  # Linux; the mmap module names it from Python 3.13 on


class BlockStorage(Protocol):
    """What the paged backend does with the memory of its blocks."""

    @property
    def name(self) -> str:
        """Where the memory comes from: ``"host"``, ``"torch"`` or ``"null"``."""
        ...

    @property
    def gives_back(self) -> bool:
        """Whether ``discard`` gives memory back; else all of it is taken at start."""
        ...

    def layer_views(self, layer_idx: int) -> tuple[Tensor, Tensor]: ...

    def copy_rows(self, copies: Sequence[BlockCopy]) -> None:
        """Copy the first rows of blocks, all layers, to others.

        No target is a source, or another's target.
        """
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
    gives_back = True

    def layer_views(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        raise ConfigError("the null driver only counts pages; it has no tensors")

    def copy_rows(self, copies: Sequence[BlockCopy]) -> None:
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
    gives_back = True

    def __init__(self, config: KVCacheConfig, layout: KVLayout, num_blocks: int) -> None:
        self._config = config
        self._layout = layout
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
        regions = [torch.from_numpy(region) for region in self._regions]
        return block_views(regions, self._config, self._layout, layer_idx)

    def copy_rows(self, copies: Sequence[BlockCopy]) -> None:
        for region, row_bytes in zip(self._regions, self._layout.row_bytes, strict=True):
            for source, target, num_rows in copies:
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


def make_block_storage(config: KVCacheConfig, layout: KVLayout, num_blocks: int) -> BlockStorage:
    """The storage for the driver of ``config``; CUDA's memory comes by way of torch."""
    if config.driver_name == "null":
        return NullBlockStorage()
    if config.driver_name == "cuda":
        return TorchBlockStorage(config, layout, num_blocks)
    return HostBlockStorage(config, layout, num_blocks)


def _discard_bytes(mapping: mmap.mmap, start: int, end: int) -> None:
    start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    if end < len(mapping):  # past the end there is nobody to share the last page with
        end = end // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end:
        mapping.madvise(mmap.MADV_DONTNEED, int(start), int(end - start))
