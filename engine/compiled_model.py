"""Compiles a model's forward pass for decodes with ``torch.compile``.

Owns: nothing.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .kv_attention import keep_attention_out_of_compilation

BACKEND = "inductor"
"""What generates code; tests take one that is quicker."""

VARIANTS_PER_SIZE = 8
"""Ways in which layers of one model may differ, e.g. by window, and so compile apart."""


def compile_model(model: torch.nn.Module, *, num_sizes: int) -> Callable[..., Any]:
    """``model``, compiled anew for each of ``num_sizes`` batch sizes, our attention left as it is.

    Compilation happens in the first call of each size, and raises what torch raises.
    """
    import torch._dynamo  # takes seconds to load

    keep_attention_out_of_compilation()
    compiled = torch.compile(model, dynamic=False, backend=BACKEND)
    limit = max(torch._dynamo.config.recompile_limit, VARIANTS_PER_SIZE * num_sizes)

    def call(**arguments: Any) -> Any:
        # Past the limit torch would go on without a word, uncompiled.
        with torch._dynamo.config.patch(
            recompile_limit=limit, accumulated_recompile_limit=limit * 32
        ):
            return compiled(**arguments)

    return call
