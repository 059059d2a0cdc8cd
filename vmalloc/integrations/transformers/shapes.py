"""What one layer brings to a cache, and how much a model may ever bring.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...config import DTYPE_BYTES, LayerKVSpec
from ...errors import ConfigError

DEFAULT_MAX_TOKENS = 128 * 1024
"""Longest sequence where the model's config does not say: relative positions have no end."""

MAX_RESERVED_BYTES = 256 << 30
"""Address space that is taken when nobody said for how large a batch: so little of the 128 TiB of
a process that hundreds of caches, of prompts to go on from, live side by side."""

_DTYPE_NAMES = {getattr(torch, name): name for name in DTYPE_BYTES}
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Heads, head sizes, element type and device of one layer's keys and values."""

    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> LayerShape:
        """Of new states ``[batch, num_kv_heads, num_tokens, head_dim]``.

        Raises:
            ConfigError: they do not belong together, or vmalloc has no such element type.
        """
        if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3]:
            raise ConfigError(
                f"keys have shape {tuple(keys.shape)} and values {tuple(values.shape)}; both must "
                "be [batch, num_kv_heads, num_tokens, head_dim], equal but for head_dim"
            )
        if keys.dtype not in _DTYPE_NAMES or values.dtype != keys.dtype:
            raise ConfigError(
                f"keys are {keys.dtype} and values {values.dtype}; a VirtualCache holds one of "
                f"{', '.join(DTYPE_BYTES)}"
            )
        if keys.device.type not in ("cpu", "cuda"):
            raise ConfigError(
                f"keys are on {keys.device}; a VirtualCache lives on cpu or cuda devices"
            )
        return cls(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device)

    @property
    def spec(self) -> LayerKVSpec:
        return LayerKVSpec(
            num_kv_heads=self.num_kv_heads,
            k_head_dim=self.k_head_dim,
            v_head_dim=self.v_head_dim,
            dtype=_DTYPE_NAMES[self.dtype],
        )


def decoder_config(config: Any) -> Any:
    """The decoder's part of a model's config, or of a model."""
    config = getattr(config, "config", config)
    if not hasattr(config, "get_text_config"):
        raise ConfigError(
            f"config is {type(config).__name__}; a VirtualCache is made for a model: give it "
            "model.config"
        )
    return config.get_text_config(decoder=True)


def context_tokens(config: Any) -> int:
    """Longest sequence that a decoder's config declares, else ``DEFAULT_MAX_TOKENS``."""
    for name in _CONTEXT_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return DEFAULT_MAX_TOKENS


def memory_bytes(device: torch.device) -> int:
    """All the memory that a device has: the cap of who wants none."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
