"""Tensors over the slots of an arena, one pair per layer.

Owns: the views made so far.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from torch import Tensor
from torch.utils.dlpack import from_dlpack

from . import _core
from .config import DTYPE_BYTES, KVCacheConfig
from .errors import ConfigError
from .layout import KVLayout


class SlotViews:
    """K and V of every layer as strided tensors ``[num_slots, rows, num_kv_heads, head_dim]``."""

    def __init__(self, arena: _core.KVArena, config: KVCacheConfig, layout: KVLayout) -> None:
        self._arena = arena
        self._config = config
        self._layout = layout
        self._views: dict[int, tuple[Tensor, Tensor]] = {}

    def of_layer(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer; made on first use.

        Raises:
            ConfigError: there is no such layer.
        """
        views = self._views.get(layer_idx)
        if views is None:
            views = self._views[layer_idx] = self._make(layer_idx)
        return views

    def clear(self) -> None:
        """Forget them all. After closing, who still has one keeps the addresses only."""
        self._views.clear()

    def _make(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        num_layers = len(self._config.layers)
        if not 0 <= layer_idx < num_layers:
            raise ConfigError(f"layer_idx is {layer_idx}; it must be below {num_layers}")
        spec = self._config.layers[layer_idx]
        place = self._layout.placements[layer_idx]
        return (
            self._make_one(layer_idx, place.k_region, place.k_offset, spec.k_head_dim),
            self._make_one(layer_idx, place.v_region, place.v_offset, spec.v_head_dim),
        )

    def _make_one(self, layer_idx: int, region: int, offset: int, head_dim: int) -> Tensor:
        spec = self._config.layers[layer_idx]
        layout = self._layout
        itemsize = DTYPE_BYTES[spec.dtype]
        capsule = self._arena.tensor_capsule(
            region,
            offset,
            spec.dtype,
            [layout.num_slots, layout.max_seq_len, spec.num_kv_heads, head_dim],
            [
                layout.slot_bytes[region] // itemsize,
                layout.row_bytes[region] // itemsize,
                head_dim,
                1,
            ],
        )
        tensor: Tensor = from_dlpack(capsule)
        # The pages too live as long as somebody can read them, unless the cache is closed before.
        tensor.untyped_storage().arena = self._arena  # type: ignore[attr-defined]
        return tensor
