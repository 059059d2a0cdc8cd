"""Attention and writes over slots against a float64 reference: one contract for every kernel.

On a GPU every kernel that is installed runs; under the interpreter those that run on a CPU.
"""

from __future__ import annotations

from dataclasses import replace

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
    random_query,
    reference,
)
from tests.kernels.slots import LAYOUTS, make_slot_batch
from vmalloc.backend import KVBatchView
from vmalloc.config import LayerKVSpec
from vmalloc.errors import ConfigError
from vmalloc.kernels.contiguous.dispatch import KERNELS, ContiguousKernels

MIXED = ([20, 1, 0, 1, 13, 2], [20, 90, 9, 33, 45, 34])
DECODES = ([1, 1, 0, 1, 1], [90, 1, 9, 17, 33])
LAYERS = (LayerKVSpec(num_kv_heads=3, k_head_dim=40, v_head_dim=40),)

# A kernel that reads whole tiles needs finite rows past the ends, which these batches have not.
NAMES = [name for name in KERNELS if name != "fa3-tma" and KERNELS[name]().absence() is None]


def kernels(name: str) -> ContiguousKernels:
    return ContiguousKernels(LAYERS, DEVICE or "cpu", prefer=[name])


def attend(name: str, query: Tensor, batch: PagedBatch, **settings: object) -> Tensor:
    """By the kernel of that name; skips the test where it refuses such calls."""
    try:
        return kernels(name).varlen_attention(
            query,
            batch.k_cache,
            batch.v_cache,
            batch.view,
            **settings,  # type: ignore[arg-type]
        )
    except ConfigError as refusal:
        pytest.skip(str(refusal))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [MIXED, DECODES], ids=["mixed", "decodes"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_matches_float64(
    name: str, lengths: tuple[list[int], list[int]], layout: str
) -> None:
    batch = make_slot_batch(*lengths, layout=layout)
    query = random_query(batch, 6, padding_rows=3)
    out = attend(name, query, batch, softmax_scale=0.2)
    assert_close(out, reference(query, batch, softmax_scale=0.2))
    assert not out[sum(lengths[0]) :].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("lengths", [MIXED, DECODES], ids=["mixed", "decodes"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(8, 2, 64), (3, 3, 128)])
@pytest.mark.parametrize("window_left", [-1, 20])
def test_sixteen_bits_match_float64(
    name: str,
    dtype: torch.dtype,
    lengths: tuple[list[int], list[int]],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window_left: int,
) -> None:
    batch = make_slot_batch(
        *lengths, dtype=dtype, num_kv_heads=num_kv_heads, k_dim=head_dim, num_rows=128
    )
    query = random_query(batch, num_heads, padding_rows=2)
    settings = {"softmax_scale": head_dim**-0.5, "window_left": window_left}
    out = attend(name, query, batch, **settings)
    assert_close(out, reference(query, batch, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sdpa"])
@pytest.mark.parametrize("lengths", [MIXED, DECODES], ids=["mixed", "decodes"])
@pytest.mark.parametrize(
    ("window_left", "softcap", "use_sinks"), [(0, 0.0, False), (15, 20.0, False), (40, 1.5, True)]
)
def test_window_softcap_and_sinks_match_float64(
    name: str,
    lengths: tuple[list[int], list[int]],
    window_left: int,
    softcap: float,
    use_sinks: bool,
) -> None:
    batch = make_slot_batch(*lengths)
    sinks = torch.tensor([0.5, 9.0, -torch.inf], device=DEVICE) if use_sinks else None
    settings = {
        "softmax_scale": 0.25,
        "window_left": window_left,
        "softcap": softcap,
        "sinks": sinks,
    }
    query = random_query(batch, 3)
    out = attend(name, query, batch, **settings)
    assert_close(out, reference(query, batch, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("window_left", [-1, 12])
def test_poison_outside_the_visible_keys_changes_nothing(name: str, window_left: int) -> None:
    outs = []
    for poison in (0.0, NAN, float("inf")):
        batch = make_slot_batch(*MIXED, poison=poison)
        if window_left >= 0:
            for q_len, used, slot in zip(*MIXED, batch.view.cache_batch_idx.tolist(), strict=True):
                hidden = slice(0, max(0, used - q_len - window_left))
                batch.k_cache[slot, hidden] = batch.v_cache[slot, hidden] = poison
        query = random_query(batch, 3)
        outs.append(attend(name, query, batch, softmax_scale=0.2, window_left=window_left))
    assert outs[0].isfinite().all()
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("name", [name for name in NAMES if name in ("triton", "sdpa")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_on_neither_mates_nor_bucket(name: str, dtype: torch.dtype) -> None:
    q_lens, used = [1, 20, 1, 5], [300, 40, 9, 70]
    batch = make_slot_batch(q_lens, used, dtype=dtype, num_rows=400)
    query = random_query(batch, 3)
    together = attend(name, query, batch, softmax_scale=0.125)
    bounds = batch.view.cu_seqlens_q.tolist()
    for i, (q_len, length) in enumerate(zip(q_lens, used, strict=True)):
        rows = slice(bounds[i], bounds[i + 1])
        slot = batch.view.cache_batch_idx[i : i + 1]
        view = KVBatchView(slot, int32([0, q_len]), int32([length]), q_len, 400)
        alone = attend(name, query[rows], replace(batch, view=view), softmax_scale=0.125)
        assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [MIXED, DECODES], ids=["mixed", "decodes"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_append_writes_the_new_rows_and_no_others(
    dtype: torch.dtype, lengths: tuple[list[int], list[int]], layout: str
) -> None:
    q_lens, used = lengths
    batch = make_slot_batch(q_lens, used, dtype=dtype, v_dim=24, layout=layout, poison=7.0)
    key = torch.randn(sum(q_lens) + 2, 3, 40, device=DEVICE).to(dtype)  # two of padding
    value = torch.randn(sum(q_lens) + 2, 2, 3, 24, device=DEVICE).to(dtype)[:, 1]
    whole = batch.k_cache.as_strided(
        (batch.k_cache.untyped_storage().nbytes() // dtype.itemsize,), (1,), 0
    )
    expected = whole.clone()
    k_expected = expected.as_strided(
        batch.k_cache.shape, batch.k_cache.stride(), batch.k_cache.storage_offset()
    )
    shares_storage = layout in ("interleaved", "per_layer", "pairs")
    v_expected = (
        expected.as_strided(
            batch.v_cache.shape, batch.v_cache.stride(), batch.v_cache.storage_offset()
        )
        if shares_storage
        else batch.v_cache.clone()
    )
    packed = 0
    for slot, q_len, length in zip(batch.view.cache_batch_idx.tolist(), q_lens, used, strict=True):
        new = slice(packed, packed + q_len)
        k_expected[slot, length - q_len : length] = key[new]
        v_expected[slot, length - q_len : length] = value[new]
        packed += q_len
    kernels("triton").append_kv(key, value, batch.k_cache, batch.v_cache, batch.view)
    assert torch.equal(whole, expected)  # other layers, gaps and slots included
    assert torch.equal(batch.v_cache, v_expected)


def test_written_chunk_by_chunk_matches_the_whole() -> None:
    total = 60
    batch = make_slot_batch([total], [total])
    query = random_query(batch, 3)
    k_cache, v_cache = batch.k_cache.fill_(NAN), batch.v_cache.fill_(NAN)
    outs, done = [], 0
    for size in (25, 1, 2, 30, 1, 1):
        done += size
        view = KVBatchView(batch.view.cache_batch_idx, int32([0, size]), int32([done]), size, done)
        new = slice(done - size, done)
        key, value = batch.keys[0][new].to(DEVICE), batch.values[0][new].to(DEVICE)
        kernels("triton").append_kv(key, value, k_cache, v_cache, view)
        outs.append(attend("triton", query[new], replace(batch, view=view), softmax_scale=0.2))
    assert_close(torch.cat(outs), reference(query, batch, softmax_scale=0.2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("q_lens", [[3, 1], [1, 1]])
def test_query_and_out_may_be_strided(name: str, q_lens: list[int]) -> None:
    batch = make_slot_batch(q_lens, [40, 80])
    query = random_query(batch, 18, padding_rows=3).unflatten(1, (3, 6))[:, 1]
    storage = torch.full((query.shape[0], 6, 2, 40), NAN, device=DEVICE)
    out = storage[:, :, 0]
    assert attend(name, query, batch, softmax_scale=0.125, out=out) is out
    assert_close(out, reference(query, batch, softmax_scale=0.125))
    assert storage[:, :, 1].isnan().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("q_lens", "used"), [([], []), ([0, 0], [0, 9])])
def test_empty_batches_give_zeros_and_write_nothing(
    name: str, q_lens: list[int], used: list[int]
) -> None:
    batch = make_slot_batch(q_lens, used, poison=7.0)
    before = batch.k_cache.clone()
    query = random_query(batch, 3, padding_rows=2)
    kernels(name).append_kv(query, query, batch.k_cache, batch.v_cache, batch.view)
    assert torch.equal(batch.k_cache, before)
    for rows in (query, query[:0]):
        out = attend(name, rows, batch, softmax_scale=1.0)
        assert torch.equal(out, torch.zeros_like(rows))


# ---- the choice


def test_the_kernel_is_named_by_the_kind_of_batch() -> None:
    decode, mixed = make_slot_batch(*DECODES), make_slot_batch(*MIXED)
    chosen = ContiguousKernels(LAYERS, DEVICE or "cpu")
    assert chosen.kernel_name(decode.view) == "triton-decode"  # float32: nothing else takes it
    assert chosen.kernel_name(mixed.view) == "triton-prefill"
    assert chosen.is_graph_safe
    assert chosen.lookahead_rows == 0


def test_a_forced_kernel_that_cannot_take_a_call_says_why() -> None:
    batch = make_slot_batch(*DECODES)
    query = random_query(batch, 3)
    forced = kernels("sdpa")
    assert not forced.is_graph_safe
    with pytest.raises(ConfigError, match="sdpa: it knows neither soft-cap nor sinks"):
        forced.varlen_attention(
            query, batch.k_cache, batch.v_cache, batch.view, softmax_scale=1.0, softcap=5.0
        )
    in_turn = ContiguousKernels(LAYERS, DEVICE or "cpu", prefer=["sdpa", "triton"])
    out = in_turn.varlen_attention(
        query, batch.k_cache, batch.v_cache, batch.view, softmax_scale=1.0, softcap=5.0
    )
    assert_close(out, reference(query, batch, softmax_scale=1.0, softcap=5.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seqlen_k": 99}, "max_seqlen_k is 99, must be at most 97, the rows of a slot"),
        ({"cache_batch_idx": int32([0])}, r"cache_batch_idx .* \(5,\)"),
        ({"block_table": torch.zeros(5, 9, dtype=torch.int32, device=DEVICE)}, "has a block table"),
    ],
)
def test_bad_views_are_named(changes: dict[str, object], message: str) -> None:
    batch = make_slot_batch(*DECODES)
    query = random_query(batch, 3)
    view = replace(batch.view, **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        kernels("triton").varlen_attention(
            query, batch.k_cache, batch.v_cache, view, softmax_scale=1.0
        )
