"""Our Triton kernels over slots: any head_dim up to 256, float32, windows, soft-cap, sinks.

A slot is one block of any length, so these are the kernels over block tables with a table of one
column: the slot numbers. Loads are masked per row: nothing past a sequence's end is read. A row's
bits do not depend on its batch mates. The fallback of every case that others refuse.

Owns: nothing.  Thread-safety: launches go to the caller's current stream. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..gpu_checks import triton_absence
from ..paged_gpu import attend_by_triton
from .case import AttentionCase

if TYPE_CHECKING:
    from torch import Tensor

    from ..attention_call import AttentionCall


class TritonSlots:
    """``SlotKernel``."""

    name: Final = "triton"
    lookahead_rows: Final = 0
    is_graph_safe: Final = True

    def absence(self) -> str | None:
        return triton_absence()

    def refusal(self, case: AttentionCase) -> str | None:
        return None

    def attend(self, call: AttentionCall) -> Tensor:
        return attend_by_triton(call)
