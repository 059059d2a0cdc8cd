"""Caches, batches and a float64 reference for the attention tests.

Owns: nothing.  Thread-safety: plain functions; they draw from torch's global generator.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vmalloc.backend import KVBatchView

DTYPES = [torch.float32, torch.bfloat16]
FP32_TOLERANCE = 3e-6  # absolute, for values of unit size
NAN = float("nan")

# A prefill chunk of a new sequence, decodes, a later chunk, an empty entry, tile edges.
RAGGED_Q = [70, 1, 1, 33, 0, 7, 1, 64, 1]
RAGGED_USED = [70, 1, 200, 150, 0, 64, 64, 128, 65]
RAGGED_SLOTS = [5, 0, 9, 2, 7, 1, 8, 3, 6]


def make_view(q_lens: Sequence[int], used: Sequence[int], slots: Sequence[int]) -> KVBatchView:
    bounds = [0]
    for q_len in q_lens:
        bounds.append(bounds[-1] + q_len)

    def int32(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return KVBatchView(
        int32(slots), int32(bounds), int32(used), max(q_lens, default=0), max(used, default=0)
    )


def make_caches(
    num_slots: int,
    rows: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    v_head_dim: int | None = None,
    num_layers: int = 2,
    layer: int = 1,
) -> tuple[Tensor, Tensor]:
    """One layer's strided views of a cache that interleaves the layers' K and V per row."""
    v_head_dim = v_head_dim or head_dim
    row = num_kv_heads * (head_dim + v_head_dim)
    storage = torch.randn(num_slots, rows, num_layers * row).to(dtype)
    k_part, v_part = storage[:, :, layer * row : (layer + 1) * row].split(
        [num_kv_heads * head_dim, num_kv_heads * v_head_dim], dim=2
    )
    return k_part.unflatten(2, (num_kv_heads, head_dim)), v_part.unflatten(
        2, (num_kv_heads, v_head_dim)
    )


def reference(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    view: KVBatchView,
    *,
    softmax_scale: float,
    window_left: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """The same in float64, one sequence at a time, as the formula says it."""
    bounds = view.cu_seqlens_q.tolist()
    group = query.shape[1] // k_cache.shape[2]
    out = torch.zeros(query.shape[0], query.shape[1], v_cache.shape[3], dtype=torch.float64)
    for i, slot in enumerate(view.cache_batch_idx.tolist()):
        used = int(view.seqused_k[i])
        q = query[bounds[i] : bounds[i + 1]].double()
        k = k_cache[slot, :used].double().repeat_interleave(group, 1)
        v = v_cache[slot, :used].double().repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * softmax_scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        position = torch.arange(used - q.shape[0], used)[:, None]
        key = torch.arange(used)[None]
        hidden = key > position
        if window_left >= 0:
            hidden |= key < position - window_left
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            extra = sinks.double()[:, None, None].expand(-1, q.shape[0], 1)
            scores = torch.cat([scores, extra], dim=2)
        weights = scores.softmax(-1)[:, :, :used]
        out[bounds[i] : bounds[i + 1]] = torch.einsum("hqk,khd->qhd", weights, v)
    return out


def assert_close(out: Tensor, expected: Tensor) -> None:
    error = (out.double() - expected).abs().max().item() if out.numel() else 0.0
    if out.dtype == torch.float32:
        assert error < FP32_TOLERANCE
    else:
        # Rounding the exact result is the least that any bf16 output costs.
        rounding = (expected.bfloat16().double() - expected).abs().max().item()
        assert error <= 2 * rounding


def run_on_isa(script: str, isa: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process whose attention uses ``isa``, or the next lower one."""
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "VMALLOC_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
