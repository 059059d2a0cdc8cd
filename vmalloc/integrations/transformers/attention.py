"""``attn_implementation="vmalloc"``: our kernels where they fit a call, the stock ones elsewhere.

Owns: the name ``"vmalloc"`` in transformers' two registries, from ``register()`` on.
Thread-safety: any thread; what is worked out for a mask is remembered by thread.
"""

from __future__ import annotations

import sys
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ...backend import KVBatchView
from ...errors import VmallocError
from ...kernels import cpu
from ...kernels.select import AttentionKernels, select_kernels
from .shapes import LayerShape

ATTENTION_NAME = "vmalloc"

# What models pass along that attention does not need: keys and queries are rotated already, and
# the mask says where sequences begin. Anything else may be a mask in disguise (sparse attention).
_HARMLESS_TENSORS = frozenset(
    {
        *("position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "token_type_ids"),
        *("num_items_in_batch", "seq_idx"),
    }
)


def register(num_threads: int | None = None) -> None:
    """Make ``attn_implementation="vmalloc"`` known to transformers. Idempotent.

    On the CPU ours are decode and unpadded prefill in float32 and bfloat16, on CUDA what
    ``select_kernels`` finds. Everything else goes to torch's attention, as under ``"sdpa"``: padded
    prefill, gradients, dropout, masks of any other form. It works with any cache, and reads a
    ``VirtualCache`` where it lies.

    Args:
        num_threads: threads of the CPU kernels in this process; None: as many as torch uses.

    Raises:
        ConfigError: ``num_threads`` is out of range.
    """
    cpu.use_num_threads(torch.get_num_threads() if num_threads is None else num_threads)
    AttentionInterface.register(ATTENTION_NAME, vmalloc_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the kernels are nothing to trace
def vmalloc_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers asks.

    Args:
        query: ``[batch, num_heads, num_queries, head_dim]``; the last tokens of every row.
        key, value: ``[batch, num_kv_heads, num_tokens, head_dim]``.
        attention_mask: ``[batch, 1, num_queries, num_tokens]``, or None for plain causality.

    Returns:
        ``[batch, num_queries, num_heads, head_dim]``, and no weights.

    Raises:
        VmallocError: the model passes something that would have to be ignored.
    """
    for name, argument in kwargs.items():
        if isinstance(argument, Tensor) and name not in _HARMLESS_TENSORS:
            raise VmallocError(
                f"{type(module).__name__} gives attention {name}, which {ATTENTION_NAME!r} does "
                'not know and cannot drop; use attn_implementation="sdpa" for this model'
            )
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    if not (dropout or needs_grad or position_bias is not None):
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        batch = None
        if _is_supported(query, key, value):
            batch = _batch_of(query, key, value, attention_mask, bool(is_causal))
        if batch is not None:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return _attend(query, key, value, batch, scale, softcap or 0.0, s_aux), None
    stock = {**kwargs, "dropout": dropout, "scaling": scaling}
    if position_bias is not None:
        stock["position_bias"] = position_bias
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, is_causal=is_causal, **stock
        )
    if softcap is not None:
        stock["softcap"] = softcap
    if s_aux is not None:
        stock["s_aux"] = s_aux
    return _eager(module, query, key, value, attention_mask, stock)


class _Batch(NamedTuple):
    """Which tokens of ``key`` each row attends to.

    Attributes:
        view: lengths and places, in the kernels' words. Where tokens are masked at the start of a
            row, its place is its first token that is not, counted from the batch's first token.
        num_slots: places; 0 where they are just the rows of the batch.
    """

    view: KVBatchView
    num_slots: int = 0


class _Recent(threading.local):
    """The last batches that were worked out: a forward pass asks once per layer."""

    def __init__(self) -> None:
        self.plain: tuple[tuple[int, int, int, torch.device], _Batch] | None = None
        self.masked: dict[int, tuple[Tensor, tuple[int, ...], _Batch | None]] = {}
        self.kernels: dict[tuple[int, LayerShape], AttentionKernels] = {}


_recent = _Recent()
_MAX_MASKS = 4  # a model has one for each kind of layer
_MAX_PLACE = 2**31 - 1  # kernels take places as int32


def _batch_of(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> _Batch | None:
    """What our kernels are told, or None if they cannot do what is asked."""
    batch, _, num_queries, _ = query.shape
    num_tokens = key.shape[2]
    if mask is None:
        # transformers leaves the mask out for one query, or for the whole of a causal prompt.
        if num_queries == 1 or (is_causal and num_queries == num_tokens):
            return _plain_batch(batch, num_queries, num_tokens, key.device)
        return None
    if num_queries != 1 or mask.dtype != torch.bool or not key.is_cpu:
        return None
    row_tokens = _row_tokens(key)
    if row_tokens is None or row_tokens != _row_tokens(value):
        return None
    found = _masked_batch(mask, batch, num_tokens, row_tokens)
    return found if found is not None and _fits(key, found) and _fits(value, found) else None


def _row_tokens(states: Tensor) -> int | None:
    """Tokens between two rows of the batch, if it is a whole number of them."""
    slot, token = states.stride(0), states.stride(2)
    if states.shape[0] == 1:
        return states.shape[2]
    return slot // token if token > 0 and slot % token == 0 else None


def _fits(states: Tensor, batch: _Batch) -> bool:
    """Whether the overlapping slots of ``_as_slots`` end before the tensor's memory does."""
    _, num_heads, _, head_dim = states.shape
    last = (batch.num_slots - 1 + batch.view.max_seqlen_k - 1) * states.stride(2)
    end = states.storage_offset() + last + (num_heads - 1) * states.stride(1) + head_dim
    return end * states.itemsize <= states.untyped_storage().nbytes()


def _plain_batch(batch: int, num_queries: int, num_tokens: int, device: torch.device) -> _Batch:
    sizes = (batch, num_queries, num_tokens, device)
    if _recent.plain is not None and _recent.plain[0] == sizes:
        return _recent.plain[1]
    rows = torch.arange(batch + 1, dtype=torch.int32, device=device)
    view = KVBatchView(
        cache_batch_idx=rows[:batch],
        cu_seqlens_q=rows * num_queries,
        seqused_k=torch.full((batch,), num_tokens, dtype=torch.int32, device=device),
        max_seqlen_q=num_queries,
        max_seqlen_k=num_tokens,
    )
    found = _Batch(view)
    _recent.plain = (sizes, found)
    return found


def _masked_batch(mask: Tensor, batch: int, num_tokens: int, row_tokens: int) -> _Batch | None:
    """One query a row whose mask hides tokens at the row's start only: padding, or a window."""
    if mask.is_inference():  # nothing tells whether it was written to since
        return _read_mask(mask, batch, num_tokens, row_tokens)
    sizes = (mask._version, batch, num_tokens, row_tokens)
    known = _recent.masked.get(id(mask))
    if known is not None and known[0] is mask and known[1] == sizes:
        return known[2]
    found = _read_mask(mask, batch, num_tokens, row_tokens)
    if len(_recent.masked) >= _MAX_MASKS:
        _recent.masked.clear()
    # The mask is kept, so that no other can have its id.
    _recent.masked[id(mask)] = (mask, sizes, found)
    return found


def _read_mask(mask: Tensor, batch: int, num_tokens: int, row_tokens: int) -> _Batch | None:
    if batch * row_tokens > _MAX_PLACE:
        return None
    found = None
    if mask.shape[1] == 1 and mask.shape[-1] == num_tokens:
        allowed = mask[:, 0, 0, :].expand(batch, num_tokens)
        counts = allowed.sum(-1, dtype=torch.int32)
        starts = num_tokens - counts
        if bool(((allowed.int().argmax(-1) == starts) & (counts > 0)).all()):
            rows = torch.arange(batch + 1, dtype=torch.int32, device=mask.device)
            places = (rows[:batch] * row_tokens + starts).int()
            view = KVBatchView(
                cache_batch_idx=places,
                cu_seqlens_q=rows,
                seqused_k=counts,
                max_seqlen_q=1,
                max_seqlen_k=int(counts.max()),
            )
            found = _Batch(view, int(places[-1]) + 1)
    return found


def _is_supported(query: Tensor, key: Tensor, value: Tensor) -> bool:
    if not query.dtype == key.dtype == value.dtype or query.device != key.device:
        return False
    if key.stride(-1) != 1 or value.stride(-1) != 1 or query.shape[1] % key.shape[1]:
        return False
    if key.is_cuda:
        return True  # the dispatcher looks for a kernel, torch's own at last
    dims = (key.shape[-1], value.shape[-1])
    return key.dtype in cpu.SUPPORTED_DTYPES and all(
        dim % cpu.HEAD_DIM_MULTIPLE == 0 and dim <= cpu.MAX_HEAD_DIM for dim in dims
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch: _Batch,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    num_rows, num_heads, num_queries, head_dim = query.shape
    packed = query.transpose(1, 2).reshape(num_rows * num_queries, num_heads, head_dim)
    if packed.stride(-1) != 1:
        packed = packed.contiguous()
    out = _kernels_for(num_heads, key, value).varlen_attention(
        packed,
        _as_slots(key, batch),
        _as_slots(value, batch),
        batch.view,
        softmax_scale=scale,
        softcap=softcap,
        sinks=None if sinks is None else sinks.detach().float().contiguous(),
    )
    return out.view(num_rows, num_queries, num_heads, value.shape[-1])


def _as_slots(states: Tensor, batch: _Batch) -> Tensor:
    """``[num_slots, tokens, num_kv_heads, head_dim]``: the rows, or a slot from each token on."""
    if not batch.num_slots:
        return states.transpose(1, 2)
    _, num_heads, _, head_dim = states.shape
    _, head, token, element = states.stride()
    return states.as_strided(
        (batch.num_slots, batch.view.max_seqlen_k, num_heads, head_dim),
        (token, token, head, element),
    )


def _kernels_for(num_heads: int, key: Tensor, value: Tensor) -> AttentionKernels:
    shape = LayerShape.of(key, value)
    kernels = _recent.kernels.get((num_heads, shape))
    if kernels is None:
        kernels = _recent.kernels[num_heads, shape] = select_kernels(
            [shape.spec], device=key.device, has_block_table=False, num_heads=num_heads
        )
    return kernels


def _eager(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    arguments: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention in plain torch: only it knows soft-caps and sinks."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise VmallocError(
            f"{type(module).__name__} asks for a soft-cap or sinks in a call that no kernel takes, "
            "and has no attention of its own"
        )
    num_queries, num_tokens = query.shape[2], key.shape[2]
    if mask is None and num_queries > 1:
        past = num_tokens - num_queries
        ones = torch.ones(num_queries, num_tokens, dtype=torch.bool, device=query.device)
        mask = ones.tril(past)[None, None]
    if mask is not None and mask.dtype == torch.bool:
        blocked = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, blocked)
    return eager(module, query, key, value, mask, **arguments)  # type: ignore[no-any-return]
