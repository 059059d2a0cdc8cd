"""flash-attn 2's decode over slots: ``flash_attn_with_kvcache`` with ``cache_batch_idx``.

Reads no row past a sequence's end: with ``cache_seqlens`` the last block of K and V is copied under
a mask per row, and what is masked off is cleared in shared memory, so that garbage and NaN behind
the end do no harm (flash-attn 2.8.3, ``flash_fwd_kernel.h``). The host picks the number of splits
from the length of the view, hence views cut to a bucket; a row's last bits may depend on its batch
mates. Prefill is left to others: the Python entry for packed queries takes no lengths of slots.

Owns: nothing.  Thread-safety: launches go to the caller's current stream. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from ..buckets import bucket_rows
from ..flash_paged import load_flash_attn
from .case import AttentionCase, aligned, flash_refusal
from .decode_rows import decode_rows

if TYPE_CHECKING:
    from torch import Tensor

    from ..attention_call import AttentionCall


class FlashAttn2:
    """``SlotKernel``; ``module`` is ``flash_attn``, or None to look for it."""

    name: Final = "fa2"
    lookahead_rows: Final = 0
    is_graph_safe: Final = True

    def __init__(self, module: Any = None) -> None:
        self._module: Any = module or load_flash_attn()

    def absence(self) -> str | None:
        return None if self._module is not None else "flash_attn is not installed or does not load"

    def refusal(self, case: AttentionCase) -> str | None:
        if not case.is_decode:
            return "it takes one new row a sequence"
        return flash_refusal(case)

    def attend(self, call: AttentionCall) -> Tensor:
        num_rows = call.k_cache.shape[1]
        bucket = bucket_rows(call.view.max_seqlen_k, num_rows)
        rows = decode_rows(call.view, call.query.shape[0], num_rows)
        attended: Tensor = self._module.flash_attn_with_kvcache(
            aligned(call.query).unsqueeze(1),
            call.k_cache[:, :bucket],
            call.v_cache[:, :bucket],
            cache_seqlens=rows.lengths,
            cache_batch_idx=rows.slots,
            softmax_scale=call.softmax_scale,
            causal=True,
            # A right side of 0 would keep the queries of a group from sharing a tile.
            window_size=(call.window_left, 0 if call.window_left >= 0 else -1),
            softcap=call.softcap,
        )
        return attended.squeeze(1)
