"""CPU attention by block table: the bits of the contiguous kernel, and never a row too many.

Owns: nothing.  Thread-safety: single-threaded tests; they set the core's own thread count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.attention_batches import (
    DTYPES,
    NAN,
    RAGGED_Q,
    RAGGED_SLOTS,
    RAGGED_USED,
    assert_close,
    make_caches,
    make_view,
    reference,
    run_on_isa,
)
from vmalloc import _core
from vmalloc.backend import KVBatchView
from vmalloc.errors import ConfigError
from vmalloc.kernels.cpu import append_kv, kernel_name, varlen_attention

BLOCK_SIZES = [1, 5, 16, 64, 100]
UNUSED_ENTRY = 2**31 - 1  # in the table where no row lies; refused or fatal if ever followed

Blocks = tuple[Tensor, Tensor, KVBatchView]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Tests leave the thread count as they found it."""
    before = _core.num_threads()
    _core.set_num_threads(2)
    yield
    _core.set_num_threads(before)


def in_blocks(
    k_cache: Tensor, v_cache: Tensor, view: KVBatchView, block_size: int, *, first_key: int = 0
) -> Blocks:
    """The same batch by block table: shuffled blocks, NaN in every row that it does not use.

    Rows before ``first_key`` count as unused.
    """
    used = view.seqused_k.tolist()
    counts = [-(-length // block_size) for length in used]
    num_blocks = sum(counts) + 3
    k_blocks, v_blocks = make_caches(
        num_blocks,
        block_size,
        k_cache.shape[2],
        k_cache.shape[3],
        k_cache.dtype,
        v_head_dim=v_cache.shape[3],
    )
    k_blocks.fill_(NAN)
    v_blocks.fill_(NAN)
    free = torch.randperm(num_blocks).tolist()
    # Wider than it need be, and a slice of a yet wider one, as a backend's buffers are.
    table = torch.full((len(used), max(counts) + 5), UNUSED_ENTRY, dtype=torch.int32)[:, :-3]
    for i, (slot, length) in enumerate(zip(view.cache_batch_idx.tolist(), used, strict=True)):
        for j in range(counts[i]):
            block = table[i, j] = free.pop()
            begin, end = max(j * block_size, first_key), min((j + 1) * block_size, length)
            for blocks, cache in ((k_blocks, k_cache), (v_blocks, v_cache)):
                if begin < end:
                    rows = slice(begin - j * block_size, end - j * block_size)
                    blocks[block, rows] = cache[slot, begin:end]
    slots = torch.zeros_like(view.cache_batch_idx)
    return k_blocks, v_blocks, replace(view, cache_batch_idx=slots, block_table=table)


def gathered(blocks: Tensor, view: KVBatchView) -> Tensor:
    """A contiguous cache of the rows that the table names, one by one; zeros past them."""
    assert view.block_table is not None
    block_size = blocks.shape[1]
    cache = blocks.new_zeros(view.seqused_k.numel(), view.max_seqlen_k, *blocks.shape[2:])
    for i, length in enumerate(view.seqused_k.tolist()):
        for row in range(length):
            cache[i, row] = blocks[view.block_table[i, row // block_size], row % block_size]
    return cache


def assert_same_bits(out: Tensor, expected: Tensor) -> None:
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[out.dtype]
    assert not expected.isnan().any()
    assert torch.equal(out.view(bits), expected.view(bits))


# ---- the bits of the contiguous kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (6, 2), (8, 1)])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_ragged_batch_has_the_bits_of_the_contiguous_kernel(
    dtype: torch.dtype, head_dim: int, num_heads: int, num_kv_heads: int, block_size: int
) -> None:
    torch.manual_seed(head_dim + num_heads + block_size)
    k_cache, v_cache = make_caches(10, 200, num_kv_heads, head_dim, dtype)
    view = make_view(RAGGED_Q, RAGGED_USED, RAGGED_SLOTS)
    query = torch.randn(sum(RAGGED_Q) + 2, num_heads, head_dim).to(dtype)  # two rows of padding
    expected = varlen_attention(query, k_cache, v_cache, view, softmax_scale=0.2)
    blocks = in_blocks(k_cache, v_cache, view, block_size)
    assert_same_bits(varlen_attention(query, *blocks, softmax_scale=0.2), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(
    ("window_left", "softcap", "use_sinks"),
    [(0, 0.0, False), (15, 0.0, True), (63, 20.0, False), (64, 1.5, True), (-1, 1.5, True)],
)
def test_window_softcap_and_sinks_have_the_same_bits(
    dtype: torch.dtype, block_size: int, window_left: int, softcap: float, use_sinks: bool
) -> None:
    torch.manual_seed(window_left)
    k_cache, v_cache = make_caches(10, 200, 2, 64, dtype)
    view = make_view(RAGGED_Q, RAGGED_USED, RAGGED_SLOTS)
    query = torch.randn(sum(RAGGED_Q), 6, 64).to(dtype)
    sinks = torch.tensor([0.5, -3.0, 9.0, 0.0, -torch.inf, 2.0]) if use_sinks else None
    settings = {"softmax_scale": 0.25, "window_left": window_left, "softcap": softcap}
    expected = varlen_attention(query, k_cache, v_cache, view, sinks=sinks, **settings)
    blocks = in_blocks(k_cache, v_cache, view, block_size)
    assert_same_bits(varlen_attention(query, *blocks, sinks=sinks, **settings), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [5, 16])
def test_chunked_prefill_and_decode_through_the_cache_write_have_the_same_bits(
    dtype: torch.dtype, block_size: int
) -> None:
    """Two sequences written and attended chunk by chunk, in slots and in blocks."""
    torch.manual_seed(block_size)
    capacity = 220
    caches = [cache.fill_(NAN) for cache in make_caches(2, capacity, 2, 40, dtype)]
    width = -(-capacity // block_size)
    blocks = [cache.fill_(NAN) for cache in make_caches(2 * width, block_size, 2, 40, dtype)]
    table = torch.randperm(2 * width).int().view(2, width)
    lengths = [0, 0]
    for q_lens in ([64, 3], [1, 90], [100, 1], [7, 7], [1, 1], [1, 0], [40, 1]):
        lengths = [length + q_len for length, q_len in zip(lengths, q_lens, strict=True)]
        view = make_view(q_lens, lengths, [1, 0])
        by_table = replace(view, block_table=table)
        query = torch.randn(sum(q_lens), 6, 40).to(dtype)
        key, value = torch.randn(2, sum(q_lens), 2, 40).to(dtype)
        append_kv(key, value, *caches, view)
        append_kv(key, value, *blocks, by_table)
        expected = varlen_attention(query, *caches, view, softmax_scale=0.2, window_left=90)
        out = varlen_attention(query, *blocks, by_table, softmax_scale=0.2, window_left=90)
        assert_same_bits(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("block_size", [5, 16])
def test_same_bits_on_any_number_of_threads(
    dtype: torch.dtype, threads: int, block_size: int
) -> None:
    torch.manual_seed(8)
    k_cache, v_cache = make_caches(10, 700, 2, 64, dtype)
    q_lens, used = [1, 300, 1, 5, 64, 1, 200, 1], [700, 300, 9, 333, 64, 65, 650, 128]
    query = torch.randn(sum(q_lens), 6, 64).to(dtype)
    view = make_view(q_lens, used, [4, 1, 7, 0, 9, 2, 5, 3])
    expected = varlen_attention(query, k_cache, v_cache, view, softmax_scale=0.125)
    blocks = in_blocks(k_cache, v_cache, view, block_size)
    _core.set_num_threads(threads)
    assert_same_bits(varlen_attention(query, *blocks, softmax_scale=0.125), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_may_share_blocks(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    k_cache, v_cache = make_caches(3, 120, 2, 64, dtype)
    for cache in (k_cache, v_cache):
        cache[1, :80], cache[2, :48] = cache[0, :80], cache[0, :48]
    view = make_view([1, 20, 30], [115, 110, 90], [0, 1, 2])
    query = torch.randn(51, 4, 64).to(dtype)
    expected = varlen_attention(query, k_cache, v_cache, view, softmax_scale=0.125)
    k_blocks, v_blocks, by_table = in_blocks(k_cache, v_cache, view, 16)
    table = by_table.block_table
    assert table is not None
    for child, num_shared in ((1, 5), (2, 3)):
        for cache in (k_blocks, v_blocks):
            cache[table[child, :num_shared]] = NAN
        table[child, :num_shared] = table[0, :num_shared]
    out = varlen_attention(query, k_blocks, v_blocks, by_table, softmax_scale=0.125)
    assert_same_bits(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k_dim", "v_dim"), [(192, 128), (24, 256)])
def test_heads_may_lie_apart_and_k_and_v_may_differ(
    dtype: torch.dtype, k_dim: int, v_dim: int
) -> None:
    """Blocks that keep each head's rows together, as [num_blocks, heads, block_size, head_dim]."""
    torch.manual_seed(k_dim)
    k_cache, v_cache = make_caches(4, 130, 2, k_dim, dtype, v_head_dim=v_dim)
    view = make_view([1, 40, 1], [130, 100, 3], [3, 0, 1])
    query = torch.randn(42, 4, k_dim).to(dtype)
    expected = varlen_attention(query, k_cache, v_cache, view, softmax_scale=0.1)
    k_blocks, v_blocks, by_table = in_blocks(k_cache, v_cache, view, 16)
    k_blocks, v_blocks = (
        cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in (k_blocks, v_blocks)
    )
    out = varlen_attention(query, k_blocks, v_blocks, by_table, softmax_scale=0.1)
    assert_same_bits(out, expected)


# ---- the formula itself


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [5, 16])
def test_matches_a_float64_reference_over_rows_gathered_one_by_one(
    dtype: torch.dtype, block_size: int
) -> None:
    torch.manual_seed(3)
    k_blocks, v_blocks = make_caches(60, block_size, 2, 64, dtype)
    view = make_view([1, 33, 5], [2 * block_size, 40, 60], [0, 1, 2])
    table = torch.randperm(60).int()[:36].view(3, 12)
    by_table = replace(view, block_table=table)
    query = torch.randn(39, 6, 64).to(dtype)
    settings = {"softmax_scale": 0.125, "window_left": 30}
    out = varlen_attention(query, k_blocks, v_blocks, by_table, **settings)
    k_cache, v_cache = gathered(k_blocks, by_table), gathered(v_blocks, by_table)
    assert_close(out, reference(query, k_cache, v_cache, view, **settings))


# ---- what is not a sequence's own


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_poisoned_rows_before_the_window_change_nothing(
    dtype: torch.dtype, block_size: int
) -> None:
    """Rows past the ends are NaN in all of these tests; here so are those before the window."""
    torch.manual_seed(9)
    k_cache, v_cache = make_caches(4, 200, 2, 40, dtype)
    view = make_view([1, 30, 5], [150, 179, 154], [3, 0, 2])
    query = torch.randn(36, 4, 40).to(dtype)
    settings = {"softmax_scale": 0.2, "window_left": 20}
    expected = varlen_attention(query, k_cache, v_cache, view, **settings)
    blocks = in_blocks(k_cache, v_cache, view, block_size, first_key=129)
    assert_same_bits(varlen_attention(query, *blocks, **settings), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_append_kv_writes_the_new_rows_and_no_others(
    dtype: torch.dtype, threads: int, block_size: int
) -> None:
    torch.manual_seed(11)
    _core.set_num_threads(threads)
    k_blocks, v_blocks = make_caches(460, block_size, 3, 40, dtype, v_head_dim=64)
    q_lens, used = [300, 1, 0, 17], [400, 5, 9, 17]
    table = torch.full((4, 400), UNUSED_ENTRY, dtype=torch.int32)
    free = torch.randperm(460).tolist()
    for i, length in enumerate(used):
        for j in range(-(-length // block_size)):
            table[i, j] = free.pop()
    key = torch.randn(320, 3, 40).to(dtype)  # two rows of padding
    value = torch.randn(320, 2, 3, 64).to(dtype)[:, 1]
    k_expected, v_expected = k_blocks.clone(), v_blocks.clone()
    packed = 0
    for i, (q_len, length) in enumerate(zip(q_lens, used, strict=True)):
        for row in range(length - q_len, length):
            block = table[i, row // block_size]
            k_expected[block, row % block_size] = key[packed]
            v_expected[block, row % block_size] = value[packed]
            packed += 1
    view = replace(make_view(q_lens, used, [0] * 4), block_table=table)
    append_kv(key, value, k_blocks, v_blocks, view)
    assert torch.equal(k_blocks, k_expected)
    assert torch.equal(v_blocks, v_expected)


@pytest.mark.parametrize("max_blocks", [0, 1])
def test_empty_batches_and_empty_sequences_are_fine(max_blocks: int) -> None:
    k_blocks, v_blocks = make_caches(2, 16, 1, 8, torch.float32)
    nothing = torch.empty(0, 2, 8)
    for view in (make_view([], [], []), make_view([0, 0], [0, 9 * max_blocks], [0, 0])):
        table = torch.zeros(view.seqused_k.numel(), max_blocks, dtype=torch.int32)
        by_table = replace(view, block_table=table)
        append_kv(nothing[:, :1], nothing[:, :1], k_blocks, v_blocks, by_table)
        out = varlen_attention(nothing, k_blocks, v_blocks, by_table, softmax_scale=1.0)
        assert out.shape[0] == 0


# ---- instruction sets

ISA_SCRIPT = """
from tests.core import test_attention_block_table as cases
from vmalloc import _core
for dtype in cases.DTYPES:
    for block_size in (5, 16, 100):
        for head_dim in (40, 64):
            cases.test_ragged_batch_has_the_bits_of_the_contiguous_kernel(
                dtype, head_dim, 6, 2, block_size)
        cases.test_window_softcap_and_sinks_have_the_same_bits(dtype, block_size, 63, 1.5, True)
        cases.test_chunked_prefill_and_decode_through_the_cache_write_have_the_same_bits(
            dtype, block_size)
        cases.test_matches_a_float64_reference_over_rows_gathered_one_by_one(dtype, block_size)
print(cases.kernel_name(cases.GOOD))
"""


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_lower_instruction_sets_have_the_same_bits_too(isa: str) -> None:
    result = run_on_isa(ISA_SCRIPT, isa)
    assert result.returncode == 0, result.stderr
    if result.stdout.strip() != f"cpu_block_table_{isa}":
        pytest.skip(f"this CPU has no {isa}")


def test_kernel_name_says_layout_and_instruction_set() -> None:
    assert kernel_name(GOOD) == f"cpu_block_table_{_core.attention_isa()}"
    contiguous = replace(GOOD, block_table=None)
    assert kernel_name(contiguous) == f"cpu_contiguous_{_core.attention_isa()}"


# ---- bad arguments


def table_view(table: Tensor, used: tuple[int, int] = (5, 8)) -> KVBatchView:
    """Two and one new tokens of sequences that use ``used`` rows, in blocks of four."""
    return replace(make_view([2, 1], used, [0, 0]), block_table=table)


def entries(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


GOOD = table_view(entries([0, 2, UNUSED_ENTRY], [4, 1, -1]))


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (table_view(entries([0, 5], [4, 1])), r"block_table\[0, 1\] is 5, must be in \[0, 4\]"),
        (table_view(entries([0, 2], [-1, 1])), r"block_table\[1, 0\] is -1, must be in \[0, 4\]"),
        (table_view(entries([0, 2], [4, 1]), (5, 9)), r"seqused_k\[1\] is 9, must be in \[1, 8\]"),
        (table_view(entries([0, 2], [4, 1]), (1, 8)), r"seqused_k\[0\] is 1, must be in \[2, 8\]"),
        (table_view(torch.empty(2, 0, dtype=torch.int32)), r"seqused_k\[0\] is 5, .* \[2, 0\]"),
        (table_view(entries([0, 2])), r"block_table has shape \(1, 2\), must be \[2, max_blocks\]"),
        (table_view(entries([0, 2])[0]), r"block_table has shape \(2,\)"),
        (table_view(entries([0, 2], [4, 1]).long()), r"block_table is torch.int64"),
        (table_view(entries([0, 2], [4, 1]).t()), r"block_table is .* with strides \(1, 2\)"),
        (table_view(entries([0, 2], [4, 1]).to("meta")), r"block_table is .* on meta"),
    ],
)
def test_bad_tables_are_named_and_nothing_is_written(view: KVBatchView, message: str) -> None:
    k_blocks, v_blocks = make_caches(5, 4, 2, 8, torch.float32)
    before = k_blocks.clone()
    key = torch.randn(3, 2, 8)
    with pytest.raises(ConfigError, match=message):
        append_kv(key, key, k_blocks, v_blocks, view)
    assert torch.equal(k_blocks, before)
    out = torch.full((3, 4, 8), NAN)
    query = torch.randn(3, 4, 8)
    with pytest.raises(ConfigError, match=message):
        varlen_attention(query, k_blocks, v_blocks, view, softmax_scale=1.0, out=out)
    assert out.isnan().all()


def test_entries_past_the_last_row_are_not_looked_at() -> None:
    k_blocks, v_blocks = make_caches(5, 4, 2, 8, torch.float32)
    key = torch.randn(3, 2, 8)
    append_kv(key, key, k_blocks, v_blocks, GOOD)
    out = varlen_attention(torch.randn(3, 4, 8), k_blocks, v_blocks, GOOD, softmax_scale=1.0)
    assert out.isfinite().all()
