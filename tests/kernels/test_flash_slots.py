"""What is handed to each FlashAttention over slots: against stand-ins that follow its words.

The libraries need a GPU. The stand-ins take the arguments by the names of the real ones, find the
rows as those do, and attend in float64.

Owns: nothing.  Thread-safety: single-threaded tests.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.paged import NAN, PagedBatch
from tests.kernels.paged import reference as float64_reference
from tests.kernels.slots import LAYOUTS, make_slot_batch
from vmalloc.backend import KVBatchView
from vmalloc.kernels.attention_call import AttentionCall
from vmalloc.kernels.buckets import bucket_rows
from vmalloc.kernels.contiguous.case import case_of, shape_refusal
from vmalloc.kernels.contiguous.flash_attn_2 import FlashAttn2
from vmalloc.kernels.contiguous.flash_attn_3 import FlashAttn3, page_refusal
from vmalloc.kernels.contiguous.flash_infer import FlashInfer, paging_refusal
from vmalloc.kernels.contiguous.kernel import SlotKernel
from vmalloc.kernels.contiguous.torch_flash import TorchFlash, packing_refusal

MIXED = ([20, 1, 0, 1, 13, 2], [20, 90, 9, 33, 45, 34])
DECODES = ([1, 0, 1, 1, 0], [300, 4, 5, 256, 0])
ROWS = 512


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attend_rows(
    query: Tensor, bounds: list[int], rows: list[tuple[Tensor, Tensor]], **settings: Any
) -> Tensor:
    """Packed ``query`` over each sequence's own K and V rows; NaN where no sequence has a row."""
    out = torch.full((query.shape[0], query.shape[1], rows[0][1].shape[2]), NAN, dtype=query.dtype)
    view = KVBatchView(int32([]), int32(bounds), int32([]), 0, 0)
    batch = PagedBatch(
        rows[0][0][None], rows[0][1][None], view, *map(list, zip(*rows, strict=True))
    )
    attended = float64_reference(query[: bounds[-1]], batch, **settings).to(query.dtype)
    # A row that sees no key is documented to give 0; the formula gives NaN.
    out[: bounds[-1]] = attended.nan_to_num(0.0)
    return out


def settings_of(arguments: dict[str, Any]) -> dict[str, Any]:
    left, right = arguments["window_size"]
    assert right == (0 if left >= 0 else -1)
    return {
        "softmax_scale": arguments["softmax_scale"],
        "window_left": left,
        "softcap": arguments["softcap"],
    }


def rows_of_slots(
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, lengths: Tensor
) -> list[tuple[Tensor, Tensor]]:
    assert slots.dtype == lengths.dtype == torch.int32
    assert slots.is_contiguous()
    assert lengths.is_contiguous()
    assert lengths.max() <= k_cache.shape[1]
    return [
        (k_cache[slot, :length], v_cache[slot, :length])
        for slot, length in zip(slots.tolist(), lengths.tolist(), strict=True)
    ]


class Fa2:
    """flash-attn 2.8's ``flash_attn_with_kvcache`` over slots."""

    def flash_attn_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        cache_batch_idx: Tensor,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
    ) -> Tensor:
        assert causal
        assert q.shape[:2] == (cache_seqlens.shape[0], 1)
        rows = rows_of_slots(k_cache, v_cache, cache_batch_idx, cache_seqlens)
        settings = settings_of(locals())
        return attend_rows(q[:, 0], list(range(len(rows) + 1)), rows, **settings).unsqueeze(1)


class Fa3:
    """FlashAttention-3's ``flash_attn_with_kvcache``: slots or pages, batched or packed rows."""

    def flash_attn_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        cache_batch_idx: Tensor,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
        page_table: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
        max_seqlen_q: int | None = None,
    ) -> Tensor:
        assert causal
        settings = settings_of(locals())
        if page_table is not None:
            assert page_table.dtype == torch.int32
            assert page_table.stride(-1) == 1
            assert page_table.shape[1] * k_cache.shape[1] >= cache_seqlens.max()
            k_cache, v_cache = (
                # As many pages as the longest needs, or the last slot's would be out of range.
                cache[
                    page_table[:, : -(-int(cache_seqlens.max()) // cache.shape[1])].clamp(
                        max=cache.shape[0] - 1
                    )
                ].flatten(1, 2)
                for cache in (k_cache, v_cache)
            )
        rows = rows_of_slots(k_cache, v_cache, cache_batch_idx, cache_seqlens)
        if cu_seqlens_q is None:
            assert q.shape[:2] == (len(rows), 1)
            bounds = list(range(len(rows) + 1))
            return attend_rows(q[:, 0], bounds, rows, **settings).unsqueeze(1)
        assert max_seqlen_q == cu_seqlens_q.diff().max()
        return attend_rows(q, cu_seqlens_q.tolist(), rows, **settings)


def torch_operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *others: Any,
    scale: float,
    window_size_left: int | None,
    window_size_right: int | None,
    seqused_k: Tensor,
) -> tuple[Tensor]:
    """``aten::_flash_attention_forward``; also asks the real one, on meta tensors."""
    assert others == (0.0, True, False)
    given = {
        "scale": scale,
        "window_size_left": window_size_left,
        "window_size_right": window_size_right,
        "seqused_k": seqused_k.to("meta"),
    }
    tensors = [tensor.to("meta") for tensor in (query, key, value, cum_seq_q, cum_seq_k)]
    real = torch.ops.aten._flash_attention_forward(*tensors, max_q, max_k, *others, **given)
    batch = seqused_k.shape[0]
    assert cum_seq_q.shape == cum_seq_k.shape == (batch + 1,)
    assert cum_seq_q.dtype == cum_seq_k.dtype == seqused_k.dtype == torch.int32
    assert all(tensor.is_contiguous() for tensor in (cum_seq_q, cum_seq_k, seqused_k))
    assert seqused_k.max() <= max_k
    if max_q == 1:  # queries of a group share a tile, for which the batch is reshaped
        assert query.shape[0] == batch
        assert torch.equal(cum_seq_q, torch.arange(batch + 1))
    rows = []
    for start, length in zip(cum_seq_k.tolist(), seqused_k.tolist(), strict=False):
        assert start + length <= key.shape[0]
        rows.append((key[start : start + length], value[start : start + length]))
    left = -1 if window_size_left is None else window_size_left
    assert window_size_right == (None if left < 0 else 0)
    out = attend_rows(query, cum_seq_q.tolist(), rows, softmax_scale=scale, window_left=left)
    assert out.shape == real[0].shape
    return (out,)


class FlashInferModule:
    """flashinfer's paged prefill wrapper."""

    num_plans = 0

    def BatchPrefillWithPagedKVCacheWrapper(
        self, workspace: Tensor, layout: str, *, backend: str
    ) -> Any:
        assert (workspace.dtype, layout, backend) == (torch.uint8, "NHD", "fa2")
        return SimpleNamespace(plan=self.plan, run=self.run)

    def plan(self, **plan: Any) -> None:
        assert plan["causal"]
        assert plan["q_data_type"] == plan["kv_data_type"]
        self.num_plans += 1
        self.planned = plan

    def run(self, q: Tensor, pages: tuple[Tensor, Tensor]) -> Tensor:
        plan = self.planned
        assert pages[0].shape[1] == plan["page_size"]
        assert pages[0].stride() == pages[1].stride()
        bounds = plan["qo_indptr"].tolist()
        assert q.shape[0] == bounds[-1]
        rows = []
        firsts = plan["paged_kv_indptr"].tolist()
        lasts = plan["paged_kv_last_page_len"].tolist()
        for first, stop, last in zip(firsts, firsts[1:], lasts, strict=False):
            indices = plan["paged_kv_indices"][first:stop].long()
            length = (stop - first - 1) * plan["page_size"] + last
            rows.append(tuple(cache[indices].flatten(0, 1)[:length] for cache in pages))
        return attend_rows(
            q,
            bounds,
            rows,  # type: ignore[arg-type]
            softmax_scale=plan["sm_scale"],
            window_left=plan["window_left"],
            softcap=plan["logits_soft_cap"],
        )


def call_of(batch: PagedBatch, num_heads: int = 4, **changes: Any) -> AttentionCall:
    rows = int(batch.view.cu_seqlens_q[-1]) + 3  # three of padding
    generator = torch.Generator().manual_seed(rows)
    query = torch.randn(rows, num_heads, batch.k_cache.shape[3], generator=generator)
    query = query.to(batch.k_cache.dtype)
    call = AttentionCall(query, batch.k_cache, batch.v_cache, batch.view, 0.2, -1, 0.0, None, None)
    return replace(call, **changes)


def batch_of(lengths: tuple[list[int], list[int]], **settings: Any) -> PagedBatch:
    """In slots of ``ROWS`` rows, on the CPU, whose rows lie one page of the cache apart."""
    shape = {"dtype": torch.bfloat16, "num_kv_heads": 2, "k_dim": 64, "num_rows": ROWS}
    return make_slot_batch(*lengths, device="cpu", **(shape | settings))


KERNELS: dict[str, SlotKernel] = {
    "fa2": FlashAttn2(Fa2()),
    "fa3": FlashAttn3(module=Fa3()),
    "fa3-tma": FlashAttn3(use_tma=True, module=Fa3()),
    "torch": TorchFlash(torch_operator),
    "flashinfer": FlashInfer(FlashInferModule()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lengths", [MIXED, DECODES], ids=["mixed", "decodes"])
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("window_left", [-1, 30])
def test_rows_are_found_and_padding_gives_zero(
    name: str, lengths: tuple[list[int], list[int]], layout: str, window_left: int
) -> None:
    if name == "fa2" and lengths is MIXED:
        assert "one new row" in str(FlashAttn2(Fa2()).refusal(case_of(call_of(batch_of(MIXED)))))
        return
    batch = batch_of(lengths, layout=layout)
    call = call_of(batch, window_left=window_left, softcap=0.0 if name == "torch" else 10.0)
    out = KERNELS[name].attend(call)
    expected = float64_reference(
        call.query, batch, softmax_scale=0.2, window_left=window_left, softcap=call.softcap
    )
    assert torch.equal(out, expected.to(out.dtype))


@pytest.mark.parametrize("lengths", [MIXED, DECODES], ids=["mixed", "decodes"])
def test_torch_finds_slots_with_gaps_between(lengths: tuple[list[int], list[int]]) -> None:
    batch = batch_of(lengths, num_rows=500)
    call = call_of(batch)
    assert case_of(call).slot_rows == 504
    out = KERNELS["torch"].attend(call)
    expected = float64_reference(call.query, batch, softmax_scale=0.2)
    assert torch.equal(out, expected.to(out.dtype))


def test_a_batch_is_planned_once_for_all_layers() -> None:
    module = FlashInferModule()
    kernel = FlashInfer(module)
    batch, other = batch_of(MIXED), batch_of(DECODES)
    for _ in range(3):
        kernel.attend(call_of(batch))
    assert module.num_plans == 1
    kernel.attend(call_of(batch, window_left=3))
    kernel.attend(call_of(other))
    assert module.num_plans == 3


def test_a_query_that_is_not_aligned_is_copied() -> None:
    batch = batch_of(DECODES)
    call = call_of(batch)
    padded = torch.zeros(call.query.shape[0], 4, 68, dtype=torch.bfloat16)
    padded[..., 2:66] = call.query
    crooked = replace(call, query=padded[..., 2:66])
    for kernel in KERNELS.values():
        assert torch.equal(kernel.attend(crooked), kernel.attend(call))


def test_lookahead_is_none_but_for_whole_tiles() -> None:
    assert {name: kernel.lookahead_rows for name, kernel in KERNELS.items()} == {
        "fa2": 0,
        "fa3": 0,
        "fa3-tma": 255,
        "torch": 0,
        "flashinfer": 0,
    }
    assert [name for name, kernel in KERNELS.items() if not kernel.is_graph_safe] == ["flashinfer"]


# ---- what they cannot take


@pytest.mark.parametrize(
    ("settings", "changes", "reason"),
    [
        ({}, {}, None),
        ({"dtype": torch.float16}, {}, None),
        ({"dtype": torch.float32}, {}, "float16 and bfloat16"),
        ({}, {"sinks": torch.zeros(4)}, "sinks"),
        ({"v_dim": 32}, {}, "head dims of K and V differ, 64 and 32"),
        ({"k_dim": 36}, {}, "head_dim is 36"),
        ({"k_dim": 264}, {}, "head_dim is 264"),
    ],
)
def test_flash_attention_refuses_what_it_cannot_take(
    settings: dict[str, Any], changes: dict[str, Any], reason: str | None
) -> None:
    refusal = shape_refusal(case_of(call_of(batch_of(DECODES, **settings), **changes)))
    assert (refusal is None) if reason is None else (reason in str(refusal))


def test_rows_that_do_not_begin_at_16_bytes_are_refused() -> None:
    batch = batch_of(DECODES)
    crooked = replace(batch, k_cache=batch.k_cache[..., 4:60], v_cache=batch.v_cache[..., 4:60])
    assert "16 bytes" in str(shape_refusal(case_of(call_of(crooked))))


def test_limits_of_32_bits_are_kept() -> None:
    case = case_of(call_of(batch_of(DECODES)))
    row = case.k_strides[1]
    many = replace(
        case, num_slots=1 << 16, k_strides=(row << 16, row, 64), v_strides=(row << 16, row, 64)
    )
    assert "must be less than 2147483648" in str(packing_refusal(many))
    wide = replace(case, k_strides=(1 << 30, 1 << 23, 64), v_strides=(1 << 30, 1 << 23, 64))
    assert "must be less than 8388608" in str(shape_refusal(wide))
    wider = replace(case, k_strides=(1 << 35, 1 << 28, 64), v_strides=(1 << 35, 1 << 28, 64))
    assert "must be below 4294967296" in str(paging_refusal(wider))


def test_softcap_and_broken_slots_are_not_for_torch() -> None:
    case = case_of(call_of(batch_of(DECODES)))
    assert packing_refusal(case) is None
    assert "soft-cap" in str(packing_refusal(replace(case, has_softcap=True)))
    apart = replace(case, v_strides=(2 * case.v_strides[0], *case.v_strides[1:]))
    assert "no whole number of rows" in str(packing_refusal(apart))


def test_pages_need_slots_of_whole_pages() -> None:
    assert page_refusal(case_of(call_of(batch_of(DECODES)))) is None
    assert "whole pages of 16" in str(
        page_refusal(case_of(call_of(batch_of(DECODES, num_rows=300))))
    )


@pytest.mark.parametrize(
    ("max_seqlen_k", "num_rows", "bucket"),
    [(1, 4096, 256), (256, 4096, 256), (257, 4096, 512), (4095, 4096, 4096), (3000, 3001, 3001)],
)
def test_buckets_are_powers_of_two_within_the_slot(
    max_seqlen_k: int, num_rows: int, bucket: int
) -> None:
    assert bucket_rows(max_seqlen_k, num_rows) == bucket
