"""Batches over slots laid out as the cache lays them out, poisoned wherever no kernel may look.

Owns: nothing.  Thread-safety: functions without shared state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.kernels.paged import DEVICE, NAN, PagedBatch
from vmalloc.backend import KVBatchView
from vmalloc.config import KVCacheConfig, LayerKVSpec
from vmalloc.layout import plan_layout

LAYOUTS: dict[str, dict[str, object]] = {
    "interleaved": {},
    "kv_split": {"kv_split": True},
    "per_layer": {"layers_per_group": 1},
    "pairs": {"layers_per_group": 2},
}
"""What ``KVCacheConfig`` is told, by name."""

NUM_LAYERS = 5


def make_slot_batch(
    q_lens: Sequence[int],
    used: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    num_kv_heads: int = 3,
    k_dim: int = 40,
    v_dim: int | None = None,
    num_rows: int = 0,
    layout: str = "interleaved",
    layer_idx: int = 3,
    poison: float = NAN,
    seed: int = 0,
    device: str | None = DEVICE,
) -> PagedBatch:
    """Sequences of random K and V in shuffled slots of one of five layers.

    Spare slots, rows past each length, gaps between slots and the other layers hold ``poison``.
    """
    generator = torch.Generator().manual_seed(seed)
    v_dim = v_dim or k_dim
    spec = LayerKVSpec(
        num_kv_heads=num_kv_heads,
        k_head_dim=k_dim,
        v_head_dim=v_dim,
        dtype=str(dtype).removeprefix("torch."),
    )
    config = KVCacheConfig(
        layers=(spec,) * NUM_LAYERS,
        max_num_seqs=len(used) + 2,
        max_seq_len=num_rows or max(used, default=0) + 7,
        capacity_bytes=1 << 40,
        num_slots=len(used) + 2,
        **LAYOUTS[layout],  # type: ignore[arg-type]
    )
    plan = plan_layout(config, page_bytes=4096)
    place = plan.placements[layer_idx]
    regions = {
        region: torch.full(
            (plan.num_slots * plan.slot_bytes[region] // dtype.itemsize,), poison
        ).to(dtype)
        for region in {place.k_region, place.v_region}
    }

    def view_of(storage: dict[int, Tensor], region: int, offset: int, head_dim: int) -> Tensor:
        return storage[region].as_strided(
            (plan.num_slots, plan.max_seq_len, num_kv_heads, head_dim),
            (
                plan.slot_bytes[region] // dtype.itemsize,
                plan.row_bytes[region] // dtype.itemsize,
                head_dim,
                1,
            ),
            offset // dtype.itemsize,
        )

    def views(storage: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        return (
            view_of(storage, place.k_region, place.k_offset, k_dim),
            view_of(storage, place.v_region, place.v_offset, v_dim),
        )

    slots = torch.randperm(plan.num_slots, generator=generator)[: len(used)]
    k_cache, v_cache = views(regions)
    keys, values = [], []
    for slot, length in zip(slots.tolist(), used, strict=True):
        keys.append(torch.randn(length, num_kv_heads, k_dim, generator=generator).to(dtype))
        values.append(torch.randn(length, num_kv_heads, v_dim, generator=generator).to(dtype))
        k_cache[slot, :length], v_cache[slot, :length] = keys[-1], values[-1]
    k_cache, v_cache = views({region: data.to(device) for region, data in regions.items()})

    def int32(numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    view = KVBatchView(
        slots.int().to(device),
        int32(torch.tensor([0, *q_lens]).cumsum(0).tolist()),
        int32(used),
        max(q_lens, default=0),
        max(used, default=0),
    )
    return PagedBatch(k_cache, v_cache, view, keys, values)
