"""From an engine's settings to its KV cache: defaults that depend on the model and the host.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..backend import KVBackend
from ..config import DEFAULT_PAGE_BYTES, KVCacheConfig, LayerKVSpec
from ..errors import ConfigError
from ..host_memory import available_bytes
from ..kernels.select import AttentionKernels
from .cache_factory import CacheFactory
from .config import EngineConfig
from .cpu_layout import choose_layout
from .model_loader import context_tokens
from .probe import ProbedModel

logger = logging.getLogger(__name__)

DEFAULT_MEMORY_SHARE = 0.25
"""Share of the available memory that the KV cache may take when no cap is given."""

DEFAULT_SWAP_SHARE = 0.1
"""Share of the host's available memory that swapped-out KV may take when no limit is given."""

_DEFAULT_PAGE_BYTES = {"cpu": DEFAULT_PAGE_BYTES, "cuda": 2 << 20}
"""For an estimate: the driver says what it really is."""


def resolve_max_model_len(model: torch.nn.Module, config: EngineConfig) -> int:
    """``max_model_len``, or the model's context. Raises ``ConfigError`` beyond that."""
    limit = context_tokens(model)
    if config.max_model_len is None:
        return limit
    if config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len is {config.max_model_len}; the model's context is {limit} tokens"
        )
    return config.max_model_len


def resolve_config(
    config: EngineConfig,
    layers: tuple[LayerKVSpec, ...],
    max_model_len: int,
    device: torch.device,
    device_limit: int | None = None,
    least: Callable[[Sequence[int]], list[int]] = list,
) -> EngineConfig:
    """``config`` with every None, and every "auto" of the device, filled in.

    ``device_limit``: bytes of KV that the device has room for; None: what the host has is shared.
    ``least``: the smallest of what each rank has, so that all resolve to the same.
    """
    ranks = config.tensor_parallel_size
    if device_limit is None:
        device_limit = int(available_bytes() * DEFAULT_MEMORY_SHARE) // ranks
    swap_limit = int(available_bytes() * DEFAULT_SWAP_SHARE) // ranks
    device_limit, swap_limit = least([device_limit, swap_limit])
    token_bytes = sum(layer.token_bytes for layer in layers)
    page_bytes = config.page_size or _DEFAULT_PAGE_BYTES[device.type]
    cuts_itself = device.type == "cpu" and config.kv_driver != "cuda"
    num_groups = -(-len(layers) // (config.layers_per_group or (1 if cuts_itself else len(layers))))
    # Full length for everyone, each with a partly used page in every group.
    most = config.max_num_seqs * (max_model_len * token_bytes + 2 * num_groups * page_bytes)
    cap = config.kv_cache_memory_bytes
    if cap is None:
        cap = min(device_limit, most)
    if cuts_itself:
        layout = choose_layout(layers, min(cap, most), config.page_size, config.layers_per_group)
        config = replace(
            config, page_size=layout.page_bytes, layers_per_group=layout.layers_per_group
        )
    swap = config.swap_space_bytes
    if swap is None:
        swap = min(swap_limit, cap)
    return replace(
        config,
        device=str(device),
        kv_cache_memory_bytes=cap,
        swap_space_bytes=swap,
        max_model_len=max_model_len,
        max_num_batched_tokens=config.step_tokens,
    )


def cache_config(config: EngineConfig, layers: tuple[LayerKVSpec, ...]) -> KVCacheConfig:
    """What a resolved config says of the KV cache; device and driver are left to the factory."""
    assert config.max_model_len is not None
    assert config.kv_cache_memory_bytes is not None
    assert config.swap_space_bytes is not None
    return KVCacheConfig(
        layers=layers,
        max_num_seqs=config.max_num_seqs,
        max_seq_len=config.max_model_len,
        capacity_bytes=config.kv_cache_memory_bytes,
        page_bytes=config.page_size,
        layers_per_group=config.layers_per_group,
        commit_ahead_tokens=config.commit_ahead_tokens,
        block_size=config.block_size,
        prefix_caching=config.enable_prefix_caching,
        swap_bytes=config.swap_space_bytes,
        commit_policy=config.commit_policy,
    )


def create_cache(
    config: EngineConfig, probed: ProbedModel, caches: CacheFactory
) -> tuple[KVBackend, AttentionKernels]:
    """The KV cache of a resolved config, and kernels over it. A cap below one full-length sequence
    only warns."""
    backend, kernels = caches.make(cache_config(config, probed.layers), probed.num_heads)
    assert config.max_model_len is not None
    if backend.max_seq_tokens() < config.max_model_len:
        logger.warning(
            "the KV cap of %d bytes holds %d tokens of one sequence, less than max_model_len, %d; "
            "a request that grows beyond it ends with an error, alone",
            config.kv_cache_memory_bytes,
            backend.max_seq_tokens(),
            config.max_model_len,
        )
    return backend, kernels
