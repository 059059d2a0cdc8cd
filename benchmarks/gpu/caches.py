"""KV caches in the shape of an 8B model, filled with random rows, for the sections that attend.

A dry run makes the same caches small, on CPU tensors over the stand-in driver.

Owns: nothing; callers close what they make.  Thread-safety: none; one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vmalloc import KVCacheConfig, LayerKVSpec, SequenceGroupSpec, VirtualKVCache

from .devices import make_driver
from .section import Section


@dataclass(frozen=True)
class ModelShape:
    """What of a model the KV cache sees."""

    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"

    @property
    def layers(self) -> tuple[LayerKVSpec, ...]:
        """One spec a layer."""
        spec = LayerKVSpec(
            num_kv_heads=self.num_kv_heads,
            k_head_dim=self.head_dim,
            v_head_dim=self.head_dim,
            dtype=self.dtype,
        )
        return (spec,) * self.num_layers

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch has it."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def layer_token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return self.layers[0].token_bytes

    @property
    def token_bytes(self) -> int:
        """K and V of one token in all layers: 128 KiB for the 8B shape."""
        return self.num_layers * self.layer_token_bytes


LLAMA_8B = ModelShape()
TINY = ModelShape(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64)


def model_shape(section: Section) -> ModelShape:
    """The 8B shape; in a dry run a tiny one."""
    return TINY if section.dry_run else LLAMA_8B


def make_cache(
    section: Section, shape: ModelShape, *, max_num_seqs: int, max_seq_len: int,
    num_tokens: int, driver: Any = None, **settings: Any,
) -> VirtualKVCache:  # fmt: skip
    """A virtual cache with room for ``num_tokens`` and a partly filled page for every sequence.

    ``driver``: one that was made already, to read its counters. ``settings`` go to
    ``KVCacheConfig``; commit-ahead and prefix caching are off unless they say so.
    """
    page_bytes = settings.get("page_bytes") or (2 << 20)
    group = settings.get("layers_per_group") or shape.num_layers
    partial_pages = 2 * max_num_seqs * -(-shape.num_layers // group)
    defaults: dict[str, Any] = {
        "commit_ahead_tokens": 0,
        "prefix_caching": False,
        "low_watermark": 0.0,
    }
    config = KVCacheConfig(
        layers=shape.layers,
        max_num_seqs=max_num_seqs,
        num_slots=max_num_seqs,
        max_seq_len=max_seq_len,
        capacity_bytes=num_tokens * shape.token_bytes + (partial_pages + 8) * page_bytes,
        device=section.device,
        driver="cuda",
        **(defaults | settings),
    )
    return VirtualKVCache(config, driver=driver or make_driver(section, config.page_bytes or 0))


def admit(cache: VirtualKVCache, lengths: Sequence[int]) -> list[int]:
    """Admit sequences ``0..`` of these lengths; their slots."""
    for seq_id, length in enumerate(lengths):
        if cache.try_admit(SequenceGroupSpec((seq_id,), length)) is None:
            raise RuntimeError(f"no memory for sequence {seq_id} of {length} tokens")
    return [cache.slot_of(seq_id) for seq_id in range(len(lengths))]


def fill(cache: VirtualKVCache, seq_ids: Sequence[int], num_layers: int | None = None) -> None:
    """Random K and V in every row of these sequences, in the first ``num_layers`` layers."""
    for layer_idx in range(num_layers or len(cache.config.layers)):
        for tensor in cache.layer_views(layer_idx):
            for seq_id in seq_ids:
                tensor[cache.slot_of(seq_id), : cache.seq_len(seq_id)].normal_()


def attend_exactly(query: Tensor, k_rows: Tensor, v_rows: Tensor) -> Tensor:
    """Attention of the last rows of one sequence in float32, as the formula says it.

    Args:
        query: ``[num_new, num_heads, head_dim]``; ``k_rows``, ``v_rows``:
            ``[length, num_kv_heads, head_dim]``.

    Returns ``[num_new, num_heads, head_dim]`` in float32.
    """
    num_new, num_heads, head_dim = query.shape
    length, num_kv_heads, _ = k_rows.shape
    keys = k_rows.float().repeat_interleave(num_heads // num_kv_heads, 1)
    values = v_rows.float().repeat_interleave(num_heads // num_kv_heads, 1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), keys) * head_dim**-0.5
    position = torch.arange(length - num_new, length, device=query.device)[:, None]
    hidden = torch.arange(length, device=query.device)[None] > position
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)


def relative_error(out: Tensor, expected: Tensor) -> float:
    """``|out - expected| / |expected|``; NaN where ``out`` has one."""
    return float((out.float() - expected.float()).norm() / expected.float().norm())
