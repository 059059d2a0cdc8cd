"""The attention function that transformers calls for us: KV rows in, attended rows out.

Owns: the name ``"vmalloc_engine"`` in transformers' attention registry, one for the process, and
the batch that the current forward pass works on.
Thread-safety: the current batch is a context variable, so threads do not see each other's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from ..backend import KVBatchView
from ..errors import VmallocError
from ..kernels.select import AttentionKernels

ATTENTION_NAME = "vmalloc_engine"
"""Under this name models find us. It has no entry in the mask registry, so no mask is built; the
name ``"vmalloc"``, which has one, belongs to ``vmalloc.integrations.transformers``."""

_HARMLESS_KWARGS = frozenset(
    {
        "position_ids",  # StableLM and others: K and Q are rotated already
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "layer_idx",
    }
)


@dataclass(slots=True)
class AttentionCall:
    """One layer's call, checked: everything the model asked of attention.

    Attributes:
        layer_idx: which decoder layer.
        query: ``[num_rows, num_heads, head_dim]``, packed over sequences, padding rows at the end.
        key, value: ``[num_rows, num_kv_heads, head_dim]``.
        softmax_scale: factor on the scores.
        window: tokens a row looks back, itself included, or None.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0.0 leaves them.
        sinks: ``[num_heads]`` extra logit in each softmax, or None.
    """

    layer_idx: int
    query: Tensor
    key: Tensor
    value: Tensor
    softmax_scale: float
    window: int | None
    softcap: float
    sinks: Tensor | None


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """How one layer attends, whatever the batch: ``AttentionCall`` without its rows.

    Attributes:
        num_heads, num_kv_heads: of queries, and of keys and values.
        k_head_dim, v_head_dim: elements of a head.
        softmax_scale, window, softcap: as in ``AttentionCall``.
        has_sinks: whether there are extra logits.
    """

    num_heads: int
    num_kv_heads: int
    k_head_dim: int
    v_head_dim: int
    softmax_scale: float
    window: int | None
    softcap: float
    has_sinks: bool

    @classmethod
    def of(cls, call: AttentionCall) -> LayerAttention:
        """That of a call."""
        return cls(
            num_heads=call.query.shape[1],
            num_kv_heads=call.key.shape[1],
            k_head_dim=call.key.shape[2],
            v_head_dim=call.value.shape[2],
            softmax_scale=call.softmax_scale,
            window=call.window,
            softcap=call.softcap,
            has_sinks=call.sinks is not None,
        )


AttentionHandler = Callable[[AttentionCall], Tensor]
"""Answers a call with ``[num_rows, num_heads, head_dim]``."""

_handler: ContextVar[AttentionHandler | None] = ContextVar("vmalloc_attention", default=None)


@contextmanager
def attention_through(handler: AttentionHandler) -> Iterator[None]:
    """Send the attention of every forward pass in this block to ``handler``."""
    token = _handler.set(handler)
    try:
        yield
    finally:
        _handler.reset(token)


class PackedAttention:
    """Attention of one packed batch over the KV cache.

    Rows past ``view.cu_seqlens_q[-1]`` are padding: they never touch the cache and give 0.

    Args:
        layer_caches: K and V of each layer, as ``KVBackend.layer_views`` gives them.
        view: where the batch writes and reads.
        kernels: what does it.

    Attributes:
        num_calls: how often it was called.
    """

    __slots__ = ("_kernels", "_layer_caches", "_view", "num_calls")

    def __init__(
        self,
        layer_caches: list[tuple[Tensor, Tensor]],
        view: KVBatchView,
        kernels: AttentionKernels,
    ) -> None:
        self._layer_caches = layer_caches
        self._view = view
        self._kernels = kernels
        self.num_calls = 0

    def __call__(self, call: AttentionCall) -> Tensor:
        self.num_calls += 1
        k_cache, v_cache = self._layer_caches[call.layer_idx]
        self._kernels.append_kv(call.key, call.value, k_cache, v_cache, self._view)
        return self._kernels.varlen_attention(
            call.query,
            k_cache,
            v_cache,
            self._view,
            softmax_scale=call.softmax_scale,
            window_left=-1 if call.window is None else call.window - 1,
            softcap=call.softcap,
            sinks=None if call.sinks is None else call.sinks.detach().float().contiguous(),
        )


def vmalloc_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks: ``query [1, num_heads, num_rows, head_dim]`` and so on.

    Returns ``[1, num_rows, num_heads, head_dim]``. Raises ``VmallocError`` for anything that would
    have to be ignored: a mask, dropout, a position bias, an unknown argument with a value.
    """
    handler = _handler.get()
    if handler is None:
        raise VmallocError(
            f"attention {ATTENTION_NAME!r} was called outside an engine step; a model that an "
            "engine uses cannot run forward() or generate() on its own until the engine is closed"
        )
    if attention_mask is not None:
        raise VmallocError("attention got a mask; packed batches are causal and have none")
    if dropout:
        raise VmallocError(f"attention got dropout={dropout}; put the model in eval mode")
    if is_causal is False:
        raise VmallocError("attention got is_causal=False; only causal attention is supported")
    for name, argument in kwargs.items():
        if argument is not None and argument is not False and name not in _HARMLESS_KWARGS:
            raise VmallocError(f"attention got {name}, which it does not know and cannot drop")
    if query.shape[0] != 1:
        raise VmallocError(f"attention got batch size {query.shape[0]}; packed batches have 1")
    layer_idx = getattr(module, "layer_idx", None)
    if layer_idx is None:
        raise VmallocError(f"{type(module).__name__} has no layer_idx")
    out = handler(
        AttentionCall(
            layer_idx,
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            sliding_window,
            softcap or 0.0,
            s_aux,
        )
    )
    return out.unsqueeze(0), None


_registered: Callable[..., Any] = vmalloc_attention


def register_attention() -> None:
    """Make ``attn_implementation="vmalloc_engine"`` known to transformers. Idempotent."""
    AttentionInterface.register(ATTENTION_NAME, _registered)


def keep_attention_out_of_compilation() -> None:
    """Let compiled models call our attention as it is: it hands addresses to kernels.

    From then on in this process; it takes a microsecond or two a call, and loads the compiler.
    """
    global _registered
    if _registered is vmalloc_attention:
        compiler: Any = torch.compiler
        _registered = compiler.disable(vmalloc_attention)
    register_attention()
