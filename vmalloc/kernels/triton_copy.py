"""Batched copies of whole blocks, or of their first rows, within one block storage.

The third of the three kernels that the PagedAttention paper names (Kwon et al., 2023, section
5.1): all copies that copy-on-write asks for in a step, in one launch. Proven under Triton's
interpreter; not yet run on a GPU.

Owns: nothing.  Thread-safety: launches go to the caller's current stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_ELEMENTS: Final = 2048
"""What one program copies."""

_WORDS: Final = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))


def launch_copy(blocks: Tensor, pairs: Tensor, num_rows: Tensor | None) -> None:
    """Enqueue the copies. Arguments as in ``paged_gpu.copy_blocks``, which checks them."""
    words = as_words(blocks)
    num_parts, block_size, row_words = words.shape[1:]
    grid = (pairs.shape[0], num_parts, triton.cdiv(block_size * row_words, CHUNK_ELEMENTS))
    copy_kernel[grid](
        words,
        pairs,
        num_rows,
        words.stride(0),
        words.stride(1),
        row_words,
        block_size,
        CHUNK=CHUNK_ELEMENTS,
    )


def as_words(blocks: Tensor) -> Tensor:
    """The same memory as the widest integers that its shape and addresses allow."""
    size = blocks.element_size()
    steps = [blocks.data_ptr(), blocks.shape[-1] * size]
    steps += [stride * size for stride in blocks.stride()[:-1]]
    dtype = next(dtype for width, dtype in _WORDS if all(step % width == 0 for step in steps))
    return blocks.view(dtype)


@triton.jit
def copy_kernel(
    blocks,
    pairs,
    num_rows,
    block_stride,
    part_stride,
    row_words,
    block_size,
    CHUNK: tl.constexpr,
):
    """Program ``(pair, part, chunk)`` copies one chunk of one part of one block."""
    pair = tl.program_id(0)
    source = tl.load(pairs + 2 * pair).to(tl.int64)
    target = tl.load(pairs + 2 * pair + 1).to(tl.int64)
    stop = block_size * row_words
    if num_rows is not None:
        stop = tl.minimum(tl.load(num_rows + pair), block_size) * row_words
    part = tl.program_id(1).to(tl.int64) * part_stride
    words = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    data = tl.load(blocks + source * block_stride + part + words, mask=words < stop, other=0)
    tl.store(blocks + target * block_stride + part + words, data, mask=words < stop)
