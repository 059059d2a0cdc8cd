"""Writing packed new rows into blocks: the right rows, bit for bit, and no others."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.paged import DEVICE, DTYPES, make_batch
from vmalloc.kernels.paged_gpu import append_kv

MIXED = ([70, 1, 0, 17, 5], [100, 5, 9, 17, 33])
DECODES = ([1, 1, 0, 1, 1], [100, 1, 9, 17, 33])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers, so that NaN equals itself."""
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("q_lens", "used"), [MIXED, DECODES])
@pytest.mark.parametrize(
    ("num_kv_heads", "k_dim", "v_dim", "block_size"),
    [(3, 40, 64, 16), (2, 128, 128, 32), (1, 80, 80, 5), (9, 128, 96, 16), (1, 3, 1, 1)],
)
def test_append_kv_writes_the_new_rows_and_no_others(
    dtype: torch.dtype,
    q_lens: list[int],
    used: list[int],
    num_kv_heads: int,
    k_dim: int,
    v_dim: int,
    block_size: int,
) -> None:
    batch = make_batch(
        q_lens,
        used,
        dtype=dtype,
        num_kv_heads=num_kv_heads,
        k_dim=k_dim,
        v_dim=v_dim,
        block_size=block_size,
    )
    rows = sum(q_lens)
    key = torch.randn(rows + 2, num_kv_heads, k_dim, device=DEVICE).to(dtype)  # two of padding
    value = torch.randn(rows + 2, 2, num_kv_heads, v_dim, device=DEVICE).to(dtype)[:, 1]
    k_expected, v_expected = batch.k_cache.clone(), batch.v_cache.clone()
    assert batch.view.block_table is not None
    packed = 0
    for i, (q_len, length) in enumerate(zip(q_lens, used, strict=True)):
        for row in range(length - q_len, length):
            block = int(batch.view.block_table[i, row // block_size])
            k_expected[block, row % block_size] = key[packed]
            v_expected[block, row % block_size] = value[packed]
            packed += 1
    append_kv(key, value, batch.k_cache, batch.v_cache, batch.view)
    assert torch.equal(bits(batch.k_cache), bits(k_expected))
    assert torch.equal(bits(batch.v_cache), bits(v_expected))


def test_append_kv_leaves_the_neighbouring_layer_alone() -> None:
    batch = make_batch([4, 1], [20, 40])
    other = batch.k_cache.as_strided(
        batch.k_cache.shape, batch.k_cache.stride(), storage_offset=0
    )  # the first layer's K
    key = torch.randn(5, 2, 64, device=DEVICE)
    append_kv(key, key, batch.k_cache, batch.v_cache, batch.view)
    assert other.isnan().all()
