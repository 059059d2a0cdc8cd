"""The memory behind the blocks of the paged backend on a CUDA device: torch tensors.

Owns: one tensor per region.  Thread-safety: none; one engine thread.

All of it is taken, and cleared, at start, and nothing goes back to the system before the last
tensor does: a tensor's memory cannot shrink in place. What is enqueued goes to torch's current
stream, in whose order blocks pass from one sequence to the next. It works on the CPU too, which is
how it is tested; not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .block_pool import Blocks
from .block_views import BlockCopy, BlockData, block_views
from .config import KVCacheConfig
from .device import tensor_device
from .errors import ConfigError
from .layout import KVLayout

STAGING_BYTES = 64 << 20
"""Device memory that reading or writing blocks takes at most, beside one block a region."""


class TorchBlockStorage:
    """Blocks in tensors on ``config.device``.

    Raises:
        ConfigError: torch has no such device, or not so much memory there.
    """

    name = "torch"
    gives_back = False

    def __init__(self, config: KVCacheConfig, layout: KVLayout, num_blocks: int) -> None:
        self._config = config
        self._layout = layout
        self._device = tensor_device(config.device)
        shapes = [(num_blocks, config.block_size * row) for row in layout.row_bytes]
        try:
            # Cleared: a kernel may multiply rows past a sequence's end by 0, so they must be
            # finite.
            self._regions = [
                torch.zeros(shape, dtype=torch.uint8, device=self._device) for shape in shapes
            ]
        except RuntimeError as error:
            raise ConfigError(
                f"capacity_bytes is {config.capacity_bytes}; the paged backend takes all of it at "
                f"start, and torch cannot: {error}"
            ) from error

    def layer_views(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        return block_views(self._regions, self._config, self._layout, layer_idx)

    def copy_rows(self, copies: Sequence[BlockCopy]) -> None:
        """See ``BlockStorage``; on a CUDA device one launch a region, however many there are."""
        if not copies:
            return
        if self._device.type == "cuda":
            self._launch_copies(copies)
            return
        for region, row_bytes in zip(self._regions, self._layout.row_bytes, strict=True):
            for source, target, num_rows in copies:
                num_bytes = num_rows * row_bytes
                region[target, :num_bytes] = region[source, :num_bytes]

    def clear(self, blocks: Blocks) -> None:
        if len(blocks):
            idx = self._index(blocks)
            for region in self._regions:
                region.index_fill_(0, idx, 0)

    def read(self, blocks: Blocks) -> BlockData:
        return [self._read(region, blocks) for region in self._regions]

    def write(self, blocks: Blocks, data: BlockData) -> None:
        for region, contents in zip(self._regions, data, strict=True):
            for part in self._parts(region, len(blocks)):
                staged = torch.from_numpy(contents[part]).to(self._device)
                region.index_copy_(0, self._index(blocks[part]), staged)

    def discard(self, blocks: Blocks, has_memory: NDArray[np.bool_]) -> None:
        """Nothing can be given back."""

    def close(self) -> None:
        # The memory goes when the last tensor that was handed out does.
        self._regions.clear()

    def _launch_copies(self, copies: Sequence[BlockCopy]) -> None:
        from .kernels.paged_gpu import copy_blocks

        staged = torch.tensor(copies, dtype=torch.int32)
        if self._device.type == "cuda":
            staged = staged.pin_memory().to(self._device, non_blocking=True)
        pairs, num_rows = staged[:, :2].contiguous(), staged[:, 2].contiguous()
        for region, row_bytes in zip(self._regions, self._layout.row_bytes, strict=True):
            blocks = region.view(len(region), 1, self._config.block_size, row_bytes)
            copy_blocks(blocks, pairs, num_rows)

    def _read(self, region: Tensor, blocks: Blocks) -> NDArray[np.uint8]:
        contents = np.empty((len(blocks), region.shape[1]), np.uint8)
        for part in self._parts(region, len(blocks)):
            chosen = region.index_select(0, self._index(blocks[part]))
            torch.from_numpy(contents[part]).copy_(chosen)
        return contents

    def _parts(self, region: Tensor, count: int) -> list[slice]:
        """Runs of positions whose blocks fit the staging memory."""
        step = max(STAGING_BYTES // region.shape[1], 1)
        return [slice(first, min(first + step, count)) for first in range(0, count, step)]

    def _index(self, blocks: Blocks) -> Tensor:
        return torch.from_numpy(blocks.astype(np.int64)).to(self._device)
