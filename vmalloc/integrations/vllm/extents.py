"""Which bytes of vLLM's KV allocation a block is, and which blocks get memory together.

vLLM numbers blocks; it keeps all layers in one allocation, where block ``b`` of layer ``l`` starts
at ``offset + l * layer_stride + b * block_stride``. In a layer-outer layout a block is one piece a
layer, most often smaller than a page of the device; in a block-outer one it is a single piece. An
*extent* is the run of consecutive blocks whose piece in one layer fills about one page: the unit
that is committed, so that a page is rarely shared by blocks of different fate.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import lcm
from typing import Any

from ...config import DEFAULT_PAGE_BYTES
from ...errors import ConfigError

CUDA_PAGE_BYTES = 2 << 20
HOST_GRANULARITY = 4096


@dataclass(frozen=True, slots=True)
class Piece:
    """Blocks side by side: block ``b`` is at ``[offset + b * stride, offset + (b + 1) * stride)``.

    Several layers whose bytes interleave within a block are one piece.
    """

    offset: int
    stride: int


@dataclass(frozen=True)
class Extents:
    """The blocks of one KV allocation in runs that get memory together.

    Attributes:
        num_blocks: all of them, vLLM's null block 0 included.
        num_bytes: of the allocation.
        pieces: what a block consists of.
        page_bytes: physical unit.
        blocks_per_extent: all extents but the last have so many.
    """

    num_blocks: int
    num_bytes: int
    pieces: tuple[Piece, ...]
    page_bytes: int
    blocks_per_extent: int

    @classmethod
    def of(cls, kv_cache_config: Any, device_type: str, page_bytes: int | None) -> Extents:
        """From vLLM's ``KVCacheConfig``, the same in the scheduler and in every worker.

        Raises:
            ConfigError: there is no KV cache, or its layout puts something outside the blocks that
                is not the layers.
        """
        tensors = kv_cache_config.kv_cache_tensors
        if not tensors:
            raise ConfigError("the model has no KV cache; it needs no elastic worker")
        num_blocks = kv_cache_config.num_blocks
        pieces = sorted({piece for tensor in tensors for piece in _pieces(tensor, num_blocks)})
        stride = max(size for _, size in pieces)
        page = page_bytes or _default_page_bytes(device_type, stride)
        return cls(
            num_blocks=num_blocks,
            num_bytes=tensors[0].size,
            pieces=tuple(Piece(offset, size) for offset, size in pieces),
            page_bytes=page,
            blocks_per_extent=max(1, page // stride),
        )

    @cached_property
    def num_extents(self) -> int:
        return -(-self.num_blocks // self.blocks_per_extent)

    @cached_property
    def max_extent_pages(self) -> int:
        """Most pages that committing one extent can take."""
        size, page = self.blocks_per_extent, self.page_bytes
        # A run of n bytes that starts anywhere lies in at most ceil((n - 1) / page) + 1 pages; in
        # exactly n / page where everything starts and ends on pages.
        total = 0
        for piece in self.pieces:
            num_bytes = size * piece.stride
            is_aligned = piece.offset % page == 0 and num_bytes % page == 0
            total += num_bytes // page if is_aligned else (num_bytes - 2) // page + 2
        return total

    def blocks(self, extent: int) -> range:
        """Ids of the blocks of an extent."""
        first = extent * self.blocks_per_extent
        return range(first, min(first + self.blocks_per_extent, self.num_blocks))

    def extent_of(self, block_id: int) -> int:
        return block_id // self.blocks_per_extent

    def byte_ranges(self, extents: Iterable[int]) -> list[range]:
        """Bytes of the allocation that the extents are; neighbours come as one range."""
        ranges = []
        for first, last in _runs(sorted(extents)):
            start, end = self.blocks(first).start, self.blocks(last).stop
            for piece in self.pieces:
                ranges.append(
                    range(piece.offset + start * piece.stride, piece.offset + end * piece.stride)
                )
        return ranges


def _pieces(tensor: Any, num_blocks: int) -> Iterator[tuple[int, int]]:
    """(offset, stride) of each piece of one of vLLM's ``KVCacheTensor``."""
    layer_bytes, stride = tensor.layer_stride, tensor.block_stride
    if stride * num_blocks > tensor.size or layer_bytes == 0:
        raise ConfigError(
            f"a KV cache tensor has a block stride of {stride} bytes for {num_blocks} blocks in "
            f"{tensor.size} bytes; such a layout is not supported"
        )
    if len(tensor.layers) * layer_bytes <= stride:  # block-outer: the layers lie within the block
        yield 0, stride
        return
    if layer_bytes != stride * num_blocks:
        raise ConfigError(
            f"a layer takes {layer_bytes} bytes and its {num_blocks} blocks {stride} each; "
            "heads outside the blocks are not supported (VLLM_KV_CACHE_LAYOUT: LBHNC, LBNHC, "
            "BLHNC or BLNHC)"
        )
    for idx in range(len(tensor.layers)):
        yield tensor.offset + idx * layer_bytes, stride


def _default_page_bytes(device_type: str, stride: int) -> int:
    if device_type != "cpu":
        return CUDA_PAGE_BYTES
    # The host maps pages of any size: take one that blocks fill exactly.
    fitting = lcm(stride, HOST_GRANULARITY)
    if fitting > max(stride, DEFAULT_PAGE_BYTES):
        return DEFAULT_PAGE_BYTES
    return fitting * -(-DEFAULT_PAGE_BYTES // fitting)


def _runs(extents: list[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    start = 0
    for idx in range(1, len(extents) + 1):
        if idx == len(extents) or extents[idx] != extents[idx - 1] + 1:
            yield extents[start], extents[idx - 1]
            start = idx
