"""A whole llama-like decoder on the CPU in float32: packed rows in, logits out, K and V cached.

Owns: nothing.  Thread-safety: one forward pass at a time per decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from .. import _core
from ..errors import ConfigError
from .cpu import batch_addresses
from .decoder_spec import Norm, Projection

if TYPE_CHECKING:
    from torch import Tensor

    from ..backend import KVBatchView
    from .decoder_spec import DecoderSpec, LayerSpec

    _Weight = tuple[int, int, int, int, int]
    _Norm = tuple[int, float, float] | None
    _Rows = tuple[int, int, int, int]

DecoderCache = _core.DecoderCache
"""Where K and V of every layer are, see ``decoder_cache``."""


class CpuDecoder:
    """Computes what a spec says, in one native loop over its layers.

    A row's logits have the same bits whatever else is in the batch, however its sequence is cut
    into calls, and whatever the number of threads.

    Args:
        spec: the decoder. Its tensors, float32 on the CPU, are kept alive and read where they are
            in every forward pass: what is written to them afterwards is seen. So is memory that
            moves beneath all of them (``Module.share_memory``), and beneath any one in the next
            pass that computes more than one row of some sequence.

    Attributes:
        spec: as given.
        name: ``"fused_avx2"``; the last word is the instruction set.

    Raises ``ConfigError`` if the shapes do not fit each other, or a head is one that
    ``kernels.cpu`` cannot attend with.
    """

    def __init__(self, spec: DecoderSpec) -> None:
        self.spec = spec
        self.name = f"fused_{_core.attention_isa()}"
        self._weights = _tensors(spec)
        # A look at an address costs as much as a small product, so decodes look at one a layer.
        self._some_weights = [spec.embedding, *(layer.query.weight for layer in spec.layers)]
        self._connect()

    def _connect(self) -> None:
        """Note where the weights are. Raises ``ConfigError`` where one has no memory any more."""
        spec = self.spec
        addresses = [weight.data_ptr() for weight in self._weights]
        if not all(addresses):  # to the core, no address is no bias, or no norm
            shape = tuple(self._weights[addresses.index(0)].shape)
            raise ConfigError(f"a weight of shape {shape} has no memory: its storage was freed")
        self._addresses = addresses
        self._some_addresses = [weight.data_ptr() for weight in self._some_weights]
        self._core = _core.Decoder(
            layers=[_layer(layer, spec) for layer in spec.layers],
            ropes=[(table.data_ptr(), table.shape[0], table.shape[2]) for table in spec.ropes],
            hidden_size=spec.embedding.shape[1],
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            embedding=spec.embedding.data_ptr(),
            vocab_size=spec.embedding.shape[0],
            head=_weight(spec.head),
            final_norm=_norm(spec.final_norm, spec.embedding.shape[1]),
            activation=spec.activation,
            norms_whole_rows=_norms_whole_rows(spec),
            embedding_multiplier=spec.embedding_multiplier,
            residual_multiplier=spec.residual_multiplier,
            logit_multiplier=spec.logit_multiplier,
            logit_softcap=spec.logit_softcap,
        )

    @property
    def num_logits(self) -> int:
        """Width of a row of logits."""
        return self.spec.head.weight.shape[0]

    @property
    def scratch_bytes(self) -> int:
        """Memory that it works in; it grows with the largest batch so far."""
        return self._core.scratch_bytes

    def _follow(self, decodes: bool) -> None:
        """Find the weights again if their storage got other memory: theirs may be freed."""
        if decodes:
            moved = [w.data_ptr() for w in self._some_weights] != self._some_addresses
        else:
            moved = [w.data_ptr() for w in self._weights] != self._addresses
        if moved:
            self._connect()

    def forward(
        self,
        cache: DecoderCache,
        token_ids: Tensor,
        positions: Tensor,
        rows: Tensor,
        view: KVBatchView,
        logits: Tensor,
    ) -> None:
        """Compute packed rows, write their K and V to the cache, and logits of some of them.

        Args:
            cache: ``decoder_cache`` of the backend that ``view`` is of.
            token_ids, positions: int64 ``[view.cu_seqlens_q[-1]]``.
            rows: int64 ``[num_rows]``, ascending; those whose logits are wanted.
            view: where the batch lies.
            logits: float32 ``[num_rows, num_logits]`` to write to.

        Raises:
            ConfigError: a shape, dtype or index is out of range, or a weight's storage was freed;
                nothing was written.
        """
        num_tokens, num_rows = token_ids.numel(), rows.numel()
        for tensor in (token_ids, positions, rows):
            if tensor.dtype != torch.int64 or not tensor.is_contiguous() or not tensor.is_cpu:
                raise ConfigError(
                    f"token_ids, positions or rows are {tensor.dtype} on {tensor.device} with "
                    f"strides {tensor.stride()}, must be contiguous torch.int64 on cpu"
                )
        if positions.numel() != num_tokens:
            raise ConfigError(f"positions has {positions.numel()} entries, must be {num_tokens}")
        shape = (num_rows, self.num_logits)
        if logits.shape != shape or logits.dtype != torch.float32 or not logits.is_contiguous():
            raise ConfigError(
                f"logits is {logits.dtype} {tuple(logits.shape)}, must be contiguous torch.float32 "
                f"{shape}"
            )
        cu_seqlens_q, seqused_k, cache_batch_idx, block_table, num_seqs = batch_addresses(view)
        self._follow(decodes=num_tokens == num_seqs)
        self._core.forward(
            cache,
            token_ids.data_ptr(),
            positions.data_ptr(),
            num_tokens,
            rows.data_ptr(),
            num_rows,
            cu_seqlens_q,
            seqused_k,
            cache_batch_idx,
            block_table,
            num_seqs,
            logits.data_ptr(),
        )


def decoder_cache(layers: Sequence[tuple[Tensor, Tensor]]) -> DecoderCache:
    """K and V of each layer, as ``KVBackend.layer_views`` gives them. It does not keep them alive.

    Raises ``ConfigError`` unless they are float32 in CPU memory, their last dimension contiguous.
    """
    for views in layers:
        for view in views:
            if view.dtype != torch.float32 or not view.is_cpu or view.stride(-1) != 1:
                raise ConfigError(
                    f"the cache is {view.dtype} on {view.device} with strides {view.stride()}, "
                    "must be torch.float32 on cpu with stride 1 in its last dimension"
                )
    num_slots, num_rows = layers[0][0].shape[:2]
    return DecoderCache(
        layers=[(_rows(k), _rows(v)) for k, v in layers], num_slots=num_slots, num_rows=num_rows
    )


def _tensors(spec: DecoderSpec) -> list[Tensor]:
    """Every weight, bias and norm of a spec."""
    layers = [[getattr(layer, field.name) for field in fields(layer)] for layer in spec.layers]
    parts = [part for layer in layers for part in layer] + [spec.final_norm, spec.head]
    found = [spec.embedding]
    for part in parts:
        if isinstance(part, Norm):
            found.append(part.weight)
        elif isinstance(part, Projection):
            found.append(part.weight)
            if part.bias is not None:
                found.append(part.bias)
    return found


def _layer(layer: LayerSpec, spec: DecoderSpec) -> _core.DecoderLayer:
    hidden_size = spec.embedding.shape[1]
    num_normed, num_kv_normed = (
        (spec.num_heads, spec.num_kv_heads) if _norms_whole_rows(spec) else (1, 1)
    )
    return _core.DecoderLayer(
        query=_weight(layer.query),
        key=_weight(layer.key),
        value=_weight(layer.value),
        output=_weight(layer.output),
        gate=_weight(layer.gate),
        up=_weight(layer.up),
        down=_weight(layer.down),
        before_attention=_norm(layer.before_attention, hidden_size),
        after_attention=_norm(layer.after_attention, hidden_size),
        before_mlp=_norm(layer.before_mlp, hidden_size),
        after_mlp=_norm(layer.after_mlp, hidden_size),
        query_norm=_norm(layer.query_norm, num_normed * spec.head_dim),
        key_norm=_norm(layer.key_norm, num_kv_normed * spec.head_dim),
        softmax_scale=layer.softmax_scale,
        softcap=layer.softcap,
        window_left=-1 if layer.window is None else layer.window - 1,
        rope_idx=-1 if layer.rope_idx is None else layer.rope_idx,
    )


def _norms_whole_rows(spec: DecoderSpec) -> bool:
    norms = [layer.query_norm for layer in spec.layers if layer.query_norm is not None]
    return bool(norms) and norms[0].weight.numel() != spec.head_dim


def _weight(projection: Projection) -> _Weight:
    weight, bias = projection.weight, projection.bias
    out_features, in_features = weight.shape
    return (
        weight.data_ptr(),
        weight.stride(0),
        0 if bias is None else bias.data_ptr(),
        out_features,
        in_features,
    )


def _norm(norm: Norm | None, size: int) -> _Norm:
    if norm is None:
        return None
    if norm.weight.shape != (size,):
        raise ConfigError(f"a norm has shape {tuple(norm.weight.shape)}, must be ({size},)")
    return norm.weight.data_ptr(), norm.eps, norm.offset


def _rows(cache: Tensor) -> _Rows:
    slot_stride, row_stride, head_stride, _ = cache.stride()
    return cache.data_ptr(), slot_stride, row_stride, head_stride
