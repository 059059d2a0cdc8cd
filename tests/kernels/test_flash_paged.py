"""What is handed to flash-attn, and when: against a stand-in that follows its documentation.

flash-attn itself needs a GPU. Owns: nothing.  Thread-safety: single-threaded tests.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.paged import PagedBatch, make_batch, random_query, reference
from vmalloc.kernels import flash_paged
from vmalloc.kernels.attention_call import AttentionCall

CACHE = torch.zeros(2, 256, 1, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("cache", "fits"),
    [
        (CACHE, True),
        (CACHE.half(), True),
        (CACHE.float(), False),
        (CACHE[:, :128], False),
        (CACHE.expand(-1, -1, 3, -1), True),
        (CACHE[..., :60], False),
        (CACHE[..., 4:60], False),  # 56 is a multiple of 8, but begins at byte 8
        (torch.zeros(1, 256, 1, 264, dtype=torch.bfloat16), False),
    ],
)
def test_flash_attn_gets_only_caches_that_it_takes(cache: Tensor, fits: bool) -> None:
    assert flash_paged.can_attend(cache, cache, None) == fits
    assert not flash_paged.can_attend(cache, cache, torch.zeros(1))


def test_flash_attn_gets_no_caches_of_two_head_dims() -> None:
    assert not flash_paged.can_attend(CACHE, CACHE[..., :32], None)


def stand_in(batch: PagedBatch) -> Any:
    """flash-attn 2.8's two functions, as documented, over the sequences of ``batch``."""

    def attend(query: Tensor, bounds: Tensor, lengths: Tensor, settings: dict[str, Any]) -> Tensor:
        assert settings["causal"]
        assert settings["block_table"] is batch.view.block_table
        assert torch.equal(lengths, batch.view.seqused_k)
        left, right = settings["window_size"]
        assert right == (0 if left >= 0 else -1)
        view = SimpleNamespace(cu_seqlens_q=bounds)
        asked = SimpleNamespace(
            view=view,
            k_cache=batch.k_cache,
            v_cache=batch.v_cache,
            keys=batch.keys,
            values=batch.values,
        )
        return reference(
            query,
            asked,  # type: ignore[arg-type]
            softmax_scale=settings["softmax_scale"],
            window_left=left,
            softcap=settings["softcap"],
        ).to(query.dtype)

    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, **settings: Any
    ) -> Tensor:
        assert q.shape[:2] == (len(batch.keys), 1)
        # A row of an empty sequence attends to nothing; what it gives is not documented.
        new = (cache_seqlens > 0).int()
        out = torch.full((*q.shape[:3], v_cache.shape[3]), 7.0, dtype=q.dtype)
        bounds = torch.nn.functional.pad(new.cumsum(0), (1, 0))
        out[new.bool(), 0] = attend(q[new.bool(), 0], bounds, cache_seqlens, settings)
        return out

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        **settings: Any,
    ) -> Tensor:
        assert cu_seqlens_k.dtype == torch.int32
        assert (max_seqlen_q, max_seqlen_k) == (batch.view.max_seqlen_q, batch.view.max_seqlen_k)
        out = torch.full((*q.shape[:2], v.shape[3]), float("nan"), dtype=q.dtype)
        rows = int(cu_seqlens_q[-1])
        out[:rows] = attend(q[:rows], cu_seqlens_q, cu_seqlens_k.diff(), settings)
        return out

    return SimpleNamespace(
        flash_attn_with_kvcache=flash_attn_with_kvcache,
        flash_attn_varlen_func=flash_attn_varlen_func,
    )


@pytest.mark.parametrize(
    ("q_lens", "used"),
    [([1, 0, 1, 1, 0], [300, 0, 5, 256, 0]), ([1, 40, 0, 7], [300, 40, 0, 260])],
)
@pytest.mark.parametrize("window_left", [-1, 30])
def test_rows_return_to_their_places_and_padding_is_zero(
    q_lens: list[int], used: list[int], window_left: int
) -> None:
    batch = make_batch(q_lens, used, dtype=torch.bfloat16, block_size=256)
    query = random_query(batch, 4, padding_rows=3)
    out = torch.full_like(query, float("nan"))
    call = AttentionCall(
        query, batch.k_cache, batch.v_cache, batch.view, 0.2, window_left, 10.0, None, out
    )
    assert flash_paged.attend(stand_in(batch), call) is out
    expected = reference(query, batch, softmax_scale=0.2, window_left=window_left, softcap=10.0)
    assert torch.equal(out, expected.to(out.dtype))
    assert not out[sum(q_lens) :].any()
