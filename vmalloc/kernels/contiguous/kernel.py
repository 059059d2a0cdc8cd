"""What the dispatch asks of each kernel.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from ..attention_call import AttentionCall
    from .case import AttentionCase


class SlotKernel(Protocol):
    """One way to attend over slots."""

    @property
    def name(self) -> str: ...

    @property
    def lookahead_rows(self) -> int:
        """Rows past a sequence's end that it may read, whatever they hold unless it says so."""
        ...

    @property
    def is_graph_safe(self) -> bool:
        """Whether a call neither waits for the GPU nor has shapes that follow data."""
        ...

    def absence(self) -> str | None:
        """Why it cannot be used on this machine at all, None if it can."""
        ...

    def refusal(self, case: AttentionCase) -> str | None:
        """Why it cannot take such a call, None if it can."""
        ...

    def attend(self, call: AttentionCall) -> Tensor:
        """``call.out`` or a tensor of its own, ``[total_q, num_heads, v_head_dim]``.

        ``call`` was checked and is not empty. Padding rows give 0.
        """
        ...
