"""One forward pass of a model over packed rows, with its attention over a KV cache.

Owns: nothing.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backend import KVBackend, KVBatchView
from ..errors import VmallocError
from ..kernels.select import AttentionKernels
from .kv_attention import PackedAttention, attention_through


def has_logits_to_keep(model: torch.nn.Module) -> bool:
    """Whether a model can be told the rows whose logits are wanted; others compute them all."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


class ForwardPass(Protocol):
    """Token ids of packed rows in, logits out, K and V written to the cache.

    Attributes:
        name: who computes it: ``"model"``, ``"fused_avx2"``.
    """

    name: str

    def __call__(
        self, token_ids: Tensor, positions: Tensor, rows: Tensor, view: KVBatchView
    ) -> Tensor:
        """See ``PackedForward``."""
        ...

    def close(self) -> None:
        """Let go of the cache's tensors, which keep its addresses reserved."""
        ...


MakeForward = Callable[[KVBackend, AttentionKernels], ForwardPass]
"""Makes the forward pass over a cache."""


class PackedForward:
    """A decoder over packed rows: token ids in, logits out, K and V written to the cache.

    Args:
        model: a transformers decoder whose attention is ``"vmalloc_engine"``, in eval mode.
        backend: where K and V live.
        kernels: what writes and reads them.
        wrap: makes what is called in the model's place, e.g. a compiled model.
    """

    name = "model"

    def __init__(
        self,
        model: torch.nn.Module,
        backend: KVBackend,
        kernels: AttentionKernels,
        wrap: Callable[[torch.nn.Module], Any] = lambda model: model,
    ) -> None:
        self._call: Any = wrap(model)
        self._kernels = kernels
        num_layers = len(backend.config.layers)
        self._layer_caches = [backend.layer_views(layer_idx) for layer_idx in range(num_layers)]
        self._has_logits_to_keep = has_logits_to_keep(model)

    def close(self) -> None:
        """Let go of the model, and of the cache's tensors, which keep its addresses reserved."""
        self._layer_caches.clear()
        self._call = None

    @torch.inference_mode()
    def __call__(
        self, token_ids: Tensor, positions: Tensor, rows: Tensor, view: KVBatchView
    ) -> Tensor:
        """Compute packed rows, all tensors on the model's device.

        Args:
            token_ids, positions: int64 ``[num_tokens]``; those past ``view.cu_seqlens_q[-1]`` are
                padding.
            rows: int64 ``[num_rows]``, the rows whose logits are wanted; none is fine.
            view: where the sequences read and write.

        Returns float32 logits ``[num_rows, vocab_size]``. Raises ``VmallocError`` if the model
        attended elsewhere than in the cache.
        """
        if rows.numel() == 0:  # models take no rows for all rows
            return self(token_ids, positions, rows.new_zeros(1), view)[:0]
        attention = PackedAttention(self._layer_caches, view, self._kernels)
        arguments: dict[str, Any] = {
            "input_ids": token_ids.unsqueeze(0),
            "position_ids": positions.unsqueeze(0),
            "use_cache": False,
        }
        if self._has_logits_to_keep:
            arguments["logits_to_keep"] = rows
        with attention_through(attention):
            logits: Tensor = self._call(**arguments).logits.squeeze(0)
        if attention.num_calls != len(self._layer_caches):
            raise VmallocError(
                f"{attention.num_calls} of {len(self._layer_caches)} layers attended to the KV "
                "cache; was the model's attention switched while an engine uses it?"
            )
        if not self._has_logits_to_keep:
            logits = logits.index_select(0, rows)
        return logits.float()
