"""What paged GPU kernels ask of their arguments; every breach is a ``ConfigError`` by name.

Owns: nothing.  Thread-safety: functions without state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from ..errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ..backend import KVBatchView

SUPPORTED_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM: Final = 256
MAX_GRID: Final = 65535
"""CUDA's limit of the second and third launch dimension."""


def check_device(name: str, tensor: Tensor) -> None:
    """Raise unless kernels can run where ``tensor`` is, and triton is there to run them."""
    try:
        from .triton_tiles import INTERPRETED
    except ImportError as error:
        raise ConfigError(
            f"GPU kernels over block tables need triton, which does not load ({error});"
            " pip install 'vmalloc[gpu]'"
        ) from error
    if not (tensor.is_cuda or (tensor.is_cpu and INTERPRETED)):
        raise ConfigError(
            f"{name} is on {tensor.device}, must be on cuda (or on cpu under TRITON_INTERPRET=1)"
        )


def check_caches(k_cache: Tensor, v_cache: Tensor) -> None:
    check_device("k_cache", k_cache)
    if k_cache.dtype not in SUPPORTED_DTYPES:
        supported = " or ".join(str(dtype) for dtype in SUPPORTED_DTYPES)
        raise ConfigError(f"k_cache is {k_cache.dtype}, must be {supported}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, cache, 4, k_cache)
        if not 1 <= cache.shape[3] <= MAX_HEAD_DIM:
            raise ConfigError(
                f"{name} has head_dim {cache.shape[3]}, must be in [1, {MAX_HEAD_DIM}]"
            )
    if v_cache.shape[:3] != k_cache.shape[:3]:
        raise ConfigError(
            f"v_cache has shape {tuple(v_cache.shape)}, must be {tuple(k_cache.shape[:3])} like"
            " k_cache in all but head_dim"
        )


def check_tensor(name: str, tensor: Tensor, num_dims: int, k_cache: Tensor) -> None:
    """Raise unless ``tensor`` has these dimensions, the last one dense, and suits the cache."""
    if tensor.dim() != num_dims:
        raise ConfigError(
            f"{name} has shape {tuple(tensor.shape)}, must have {num_dims} dimensions"
        )
    if tensor.device != k_cache.device:
        raise ConfigError(f"{name} is on {tensor.device}, must be on {k_cache.device} like k_cache")
    if tensor.dtype != k_cache.dtype:
        raise ConfigError(f"{name} is {tensor.dtype}, must be {k_cache.dtype} like k_cache")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ConfigError(f"{name} has stride {tensor.stride(-1)} in head_dim, must be 1")


def check_view(view: KVBatchView, k_cache: Tensor) -> int:
    """The batch size, once the view's tensors fit each other and the cache."""
    batch = view.seqused_k.numel()
    if view.block_table is None:
        raise ConfigError("block_table is None, must be [batch, max_blocks] for paged kernels")
    if batch > MAX_GRID:
        raise ConfigError(f"batch is {batch}, must be at most {MAX_GRID}")
    device = k_cache.device
    check_indices("seqused_k", view.seqused_k, (batch,), device)
    check_indices("cu_seqlens_q", view.cu_seqlens_q, (batch + 1,), device)
    max_blocks = view.block_table.shape[-1]
    check_indices("block_table", view.block_table, (batch, max_blocks), device)
    capacity = max_blocks * k_cache.shape[1]
    if view.max_seqlen_k > capacity:
        raise ConfigError(
            f"max_seqlen_k is {view.max_seqlen_k}, must be at most {capacity}, the"
            f" {max_blocks} blocks of {k_cache.shape[1]} rows that block_table holds"
        )
    return batch


def check_indices(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    is_dense = tensor.numel() == 0 or tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    if (
        tensor.dtype != torch.int32
        or tuple(tensor.shape) != shape
        or tensor.device != device
        or not is_dense
        or (name != "block_table" and not tensor.is_contiguous())
    ):
        raise ConfigError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on"
            f" {tensor.device}, must be dense torch.int32 {shape} on {device}"
        )


def check_sinks(sinks: Tensor, query: Tensor) -> None:
    if (
        sinks.dtype != torch.float32
        or sinks.shape != (query.shape[1],)
        or not sinks.is_contiguous()
        or sinks.device != query.device
    ):
        raise ConfigError(
            f"sinks is {sinks.dtype} {tuple(sinks.shape)} on {sinks.device}, must be contiguous"
            f" torch.float32 ({query.shape[1]},) on {query.device}"
        )
