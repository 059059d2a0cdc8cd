"""Writing packed new rows to the ends of their slots: one Triton launch, or torch without Triton.

Owns: nothing.  Thread-safety: launches go to the caller's current stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..attention_call import on_device
from ..gpu_checks import check_append, triton_absence

if TYPE_CHECKING:
    from torch import Tensor

    from ...backend import KVBatchView


def append_kv(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, view: KVBatchView
) -> None:
    """Write ``key``, ``value`` ``[total_q, num_kv_heads, head_dim]``; padding rows are not written.

    Raises:
        ConfigError: a shape, dtype or device does not fit; nothing was written.
    """
    check_append(key, value, k_cache, v_cache, view)
    if view.seqused_k.shape[0] == 0 or view.max_seqlen_q == 0 or key.shape[0] == 0:
        return
    with on_device(key.device):
        if triton_absence() is None:
            from ..triton_append import launch_append

            launch_append(key, value, k_cache, v_cache, view)
        else:
            put_rows(key, value, k_cache, v_cache, view)


def put_rows(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, view: KVBatchView
) -> None:
    """The write without Triton. No shape follows data, and no padding row finds a place.

    A padding row writes what the first row writes, to the same place: how many there are is known
    on the GPU only, and there is a first row wherever ``view.max_seqlen_q`` is not 0.
    """
    cu_seqlens_q = view.cu_seqlens_q
    tokens = torch.arange(key.shape[0], device=key.device)
    tokens = torch.where(tokens < cu_seqlens_q[-1], tokens, 0)
    seqs = torch.searchsorted(cu_seqlens_q[1:], tokens.int(), right=True)
    rows = view.seqused_k[seqs] - cu_seqlens_q[seqs + 1] + tokens
    slots = view.cache_batch_idx[seqs].long()
    k_cache[slots, rows] = key[tokens]
    v_cache[slots, rows] = value[tokens]
