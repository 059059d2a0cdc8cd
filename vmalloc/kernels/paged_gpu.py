"""Attention, cache writes and block copies on a GPU, over block tables; the checked entry.

Shapes, types and devices are checked here. Values of index tensors are not: they live on the GPU,
and reading them would stall the stream. The backend that fills them answers for them. Attention
goes to flash-attn where it is installed and takes the case, else to Triton. The kernels are proven
under Triton's interpreter and compile for sm_90; not yet run on a GPU.

Owns: nothing.
Thread-safety: any thread, as long as no call writes rows that another one reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from ..errors import ConfigError
from . import flash_paged
from .attention_call import AttentionCall, on_device
from .gpu_checks import (
    check_append,
    check_attention,
    check_device,
    check_indices,
    check_triton,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..backend import KVBatchView

# Rows past a sequence's end that the kernels may read: none, whatever they hold.
LOOKAHEAD_ROWS: Final = 0


def kernel_name(
    view: KVBatchView,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    sinks: Tensor | None = None,
    may_use_flash_attn: bool = True,
) -> str:
    """Which kernel ``varlen_attention`` uses: ``"flash-attn"``, or ``"triton"`` and its kernels.

    ``"triton-decode"`` if no sequence has more than one new row, else ``"triton-prefill"``, which
    leaves the sequences of one new row to the decode kernel all the same.
    """
    if may_use_flash_attn and takes_flash_attn(k_cache, v_cache, sinks):
        return "flash-attn"
    return "triton-decode" if view.max_seqlen_q <= 1 else "triton-prefill"


def append_kv(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, view: KVBatchView
) -> None:
    """Write the packed new rows of every sequence into its blocks.

    Args:
        key, value: ``[total_q, num_kv_heads, head_dim]``, head_dim contiguous; rows past
            ``view.cu_seqlens_q[-1]`` are padding and are not written.
        k_cache, v_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]``, one layer's views.
        view: where the batch lies. No block that is written to may belong to two sequences.

    Raises:
        ConfigError: a shape, dtype or device does not fit; nothing was written.
    """
    check_triton()
    _check_has_table(view)
    check_append(key, value, k_cache, v_cache, view)
    if view.seqused_k.numel() == 0 or view.max_seqlen_q == 0 or key.shape[0] == 0:
        return
    from .triton_append import launch_append

    with on_device(key.device):
        launch_append(key, value, k_cache, v_cache, view)


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
    may_use_flash_attn: bool = True,
) -> Tensor:
    """Attend each packed query to its sequence's cached rows up to its own position.

    With the Triton kernels a row's result has the same bits whatever else is in the batch; it may
    differ in the last ones between a decode step and a prefill of the same row.

    Args:
        query: ``[total_q, num_heads, k_head_dim]``, head_dim contiguous; the last rows of each
            sequence, whose K and V are in the cache already. Rows past ``view.cu_seqlens_q[-1]``
            are padding and give 0.
        k_cache, v_cache: ``[num_blocks, block_size, num_kv_heads, head_dim]``, one layer's views;
            only rows that a query of the batch sees are read.
        view: where the batch lies; entries of the block table past a sequence's end are not read.
        softmax_scale: factor of the dot products.
        window_left: keys before its own that a query sees; -1 for all of them.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 for no cap.
        sinks: ``[num_heads]`` float32, one more logit in the denominator of each head.
        out: ``[total_q, num_heads, v_head_dim]`` to write to; a new tensor by default.
        may_use_flash_attn: False leaves all to Triton, whose rows are independent of batch mates.

    Raises:
        ConfigError: a shape, dtype, device or setting does not fit; ``out`` was not written.
    """
    check_triton()
    _check_has_table(view)
    call = AttentionCall(
        query,
        k_cache,
        v_cache,
        view,
        float(softmax_scale),  # an int would compile another kernel
        window_left,
        float(softcap),
        sinks,
        out,
    )
    check_attention(call)
    if call.is_empty:
        return call.zeroed_out()
    with on_device(query.device):
        if may_use_flash_attn and takes_flash_attn(k_cache, v_cache, sinks):
            return flash_paged.attend(flash_paged.load_flash_attn(), call)
        return attend_by_triton(call)


def copy_blocks(blocks: Tensor, pairs: Tensor, num_rows: Tensor | None = None) -> None:
    """Copy blocks onto others of the same storage, all of them in one launch.

    Args:
        blocks: ``[num_blocks, num_parts, block_size, row_elements]`` of any dtype; the rows of a
            part are dense, the parts (layers, K and V) may lie anywhere.
        pairs: ``[num_pairs, 2]`` int32, source and target. No target may be a source or another's
            target.
        num_rows: ``[num_pairs]`` int32, how many leading rows to copy of each; None for all.

    Raises:
        ConfigError: a shape, dtype, stride or device does not fit; nothing was copied.
    """
    check_triton()
    check_device("blocks", blocks)
    if blocks.dim() != 4:
        raise ConfigError(f"blocks has shape {tuple(blocks.shape)}, must have 4 dimensions")
    if blocks.stride()[2:] != (blocks.shape[3], 1):
        raise ConfigError(
            f"blocks has strides {blocks.stride()}, its last two must be {(blocks.shape[3], 1)}"
        )
    num_pairs = pairs.shape[0]
    check_indices("pairs", pairs, (num_pairs, 2), blocks.device)
    if num_rows is not None:
        check_indices("num_rows", num_rows, (num_pairs,), blocks.device)
    if num_pairs == 0 or blocks.numel() == 0:
        return
    from .triton_copy import launch_copy

    with on_device(blocks.device):
        launch_copy(blocks, pairs, num_rows)


def attend_by_triton(call: AttentionCall) -> Tensor:
    """Each kernel picks its own sequences by their number of new rows, never by their mates'."""
    from .triton_decode import launch_decode
    from .triton_prefill import launch_prefill

    out = call.zeroed_out()  # padding rows: how many there are is known on the GPU only
    if call.view.max_seqlen_q > 1:
        launch_prefill(call, out)
    launch_decode(call, out)
    return out


def _check_has_table(view: KVBatchView) -> None:
    if view.block_table is None:
        raise ConfigError("block_table is None, must be [batch, max_blocks] for paged kernels")


def takes_flash_attn(k_cache: Tensor, v_cache: Tensor, sinks: Tensor | None) -> bool:
    """Whether flash-attn is there, for a GPU that it runs on, and takes these caches."""
    return (
        k_cache.is_cuda
        and flash_paged.can_attend(k_cache, v_cache, sinks)
        and flash_paged.load_flash_attn() is not None
        and torch.cuda.get_device_capability(k_cache.device) >= (8, 0)
    )
