"""The kernels over block tables on a GPU, as one object that an engine picks at start.

Owns: nothing.  Thread-safety: any thread, as long as no call writes rows that another one reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ..errors import ConfigError
from . import paged_gpu

if TYPE_CHECKING:
    from torch import Tensor

    from ..backend import KVBatchView

NAMES: Final = ("fa2", "triton")


class PagedKernels:
    """``select.AttentionKernels`` over block tables: flash-attn where it can, else Triton.

    Args:
        prefer: ``["triton"]`` leaves all to Triton; ``["fa2"]`` asks for flash-attn, and a call
            that it does not take is a ``ConfigError``. Empty or both: flash-attn where it can.
    """

    name: Final = "cuda-blocks"
    lookahead_rows: Final = paged_gpu.LOOKAHEAD_ROWS
    is_graph_safe: Final = True

    def __init__(self, prefer: Sequence[str] = ()) -> None:
        for name in prefer:
            if name not in NAMES:
                raise ConfigError(
                    f"kernel {name!r} is unknown; over block tables: {', '.join(NAMES)}"
                )
        self._may_use_flash_attn = not prefer or "fa2" in prefer
        self._may_use_triton = not prefer or "triton" in prefer
        self._uses_flash_attn = False  # in the last call

    def append_kv(
        self, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, view: KVBatchView
    ) -> None:
        """As ``paged_gpu.append_kv``."""
        paged_gpu.append_kv(key, value, k_cache, v_cache, view)

    def varlen_attention(
        self,
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
        """As ``paged_gpu.varlen_attention``; ``ConfigError`` where ``prefer`` forbids what fits."""
        self._uses_flash_attn = self._may_use_flash_attn and paged_gpu.takes_flash_attn(
            k_cache, v_cache, sinks
        )
        if not (self._uses_flash_attn or self._may_use_triton):
            raise ConfigError(
                f"prefer is ['fa2'], but flash-attn is not installed or cannot take"
                f" {k_cache.dtype} blocks of {k_cache.shape[1]} rows of head_dim {k_cache.shape[3]}"
            )
        return paged_gpu.varlen_attention(
            query,
            k_cache,
            v_cache,
            view,
            softmax_scale=softmax_scale,
            window_left=window_left,
            softcap=softcap,
            sinks=sinks,
            out=out,
            may_use_flash_attn=self._uses_flash_attn,
        )

    def kernel_name(self, view: KVBatchView) -> str:
        """As ``paged_gpu.kernel_name``, for caches like those of the last call."""
        if self._uses_flash_attn:
            return "flash-attn"
        return "triton-decode" if view.max_seqlen_q <= 1 else "triton-prefill"
