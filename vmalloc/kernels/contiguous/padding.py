"""Zeros in the rows past a packed batch's last, which kernels for packed queries leave undefined.

Owns: nothing.  Thread-safety: functions without state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ...backend import KVBatchView


def zero_padding(attended: Tensor, view: KVBatchView) -> Tensor:
    """``attended`` with 0 in every row from ``view.cu_seqlens_q[-1]`` on."""
    is_padding = torch.arange(attended.shape[0], device=attended.device) >= view.cu_seqlens_q[-1]
    return attended.masked_fill_(is_padding[:, None, None], 0)
