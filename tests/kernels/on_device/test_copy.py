"""Block copies: whole blocks and leading rows, over any layout of the parts of a block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.paged import DEVICE, int32
from vmalloc.kernels.paged_gpu import copy_blocks
from vmalloc.kernels.triton_copy import as_words

PAIRS = [(0, 5), (0, 3), (6, 1)]


def random_bytes(*shape: int) -> Tensor:
    """Any bit pattern, among them NaNs with a payload."""
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(DEVICE)


@pytest.mark.parametrize(
    ("block_size", "row_bytes", "word"),
    [
        (16, 4096, torch.int64),
        (16, 12, torch.int32),
        (5, 240, torch.int64),
        (3, 6, torch.int16),
        (1, 7, torch.uint8),
    ],
)
@pytest.mark.parametrize("num_rows", [None, [0, 1, 99]])
def test_copies_leading_rows_and_nothing_else(
    block_size: int, row_bytes: int, word: torch.dtype, num_rows: list[int] | None
) -> None:
    blocks = random_bytes(7, 1, block_size, row_bytes)
    assert as_words(blocks).dtype == word
    expected = blocks.clone()
    for i, (source, target) in enumerate(PAIRS):
        rows = block_size if num_rows is None else min(num_rows[i], block_size)
        expected[target, :, :rows] = blocks[source, :, :rows]
    pairs = int32([block for pair in PAIRS for block in pair]).unflatten(0, (-1, 2))
    copy_blocks(blocks, pairs, None if num_rows is None else int32(num_rows))
    assert torch.equal(blocks, expected)


def test_one_launch_copies_all_layers_of_layer_major_storage() -> None:
    layers = random_bytes(4, 2, 7, 16, 160).view(torch.bfloat16)  # layer, K or V, block, row
    blocks = layers.flatten(0, 1).transpose(0, 1)
    expected = layers.view(torch.int16).clone()
    expected[:, :, 2, :9] = expected[:, :, 4, :9]
    copy_blocks(blocks, int32([4, 2]).unflatten(0, (1, 2)), int32([9]))
    assert torch.equal(layers.view(torch.int16), expected)


def test_no_pairs_is_fine() -> None:
    blocks = random_bytes(2, 1, 4, 8)
    before = blocks.clone()
    copy_blocks(blocks, int32([]).unflatten(0, (0, 2)))
    assert torch.equal(blocks, before)
