"""Attention and cache writes on the CPU, over a cache's strided views: by slot or by block table.

Owns: nothing.  Thread-safety: any thread, as long as no call writes rows that another one reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from .. import _core
from ..errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from ..backend import KVBatchView

SUPPORTED_DTYPES: Final = (torch.float32, torch.bfloat16)
HEAD_DIM_MULTIPLE: Final = 8
MAX_HEAD_DIM: Final = 256
# Rows past a sequence's end that the kernel may read: none, whatever they hold.
LOOKAHEAD_ROWS: Final = 0


def use_num_threads(count: int) -> None:
    """Let attention and copies use ``count`` threads, the caller included, in this process.

    Raises ``ConfigError`` unless ``1 <= count <= 1024``.
    """
    if _core.num_threads() != count:  # setting it anew would restart the threads
        _core.set_num_threads(count)


def kernel_name(view: KVBatchView) -> str:
    """Which kernel works on such a batch: ``"cpu_contiguous_avx2"``, ``"cpu_block_table_avx512"``.

    The last word is the instruction set, one of ``portable``, ``avx2`` and ``avx512``.
    """
    layout = "contiguous" if view.block_table is None else "block_table"
    return f"cpu_{layout}_{_core.attention_isa()}"


_DTYPE_CODES: Final = {torch.float32: 0, torch.bfloat16: 1}
_ELEMENT_BYTES: Final = {torch.float32: 4, torch.bfloat16: 2}


def append_kv(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, view: KVBatchView
) -> None:
    """Write the packed new rows of every sequence to the end of its slot, or of its blocks.

    Args:
        key, value: ``[total_q, num_kv_heads, head_dim]``, head_dim contiguous; rows past
            ``view.cu_seqlens_q[-1]`` are padding and are not written.
        k_cache, v_cache: ``[num_slots, rows, num_kv_heads, head_dim]``, one layer's views; with
            ``view.block_table`` ``[num_blocks, block_size, num_kv_heads, head_dim]``, any block
            size.
        view: where the batch lies. No row may be written twice.

    Raises:
        ConfigError: a shape, dtype or index is out of range; nothing was written.
    """
    dtype = k_cache.dtype
    if not key.dtype == value.dtype == dtype == v_cache.dtype or dtype not in _DTYPE_CODES:
        _check_dtypes(key=key, value=value, k_cache=k_cache, v_cache=v_cache)
    total_q, num_kv_heads, k_head_dim = _sizes(key, "key", 3)
    num_slots, num_rows, cache_heads, cache_dim = _sizes(k_cache, "k_cache", 4)
    v_head_dim = _check_v_cache(k_cache, v_cache)
    if (num_kv_heads, k_head_dim) != (cache_heads, cache_dim):
        raise ConfigError(
            f"key has shape {tuple(key.shape)}, must be [total_q, {cache_heads}, {cache_dim}]"
            " like k_cache"
        )
    if _sizes(value, "value", 3) != (total_q, cache_heads, v_head_dim):
        raise ConfigError(
            f"value has shape {tuple(value.shape)}, must be"
            f" {(total_q, cache_heads, v_head_dim)} like key and v_cache"
        )
    cu_seqlens_q, seqused_k, cache_batch_idx, block_table, batch = batch_addresses(view)
    _core.append_kv(
        _ELEMENT_BYTES[dtype],
        (key.data_ptr(), key.stride()),
        (value.data_ptr(), value.stride()),
        (k_cache.data_ptr(), k_cache.stride()),
        (v_cache.data_ptr(), v_cache.stride()),
        cu_seqlens_q,
        seqused_k,
        cache_batch_idx,
        block_table,
        batch,
        total_q,
        num_slots,
        num_rows,
        num_kv_heads,
        k_head_dim,
        v_head_dim,
    )


def varlen_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    view: KVBatchView,
    *,
    softmax_scale: float,
    window_left: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend each packed query to its sequence's cached rows up to its own position.

    A row's result has the same bits whatever else is in the batch, however its sequence is cut
    into calls, and whatever the number of threads, the slot or the blocks: with
    ``view.block_table`` (PagedAttention, Kwon et al. 2023, arXiv:2309.06180) only the addresses of
    the rows change.

    Args:
        query: ``[total_q, num_heads, k_head_dim]``, head_dim contiguous; the last rows of each
            sequence, whose K and V are in the cache already. Rows past ``view.cu_seqlens_q[-1]``
            are padding and give 0.
        k_cache, v_cache: ``[num_slots, rows, num_kv_heads, head_dim]``, one layer's views; with
            ``view.block_table`` ``[num_blocks, block_size, num_kv_heads, head_dim]``, any block
            size. Only rows ``[0, seqused_k)`` of the batch's sequences are read.
        view: where the batch lies.
        softmax_scale: factor of the dot products.
        window_left: keys before its own that a query sees; -1 for all of them.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 for no cap.
        sinks: ``[num_heads]`` float32, one more logit in the denominator of each head.
        out: ``[total_q, num_heads, v_head_dim]`` to write to; a new tensor by default.

    Raises:
        ConfigError: a shape, dtype or index is out of range; ``out`` was not written.
    """
    dtype = query.dtype
    if not dtype == k_cache.dtype == v_cache.dtype or dtype not in _DTYPE_CODES:
        _check_dtypes(query=query, k_cache=k_cache, v_cache=v_cache)
    total_q, num_heads, k_head_dim = _sizes(query, "query", 3)
    num_slots, num_rows, num_kv_heads, cache_dim = _sizes(k_cache, "k_cache", 4)
    v_head_dim = _check_v_cache(k_cache, v_cache)
    if k_head_dim != cache_dim:
        raise ConfigError(f"query has head_dim {k_head_dim}, must be {cache_dim} like k_cache")
    shape = (total_q, num_heads, v_head_dim)
    if out is None:
        out = query.new_empty(shape)
    elif out.dtype != dtype or _sizes(out, "out", 3) != shape:
        raise ConfigError(
            f"out is {out.dtype} {tuple(out.shape)}, must be {dtype} {shape} like query and v_cache"
        )
    sinks_address = 0 if sinks is None else _sinks_address(sinks, num_heads)
    cu_seqlens_q, seqused_k, cache_batch_idx, block_table, batch = batch_addresses(view)
    _core.varlen_attention(
        _DTYPE_CODES[dtype],
        (query.data_ptr(), query.stride()),
        (out.data_ptr(), out.stride()),
        (k_cache.data_ptr(), k_cache.stride()),
        (v_cache.data_ptr(), v_cache.stride()),
        cu_seqlens_q,
        seqused_k,
        cache_batch_idx,
        block_table,
        batch,
        total_q,
        num_slots,
        num_rows,
        num_heads,
        num_kv_heads,
        k_head_dim,
        v_head_dim,
        softmax_scale,
        window_left,
        softcap,
        sinks_address,
    )
    return out


def _sizes(tensor: Tensor, name: str, num_dims: int) -> tuple[int, ...]:
    """The shape of a CPU tensor whose last dimension is contiguous."""
    shape = tensor.shape
    # One condition for the usual case: this runs several times per layer and step.
    if len(shape) == num_dims and tensor.is_cpu and tensor.stride()[-1] == 1:
        return shape
    if len(shape) != num_dims:
        raise ConfigError(f"{name} has shape {tuple(shape)}, must have {num_dims} dimensions")
    if not tensor.is_cpu:
        raise ConfigError(f"{name} is on {tensor.device}, must be on cpu")
    if shape[-1] > 1:
        raise ConfigError(f"{name} has stride {tensor.stride(-1)} in head_dim, must be 1")
    return shape


def _check_v_cache(k_cache: Tensor, v_cache: Tensor) -> int:
    shape = _sizes(v_cache, "v_cache", 4)
    if shape[:3] != k_cache.shape[:3]:
        raise ConfigError(
            f"v_cache has shape {tuple(shape)}, must be {tuple(k_cache.shape[:3])} like k_cache"
            " in all but head_dim"
        )
    return shape[3]


def _check_dtypes(**tensors: Tensor) -> None:
    """Raise for the first tensor that is not of the supported dtype of the last."""
    expected = next(reversed(tensors.values())).dtype
    for name, tensor in tensors.items():
        if tensor.dtype not in SUPPORTED_DTYPES:
            supported = " or ".join(str(dtype) for dtype in SUPPORTED_DTYPES)
            raise ConfigError(f"{name} is {tensor.dtype}, must be {supported}")
        if tensor.dtype != expected:
            raise ConfigError(f"{name} is {tensor.dtype}, must be {expected} like the cache")


def _sinks_address(sinks: Tensor, num_heads: int) -> int:
    if (
        sinks.dtype != torch.float32
        or sinks.shape != (num_heads,)
        or not sinks.is_contiguous()
        or not sinks.is_cpu
    ):
        raise ConfigError(
            f"sinks is {sinks.dtype} {tuple(sinks.shape)} on {sinks.device}, must be contiguous"
            f" torch.float32 ({num_heads},) on cpu"
        )
    return sinks.data_ptr()


def batch_addresses(view: KVBatchView) -> tuple[int, int, int, tuple[int, int, int] | None, int]:
    """Addresses of the index tensors, the batch size last; the core checks their values."""
    cu_seqlens_q, seqused_k, slots = view.cu_seqlens_q, view.seqused_k, view.cache_batch_idx
    batch = seqused_k.numel()
    if slots.numel() != batch or cu_seqlens_q.numel() != batch + 1:
        raise ConfigError(
            f"cu_seqlens_q has {cu_seqlens_q.numel()} entries and cache_batch_idx"
            f" {slots.numel()}, must be {batch + 1} and {batch} with seqused_k of {batch}"
        )
    for tensor in (cu_seqlens_q, seqused_k, slots):
        if tensor.dtype != torch.int32 or not tensor.is_contiguous() or not tensor.is_cpu:
            names = {"cu_seqlens_q": cu_seqlens_q, "seqused_k": seqused_k, "cache_batch_idx": slots}
            name = next(name for name, value in names.items() if value is tensor)
            raise ConfigError(
                f"{name} is {tensor.dtype} with strides {tensor.stride()} on {tensor.device},"
                " must be contiguous torch.int32 on cpu"
            )
    table = view.block_table
    block_table = None if table is None else _block_table(table, batch)
    return cu_seqlens_q.data_ptr(), seqused_k.data_ptr(), slots.data_ptr(), block_table, batch


def _block_table(table: Tensor, batch: int) -> tuple[int, int, int]:
    """Address, row stride and width; rows may lie further apart than they are wide."""
    if table.dim() != 2 or table.shape[0] != batch:
        raise ConfigError(
            f"block_table has shape {tuple(table.shape)}, must be [{batch}, max_blocks] with"
            f" seqused_k of {batch}"
        )
    width = table.shape[1]
    if table.dtype != torch.int32 or not table.is_cpu or (width > 1 and table.stride(1) != 1):
        raise ConfigError(
            f"block_table is {table.dtype} with strides {table.stride()} on {table.device},"
            " must be torch.int32 on cpu with stride 1 in its last dimension"
        )
    return table.data_ptr(), table.stride(0), width


class CpuKernels:
    """The functions of this module, as ``select.AttentionKernels``."""

    name: Final = "cpu"
    lookahead_rows: Final = LOOKAHEAD_ROWS
    is_graph_safe: Final = False
    append_kv = staticmethod(append_kv)
    varlen_attention = staticmethod(varlen_attention)
    kernel_name = staticmethod(kernel_name)
