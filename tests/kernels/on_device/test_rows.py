"""The Triton launches that move rows do what their twins without Triton do."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.paged import DEVICE
from tests.kernels.slots import make_slot_batch
from vmalloc.kernels.contiguous.append import append_kv, put_rows
from vmalloc.kernels.contiguous.decode_rows import decode_rows, fill_decode_rows


@pytest.mark.parametrize("padding_rows", [0, 1, 300])
@pytest.mark.parametrize(
    ("q_lens", "used"),
    [([1], [5]), ([1, 0, 1, 1, 0], [300, 4, 1, 17, 0]), ([0, 1], [3, 3]), ([1] * 260, [7] * 260)],
)
def test_each_query_row_gets_the_slot_and_length_of_its_sequence(
    q_lens: list[int], used: list[int], padding_rows: int
) -> None:
    view = make_slot_batch(q_lens, used, num_kv_heads=1, k_dim=8).view
    num_rows = sum(q_lens) + padding_rows
    rows = decode_rows(view, num_rows, 1000)
    slots = [slot for slot, new in zip(view.cache_batch_idx.tolist(), q_lens, strict=True) if new]
    lengths = [length for length, new in zip(used, q_lens, strict=True) if new]
    assert rows.starts.tolist() == list(range(num_rows + 1))
    assert rows.slots.tolist() == slots + [0] * padding_rows
    assert rows.lengths.tolist() == lengths + [0] * padding_rows
    assert rows.slot_starts[:-1].tolist() == [1000 * slot for slot in rows.slots.tolist()]
    assert all(
        tensor.is_contiguous()
        for tensor in (rows.starts, rows.slots, rows.lengths, rows.slot_starts)
    )

    table = torch.full((4, num_rows + 1), -1, dtype=torch.int32, device=DEVICE)
    fill_decode_rows(table, view, 1000)
    without_triton = torch.stack(
        [rows.starts[:-1], rows.slots, rows.lengths, rows.slot_starts[:-1]]
    )
    assert torch.equal(table[:, :-1], without_triton)


@pytest.mark.parametrize(
    ("q_lens", "used"), [([70, 1, 0, 17], [100, 5, 9, 17]), ([1, 0, 1], [9, 4, 1]), ([2], [2])]
)
@pytest.mark.parametrize("padding_rows", [0, 3])
def test_rows_are_put_where_the_launch_puts_them(
    q_lens: list[int], used: list[int], padding_rows: int
) -> None:
    caches = []
    for write in (append_kv, put_rows):
        batch = make_slot_batch(q_lens, used, dtype=torch.bfloat16, poison=7.0)
        generator = torch.Generator().manual_seed(1)
        shape = (sum(q_lens) + padding_rows, 3, 40)
        key = torch.randn(shape, generator=generator).bfloat16().to(DEVICE)
        write(key, -key, batch.k_cache, batch.v_cache, batch.view)
        caches.append((batch.k_cache, batch.v_cache))
    assert torch.equal(caches[0][0], caches[1][0])
    assert torch.equal(caches[0][1], caches[1][1])
