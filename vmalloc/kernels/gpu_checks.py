"""What GPU kernels ask of their arguments; every breach is a ``ConfigError`` by name.

Owns: nothing.  Thread-safety: functions without state.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Final

import torch

from ..errors import ConfigError
from .attention_call import AttentionCall

if TYPE_CHECKING:
    from torch import Tensor

    from ..backend import KVBatchView

SUPPORTED_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM: Final = 256
MAX_GRID: Final = 65535
"""CUDA's limit of the second and third launch dimension."""


@functools.cache
def triton_absence() -> str | None:
    """Why Triton kernels cannot be used, None if they can."""
    try:
        importlib.import_module("vmalloc.kernels.triton_tiles")
    except ImportError as error:
        return f"triton does not load ({error}); pip install 'vmalloc[gpu]'"
    return None


def is_interpreted() -> bool:
    """Whether this process runs Triton kernels in the interpreter, on CPU tensors."""
    if triton_absence() is not None:
        return False
    from .triton_tiles import INTERPRETED

    return INTERPRETED


def check_device(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is where GPU kernels can run."""
    if not (tensor.is_cuda or (tensor.is_cpu and is_interpreted())):
        raise ConfigError(
            f"{name} is on {tensor.device}, must be on cuda (or on cpu under TRITON_INTERPRET=1)"
        )


def check_triton() -> None:
    """Raise unless Triton kernels can be used."""
    absence = triton_absence()
    if absence is not None:
        raise ConfigError(f"these GPU kernels need triton: {absence}")


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


def check_view(view: KVBatchView, k_cache: Tensor) -> None:
    """Raise unless the view's tensors fit each other and the cache."""
    batch = view.seqused_k.numel()
    if batch > MAX_GRID:
        raise ConfigError(f"batch is {batch}, must be at most {MAX_GRID}")
    device, block_rows = k_cache.device, k_cache.shape[1]
    check_indices("seqused_k", view.seqused_k, (batch,), device)
    check_indices("cu_seqlens_q", view.cu_seqlens_q, (batch + 1,), device)
    if view.block_table is None:
        check_indices("cache_batch_idx", view.cache_batch_idx, (batch,), device)
        if view.max_seqlen_k > block_rows:
            raise ConfigError(
                f"max_seqlen_k is {view.max_seqlen_k}, must be at most {block_rows}, the rows of"
                " a slot"
            )
        return
    max_blocks = view.block_table.shape[-1]
    check_indices("block_table", view.block_table, (batch, max_blocks), device)
    if view.max_seqlen_k > max_blocks * block_rows:
        raise ConfigError(
            f"max_seqlen_k is {view.max_seqlen_k}, must be at most {max_blocks * block_rows}, the"
            f" {max_blocks} blocks of {block_rows} rows that block_table holds"
        )


def check_append(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, view: KVBatchView
) -> None:
    """Raise unless these new rows can be written to these caches."""
    check_caches(k_cache, v_cache)
    for name, tensor, target in (("key", key, k_cache), ("value", value, v_cache)):
        check_tensor(name, tensor, 3, target)
        if tensor.shape[0] != key.shape[0] or tensor.shape[1:] != target.shape[2:]:
            raise ConfigError(
                f"{name} has shape {tuple(tensor.shape)}, must be"
                f" {(key.shape[0], *target.shape[2:])} like the cache and key"
            )
    check_view(view, k_cache)


def check_attention(call: AttentionCall) -> None:
    """Raise unless the tensors of a call fit each other and its settings make sense."""
    check_caches(call.k_cache, call.v_cache)
    check_tensor("query", call.query, 3, call.k_cache)
    num_heads, num_kv_heads = call.query.shape[1], call.k_cache.shape[2]
    if call.query.shape[2] != call.k_cache.shape[3]:
        raise ConfigError(
            f"query has head_dim {call.query.shape[2]}, must be {call.k_cache.shape[3]} like"
            " k_cache"
        )
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"num_heads is {num_heads}, must be a multiple of num_kv_heads, {num_kv_heads}"
        )
    if call.window_left < -1:
        raise ConfigError(f"window_left is {call.window_left}, must be -1 or more")
    if not call.softcap >= 0:
        raise ConfigError(f"softcap is {call.softcap}, must be 0 or more")
    if call.sinks is not None:
        check_sinks(call.sinks, call.query)
    check_view(call.view, call.k_cache)
    if call.out is not None:
        if tuple(call.out.shape) != call.out_shape:
            raise ConfigError(
                f"out has shape {tuple(call.out.shape)}, must be {call.out_shape} like query,"
                " v_cache"
            )
        check_tensor("out", call.out, 3, call.k_cache)


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
