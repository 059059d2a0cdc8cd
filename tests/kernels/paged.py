"""Batches over block tables, poisoned wherever no kernel may look, and what attention should give.

Owns: nothing.  Thread-safety: functions without shared state.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vmalloc.backend import KVBatchView

DEVICE = (
    "cpu"
    if os.environ.get("TRITON_INTERPRET") == "1"
    else "cuda"
    if torch.cuda.is_available()
    else None
)
"""Where kernels can run in this process, if anywhere."""

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")
UNUSED_ENTRY = 10**9  # a block number that ends the process if anyone follows it


@dataclass(frozen=True)
class PagedBatch:
    """``keys[i]`` and ``values[i]`` are what the caches hold of sequence ``i``, in order."""

    k_cache: Tensor
    v_cache: Tensor
    view: KVBatchView
    keys: list[Tensor]
    values: list[Tensor]


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def make_batch(
    q_lens: Sequence[int],
    used: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    num_kv_heads: int = 2,
    k_dim: int = 64,
    v_dim: int | None = None,
    block_size: int = 16,
    poison: float = NAN,
    seed: int = 0,
) -> PagedBatch:
    """Sequences of random length-``used`` K and V in shuffled blocks of the second of two layers.

    Spare blocks, tails of blocks and the other layer hold ``poison``.
    """
    generator = torch.Generator().manual_seed(seed)
    v_dim = v_dim or k_dim
    num_blocks = [-(-length // block_size) for length in used]
    order = torch.randperm(sum(num_blocks) + 3, generator=generator).tolist()
    table = torch.full((len(used), max(num_blocks, default=0) + 2), UNUSED_ENTRY, dtype=torch.int32)
    row = num_kv_heads * (k_dim + v_dim)
    storage = torch.full((len(order), block_size, 2 * row), poison).to(dtype)
    k_cache, v_cache = (
        part.unflatten(2, (num_kv_heads, -1))
        for part in storage[:, :, row:].split([num_kv_heads * k_dim, num_kv_heads * v_dim], dim=2)
    )
    keys, values = [], []
    for i, length in enumerate(used):
        blocks = torch.tensor([order.pop() for _ in range(num_blocks[i])], dtype=torch.int64)
        table[i, : num_blocks[i]] = blocks.int()
        keys.append(torch.randn(length, num_kv_heads, k_dim, generator=generator).to(dtype))
        values.append(torch.randn(length, num_kv_heads, v_dim, generator=generator).to(dtype))
        rows = torch.arange(length)
        k_cache[blocks[rows // block_size], rows % block_size] = keys[i]
        v_cache[blocks[rows // block_size], rows % block_size] = values[i]
    storage = storage.to(DEVICE)
    k_cache, v_cache = (
        part.unflatten(2, (num_kv_heads, -1))
        for part in storage[:, :, row:].split([num_kv_heads * k_dim, num_kv_heads * v_dim], dim=2)
    )
    bounds = torch.tensor([0, *q_lens]).cumsum(0).tolist()
    view = KVBatchView(
        int32([0] * len(used)),
        int32(bounds),
        int32(used),
        max(q_lens, default=0),
        max(used, default=0),
        table.to(DEVICE),
    )
    return PagedBatch(k_cache, v_cache, view, keys, values)


def random_query(batch: PagedBatch, num_heads: int, padding_rows: int = 0) -> Tensor:
    num_rows = int(batch.view.cu_seqlens_q[-1]) + padding_rows
    generator = torch.Generator().manual_seed(num_rows)
    shape = (num_rows, num_heads, batch.k_cache.shape[3])
    return torch.randn(shape, generator=generator).to(batch.k_cache.dtype).to(DEVICE)


def reference(
    query: Tensor,
    batch: PagedBatch,
    *,
    softmax_scale: float,
    window_left: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention in float64, one sequence at a time, as the formula says it; 0 in padding rows."""
    bounds = batch.view.cu_seqlens_q.tolist()
    group = query.shape[1] // batch.k_cache.shape[2]
    out = torch.zeros(*query.shape[:2], batch.v_cache.shape[3], dtype=torch.float64)
    for i, (keys, values) in enumerate(zip(batch.keys, batch.values, strict=True)):
        q = query[bounds[i] : bounds[i + 1]].cpu().double()
        k = keys.double().repeat_interleave(group, 1)
        v = values.double().repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(len(k) - len(q), len(k))[:, None]
        key = torch.arange(len(k))[None]
        hidden = key > position
        if window_left >= 0:
            hidden |= key < position - window_left
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            extra = sinks.cpu().double()[:, None, None].expand(-1, len(q), 1)
            scores = torch.cat([scores, extra], dim=2)
        weights = scores.softmax(-1)[:, :, : len(k)]
        out[bounds[i] : bounds[i + 1]] = torch.einsum("hqk,khd->qhd", weights, v)
    return out


def assert_close(out: Tensor, expected: Tensor) -> None:
    """Within float32 noise; in 16 bits, within the spacing of the numbers around each element."""
    if out.dtype == torch.float32:
        torch.testing.assert_close(out.cpu().double(), expected, atol=3e-6, rtol=0)
        return
    # Half a step for the result, half for the weights, which are 16 bits wide when they meet the
    # values. The interpreter cuts bfloat16 off where a GPU rounds to nearest: whole steps.
    step = torch.finfo(out.dtype).eps * (1.0 if out.dtype == torch.bfloat16 else 0.5)
    torch.testing.assert_close(out.cpu().double(), expected, atol=step, rtol=step)
