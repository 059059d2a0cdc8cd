"""Triton attention over block tables against a float64 reference, and what it must not touch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.kernels.paged import (
    DEVICE,
    DTYPES,
    NAN,
    PagedBatch,
    assert_close,
    int32,
    make_batch,
    random_query,
    reference,
)
from vmalloc.backend import KVBatchView
from vmalloc.kernels.paged_gpu import append_kv
from vmalloc.kernels.paged_gpu import varlen_attention as any_kernel_attention
from vmalloc.kernels.triton_decode import MAX_SPLITS, MIN_SPLIT_KEYS, max_splits

varlen_attention = partial(any_kernel_attention, may_use_flash_attn=False)

# A new sequence, decodes, a later chunk, an empty entry, a chunk of two, tile and split edges.
# Tiles are larger in 16 bits than in 32, and the interpreter takes its time per tile.
RAGGED = {
    4: ([20, 1, 1, 13, 0, 2, 1, 16, 1], [20, 1, 90, 45, 0, 34, 16, 32, 33]),
    2: ([70, 1, 1, 33, 0, 2, 1, 64, 1], [70, 1, 200, 150, 0, 64, 64, 128, 65]),
}


def check(batch: PagedBatch, num_heads: int, **settings: object) -> Tensor:
    """Attention of random queries, compared with the reference."""
    query = random_query(batch, num_heads)
    settings.setdefault("softmax_scale", query.shape[2] ** -0.5)
    out = varlen_attention(query, batch.k_cache, batch.v_cache, batch.view, **settings)  # type: ignore[arg-type]
    assert out.dtype == query.dtype
    assert_close(out, reference(query, batch, **settings))  # type: ignore[arg-type]
    return out


def rows_of(out: Tensor, batch: PagedBatch, sequence: int) -> Tensor:
    start, end = batch.view.cu_seqlens_q[sequence : sequence + 2].tolist()
    return out[start:end]


def alone(batch: PagedBatch, sequence: int) -> KVBatchView:
    """A view of one sequence of a batch, with its own largest lengths."""
    bounds = batch.view.cu_seqlens_q.tolist()
    num_new = bounds[sequence + 1] - bounds[sequence]
    used = int(batch.view.seqused_k[sequence])
    assert batch.view.block_table is not None
    table = batch.view.block_table[sequence : sequence + 1]
    return KVBatchView(int32([0]), int32([0, num_new]), int32([used]), num_new, used, table)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(3, 3, 40), (4, 2, 80), (3, 1, 96), (8, 1, 128), (7, 1, 64), (2, 1, 256), (20, 1, 8)],
)
def test_ragged_batch_matches_float64(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    lengths = RAGGED[dtype.itemsize]
    batch = make_batch(*lengths, dtype=dtype, num_kv_heads=num_kv_heads, k_dim=head_dim)
    check(batch, num_heads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("window_left", "softcap", "use_sinks"),
    [(0, 0.0, False), (15, 0.0, False), (63, 0.0, True), (64, 20.0, False), (-1, 1.5, True)],
)
def test_window_softcap_and_sinks_match_float64(
    dtype: torch.dtype, window_left: int, softcap: float, use_sinks: bool
) -> None:
    batch = make_batch(*RAGGED[dtype.itemsize], dtype=dtype, num_kv_heads=1)
    sinks = [0.5, 9.0, -torch.inf]
    check(
        batch,
        3,
        softmax_scale=0.25,
        window_left=window_left,
        softcap=softcap,
        sinks=torch.tensor(sinks, device=DEVICE) if use_sinks else None,
    )


@pytest.mark.parametrize("block_size", [1, 5, 32, 48])
@pytest.mark.parametrize("window_left", [-1, 40])
def test_any_block_size_is_right(block_size: int, window_left: int) -> None:
    batch = make_batch(*RAGGED[4], block_size=block_size, num_kv_heads=1, k_dim=40)
    check(batch, 2, window_left=window_left)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k_dim", "v_dim"), [(192, 128), (64, 40), (24, 72)])
def test_k_and_v_head_dims_may_differ(dtype: torch.dtype, k_dim: int, v_dim: int) -> None:
    batch = make_batch([1, 20, 1], [70, 50, 3], dtype=dtype, k_dim=k_dim, v_dim=v_dim)
    out = check(batch, 4)
    assert out.shape == (22, 4, v_dim)


def test_a_group_larger_than_a_tile_is_cut() -> None:
    check(make_batch([1, 3], [40, 40], num_kv_heads=1, k_dim=16), 71)
    check(make_batch([1], [40], num_kv_heads=1, k_dim=16, dtype=torch.float16), 71)


def test_large_scores_neither_overflow_nor_lose_the_maximum() -> None:
    batch = make_batch([40, 1], [40, 300], num_kv_heads=1)
    query = 30 * random_query(batch, 2)
    out = varlen_attention(query, batch.k_cache, batch.v_cache, batch.view, softmax_scale=1.0)
    expected = reference(query, batch, softmax_scale=1.0)
    # Scores of a few hundred carry an error of a few 1e-5 themselves.
    torch.testing.assert_close(out.cpu().double(), expected, atol=1e-3, rtol=0)


# ---- splits of decodes


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("window_left", [-1, 256])
def test_decode_is_right_around_split_boundaries(dtype: torch.dtype, window_left: int) -> None:
    step = MIN_SPLIT_KEYS.value
    used = [1, step - 1, step, step + 1, 2 * step, 2 * step + 1]
    batch = make_batch([1] * len(used), used, dtype=dtype, num_kv_heads=1, k_dim=16)
    assert max_splits(batch.view.max_seqlen_k, window_left, 16) > 1
    sinks = torch.tensor([0.3, 1.0], device=DEVICE)
    check(batch, 2, window_left=window_left, sinks=sinks)


def test_longest_sequences_get_longer_splits() -> None:
    most = MIN_SPLIT_KEYS.value * MAX_SPLITS.value
    used = [most, most + 1]
    assert max_splits(used[0], -1, 16) == max_splits(used[1], -1, 16) == MAX_SPLITS.value
    check(make_batch([1, 1], used, dtype=torch.float16, num_kv_heads=1, k_dim=16), 1)


# ---- the same bits, whatever the batch


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {"window_left": 270, "softcap": 5.0}),
        (torch.float16, {}),
        (torch.bfloat16, {}),
    ],
)
def test_bits_do_not_depend_on_batch_mates(dtype: torch.dtype, settings: dict[str, float]) -> None:
    used = [300, 40, 9, 70, 280, 33]
    batch = make_batch([1, 20, 1, 5, 1, 2], used, dtype=dtype)
    query = random_query(batch, 4)
    caches = batch.k_cache, batch.v_cache
    together = varlen_attention(query, *caches, batch.view, softmax_scale=0.125, **settings)  # type: ignore[arg-type]
    for sequence in range(len(used)):
        own = rows_of(query, batch, sequence)
        view = alone(batch, sequence)
        out = varlen_attention(own, *caches, view, softmax_scale=0.125, **settings)  # type: ignore[arg-type]
        assert torch.equal(out, rows_of(together, batch, sequence))


def test_a_larger_bound_on_lengths_changes_no_bit() -> None:
    batch = make_batch([1, 1], [300, 20])
    query = random_query(batch, 2)
    outs = []
    for longest in (300, 336):
        view = batch.view
        view = KVBatchView(
            view.cache_batch_idx,
            view.cu_seqlens_q,
            view.seqused_k,
            1,
            longest,
            view.block_table,
        )
        outs.append(varlen_attention(query, batch.k_cache, batch.v_cache, view, softmax_scale=1.0))
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    ("dtype", "window_left"), [(torch.float32, 37), (torch.float16, -1), (torch.bfloat16, -1)]
)
def test_chunks_written_and_attended_one_by_one_match_the_whole(
    dtype: torch.dtype, window_left: int
) -> None:
    total = 100
    batch = make_batch([total], [total], dtype=dtype, k_dim=40)
    query = random_query(batch, 4)
    k_cache, v_cache = torch.full_like(batch.k_cache, NAN), torch.full_like(batch.v_cache, NAN)
    outs, done = [], 0
    for size in (40, 1, 2, 3, 30, 1, 23):
        done += size
        table = batch.view.block_table
        view = KVBatchView(int32([0]), int32([0, size]), int32([done]), size, done, table)
        new = slice(done - size, done)
        key, value = batch.keys[0][new].to(DEVICE), batch.values[0][new].to(DEVICE)
        append_kv(key, value, k_cache, v_cache, view)
        outs.append(
            varlen_attention(
                query[new], k_cache, v_cache, view, softmax_scale=0.2, window_left=window_left
            )
        )
    assert done == total
    assert_close(
        torch.cat(outs), reference(query, batch, softmax_scale=0.2, window_left=window_left)
    )


# ---- what lies outside a row's keys


@pytest.mark.parametrize(
    ("dtype", "poison", "window_left"),
    [
        (torch.float32, NAN, 20),
        (torch.float32, float("inf"), -1),
        (torch.float16, NAN, -1),
        (torch.bfloat16, NAN, 20),
        (torch.bfloat16, NAN, -1),
    ],
)
def test_poison_outside_the_visible_keys_changes_nothing(
    dtype: torch.dtype, poison: float, window_left: int
) -> None:
    q_lens, used = [1, 30, 5, 1], [70, 75, 40, 64]
    clean = make_batch(q_lens, used, dtype=dtype, k_dim=40, poison=0.0)
    poisoned = make_batch(q_lens, used, dtype=dtype, k_dim=40, poison=poison)
    query = random_query(clean, 4)
    assert poisoned.view.block_table is not None
    if window_left >= 0:
        for i, (q_len, length) in enumerate(zip(q_lens, used, strict=True)):
            rows = torch.arange(length - q_len - window_left, device=DEVICE)
            blocks = poisoned.view.block_table[i, rows // 16].long()
            for cache in (poisoned.k_cache, poisoned.v_cache):
                cache[blocks, rows % 16] = poison
    outs = [
        varlen_attention(
            query,
            batch.k_cache,
            batch.v_cache,
            batch.view,
            softmax_scale=0.2,
            window_left=window_left,
        )
        for batch in (clean, poisoned)
    ]
    assert outs[0].isfinite().all()
    assert torch.equal(*outs)


# ---- shapes of the arguments


@pytest.mark.parametrize("q_lens", [[3, 1], [1, 1]])
def test_query_and_out_may_be_strided_and_padding_rows_give_zero(q_lens: list[int]) -> None:
    batch = make_batch(q_lens, [40, 80])
    rows = sum(q_lens)
    query = random_query(batch, 12, padding_rows=3).unflatten(1, (3, 4))[:, 1]
    storage = torch.full((rows + 3, 4, 2, 64), NAN, device=DEVICE)
    out = storage[:, :, 0]
    result = varlen_attention(
        query, batch.k_cache, batch.v_cache, batch.view, softmax_scale=0.125, out=out
    )
    assert result is out
    assert_close(out, reference(query, batch, softmax_scale=0.125))
    assert not out[rows:].any()
    assert storage[:, :, 1].isnan().all()


@pytest.mark.parametrize(("q_lens", "used"), [([], []), ([0, 0], [0, 9])])
def test_empty_batch_and_empty_sequences_are_fine(q_lens: list[int], used: list[int]) -> None:
    batch = make_batch(q_lens, used, k_dim=8)
    before = batch.k_cache.clone()
    query = random_query(batch, 2, padding_rows=2)
    new = query[:, :1].repeat(1, 2, 1)
    append_kv(new, new, batch.k_cache, batch.v_cache, batch.view)
    assert torch.equal(batch.k_cache.nan_to_num(7.0), before.nan_to_num(7.0))
    for rows in (query, query[:0]):
        out = varlen_attention(rows, batch.k_cache, batch.v_cache, batch.view, softmax_scale=1.0)
        assert torch.equal(out, torch.zeros_like(rows))
