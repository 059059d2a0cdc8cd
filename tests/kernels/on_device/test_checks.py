"""Bad arguments are refused by name before anything is launched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.paged import DEVICE, NAN, int32, make_batch, random_query
from vmalloc.errors import ConfigError
from vmalloc.kernels.paged_gpu import append_kv, copy_blocks, kernel_name, varlen_attention

BATCH = make_batch([2, 1], [5, 8], k_dim=8)
QUERY = random_query(BATCH, 4)
BLOCKS = torch.zeros(4, 1, 8, 6, device=DEVICE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": QUERY[:, :3]}, "num_heads is 3, must be a multiple of num_kv_heads, 2"),
        ({"query": QUERY[..., :4]}, "query has head_dim 4, must be 8"),
        ({"query": QUERY[0]}, "query has shape .* 3 dimensions"),
        ({"query": QUERY.half()}, "query is torch.float16, must be torch.float32"),
        ({"query": QUERY.transpose(1, 2)}, "query has stride 8 in head_dim"),
        ({"query": QUERY.to("meta")}, "query is on meta"),
        ({"k_cache": BATCH.k_cache.to("meta")}, "k_cache is on meta"),
        ({"k_cache": BATCH.k_cache.double()}, "k_cache is torch.float64"),
        ({"v_cache": BATCH.v_cache[:, :, :1]}, "v_cache has shape"),
        ({"window_left": -2}, "window_left is -2"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"sinks": torch.zeros(3, device=DEVICE)}, r"sinks is torch.float32 \(3,\)"),
        ({"out": torch.empty(3, 4, 16, device=DEVICE)}, r"out has shape \(3, 4, 16\)"),
        ({"view": replace(BATCH.view, block_table=None)}, "block_table is None"),
        (
            {"view": replace(BATCH.view, seqused_k=BATCH.view.seqused_k.long())},
            "seqused_k is torch.int64",
        ),
        ({"view": replace(BATCH.view, cu_seqlens_q=int32([0, 2]))}, r"cu_seqlens_q .* \(3,\)"),
        ({"view": replace(BATCH.view, max_seqlen_k=99)}, "max_seqlen_k is 99, must be at most 48"),
    ],
)
def test_bad_attention_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    out = torch.full((3, 4, 8), NAN, device=DEVICE)
    arguments: dict[str, Any] = {
        "query": QUERY,
        "k_cache": BATCH.k_cache,
        "v_cache": BATCH.v_cache,
        "view": BATCH.view,
        "softmax_scale": 1.0,
        "out": out,
    }
    with pytest.raises(ConfigError, match=message):
        varlen_attention(**(arguments | changes))
    assert out.isnan().all()


def test_heads_larger_than_the_kernels_take_are_refused() -> None:
    batch = make_batch([1], [1], k_dim=264)
    with pytest.raises(ConfigError, match=r"head_dim 264, must be in \[1, 256\]"):
        varlen_attention(
            random_query(batch, 2), batch.k_cache, batch.v_cache, batch.view, softmax_scale=1.0
        )


def test_mismatched_key_and_value_are_refused() -> None:
    rows = torch.randn(3, 2, 8, device=DEVICE)
    caches = BATCH.k_cache, BATCH.v_cache
    with pytest.raises(ConfigError, match=r"key has shape \(3, 1, 8\), must be \(3, 2, 8\)"):
        append_kv(rows[:, :1], rows, *caches, BATCH.view)
    with pytest.raises(ConfigError, match=r"value has shape \(2, 2, 8\), must be \(3, 2, 8\)"):
        append_kv(rows, rows[:2], *caches, BATCH.view)


@pytest.mark.parametrize(
    ("blocks", "pairs", "num_rows", "message"),
    [
        (BLOCKS[:, 0, 0], int32([0, 1]), None, "4 dimensions"),
        (BLOCKS[..., :3], int32([0, 1]), None, r"strides .* \(3, 1\)"),
        (BLOCKS, int32([0, 1]).long(), None, "pairs is torch.int64"),
        (BLOCKS, int32([0, 1]), int32([1, 2]), r"num_rows .* \(1,\)"),
    ],
)
def test_bad_copies_are_named(
    blocks: torch.Tensor, pairs: torch.Tensor, num_rows: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        copy_blocks(blocks, pairs.unflatten(0, (1, 2)), num_rows)


def test_kernel_name_tells_decode_from_prefill() -> None:
    decode = make_batch([1, 0], [5, 8], k_dim=8)
    assert kernel_name(BATCH.view, BATCH.k_cache, BATCH.v_cache) == "triton-prefill"
    assert kernel_name(decode.view, decode.k_cache, decode.v_cache) == "triton-decode"
