"""Layers that a ``VirtualCache`` leaves to transformers: which they are, and how they start over.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)


def is_full_attention(layer: Any) -> bool:
    """Whether a layer that transformers made is one that a ``VirtualLayer`` replaces."""
    return type(layer) is DynamicLayer


def cross_attention_layers(config: Any) -> frozenset[int]:
    """Layers of a decoder that attend to an image: they hold its tokens, not those of the text."""
    return frozenset(getattr(config, "cross_attention_layers", None) or ())


def start_over(layer: Any) -> None:
    """After ``reset()``: let the next update bring another batch, shape or element type.

    transformers zeroes some states and keeps their shapes; up to 5.17 also the keys and values that
    the next ones are put behind.
    """
    if isinstance(layer, DynamicLayer):
        layer.keys = layer.values = None
        layer.is_initialized = False
    if isinstance(layer, DynamicIndexedLayer):
        layer.indexer_keys = None
        layer.is_indexer_initialized = False
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        for idx in range(layer.number_of_states):
            layer.is_conv_states_initialized[idx] = False
            layer.is_recurrent_states_initialized[idx] = False
        layer.device = layer.dtype = None
