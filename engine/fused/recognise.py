"""Tells whether the fused decoder computes what a model computes, and from which weights.

Owns: nothing.  Thread-safety: stateless; the model must not be in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from ...kernels.decoder_spec import Activation, DecoderSpec, LayerSpec, Norm, Projection
from ..kv_attention import LayerAttention
from .errors import NotRecognisedError
from .families import Family, family_of
from .parts import (
    check_dropout,
    check_no_global_hooks,
    check_untouched,
    split_projection,
    take_activation,
    take_children,
    take_norm,
    take_projection,
    take_tensor,
)
from .rotary import RopeTables

_MODEL: Final = frozenset({"embed_tokens", "layers", "norm", "rotary_emb"})
_PARTS: Final = frozenset({"self_attn", "mlp"})
_NORMS_BEFORE: Final = _PARTS | {"input_layernorm", "post_attention_layernorm"}
_NORMS_AFTER: Final = _PARTS | {"post_attention_layernorm", "post_feedforward_layernorm"}
_NORMS_AROUND: Final = _NORMS_BEFORE | _NORMS_AFTER | {"pre_feedforward_layernorm"}
_DROPOUTS: Final = frozenset({"resid_attn_dropout", "resid_mlp_dropout"})
"""Without effect outside training."""
_SEPARATE_HEADS: Final = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_NORMED_HEADS: Final = _SEPARATE_HEADS | {"q_norm", "k_norm"}
_PACKED_HEADS: Final = frozenset({"qkv_proj", "o_proj"})
_SEPARATE_GATE: Final = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})
_PACKED_GATE: Final = frozenset({"gate_up_proj", "down_proj", "activation_fn"})


def recognise(
    model: Any, attention: Sequence[LayerAttention], num_positions: int
) -> DecoderSpec | str:
    """What a fused decoder must compute in a model's place, or why it cannot.

    Args:
        model: a causal language model, in eval mode, its rope pinned.
        attention: what each of its layers asked of attention.
        num_positions: most tokens of a sequence.
    """
    family = family_of(model)
    if family is None:
        return f"{type(model).__name__} is not among the module graphs it knows"
    try:
        check_no_global_hooks()
        check_untouched(model, type(model).__name__)
        return _Reader(model, family, attention, num_positions).read()
    except NotRecognisedError as error:
        return str(error)


@dataclass(frozen=True, slots=True)
class _Mlp:
    gate: Projection
    up: Projection
    down: Projection
    activation: Activation


class _Reader:
    """Reads one model.

    Raises ``NotRecognisedError``.
    """

    def __init__(
        self, model: Any, family: Family, attention: Sequence[LayerAttention], num_positions: int
    ) -> None:
        self._causal = model
        self._model: Any = model.model
        if not family.is_class(self._model, family.model):
            raise NotRecognisedError(f"its decoder is a {type(self._model).__name__}")
        take_children(self._model, "model", _MODEL)
        self._config = self._model.config
        self._family = family
        self._attention = attention
        first = attention[0]
        self._num_heads, self._num_kv_heads = first.num_heads, first.num_kv_heads
        self._head_dim = first.k_head_dim
        self._hidden_size = int(self._config.hidden_size)
        self._ropes = RopeTables(self._model.rotary_emb, family, num_positions)

    def read(self) -> DecoderSpec:
        embedding = self._model.embed_tokens
        if not self._family.is_embedding(embedding) or embedding.max_norm is not None:
            raise NotRecognisedError(f"embed_tokens is a {type(embedding).__name__}")
        check_untouched(embedding, "embed_tokens")
        if len(self._model.layers) != len(self._attention):
            raise NotRecognisedError(
                f"{len(self._attention)} of {len(self._model.layers)} layers are in use"
            )
        mlps, layers = [], []
        for layer_idx, layer in enumerate(self._model.layers):
            if not self._family.is_class(layer, "DecoderLayer"):
                raise NotRecognisedError(f"layers[{layer_idx}] is a {type(layer).__name__}")
            mlps.append(self._read_mlp(layer.mlp, f"layers[{layer_idx}].mlp"))
            layers.append(self._read_layer(layer, layer_idx, mlps[-1]))
        activations = {mlp.activation for mlp in mlps}
        if len(activations) > 1:
            raise NotRecognisedError("its layers have different activations")
        weight = take_tensor(embedding, "weight", "embed_tokens")
        if weight.shape[1] != self._hidden_size or not weight.is_contiguous():
            raise NotRecognisedError(f"embed_tokens has shape {tuple(weight.shape)}")
        return DecoderSpec(
            num_heads=self._num_heads,
            num_kv_heads=self._num_kv_heads,
            head_dim=self._head_dim,
            embedding=weight,
            embedding_multiplier=self._embedding_multiplier(),
            layers=tuple(layers),
            activation=activations.pop(),
            residual_multiplier=float(getattr(self._config, "residual_multiplier", 1.0)),
            final_norm=self._norm(self._model.norm, "norm", self._hidden_size),
            head=take_projection(self._causal.lm_head, "lm_head", self._hidden_size),
            logit_multiplier=1.0 / float(getattr(self._config, "logits_scaling", 1.0)),
            logit_softcap=float(getattr(self._config, "final_logit_softcapping", None) or 0.0),
            ropes=tuple(self._ropes.tables),
        )

    def _embedding_multiplier(self) -> float:
        scale = getattr(self._model.embed_tokens, "embed_scale", 1.0)
        if isinstance(scale, torch.Tensor):
            scale = scale.to(torch.float32).item()
        return float(scale) * float(getattr(self._config, "embedding_multiplier", 1.0))

    def _norm(self, module: Any, name: str, size: int) -> Norm:
        return take_norm(module, name, size, self._family)

    def _read_layer(self, layer: Any, layer_idx: int, mlp: _Mlp) -> LayerSpec:
        name = f"layers[{layer_idx}]"
        layout = take_children(
            layer, name, _NORMS_BEFORE, _NORMS_AFTER, _NORMS_AROUND, ignored=_DROPOUTS
        )
        for child in _DROPOUTS:
            if hasattr(layer, child):
                check_dropout(getattr(layer, child), f"{name}.{child}")
        asked = self._attention[layer_idx]
        shape = (asked.num_heads, asked.num_kv_heads, asked.k_head_dim, asked.v_head_dim)
        if shape != (self._num_heads, self._num_kv_heads, self._head_dim, self._head_dim):
            raise NotRecognisedError(f"{name} has other heads than the keys of layers[0]")
        if asked.has_sinks:
            raise NotRecognisedError(f"{name} has attention sinks")

        def norm(child: str, *layouts: frozenset[str]) -> Norm | None:
            if layout not in layouts:
                return None
            return self._norm(getattr(layer, child), f"{name}.{child}", self._hidden_size)

        query, key, value, output = self._read_heads(layer.self_attn, f"{name}.self_attn")
        query_norm, key_norm = self._read_head_norms(layer.self_attn, f"{name}.self_attn")
        return LayerSpec(
            query=query,
            key=key,
            value=value,
            output=output,
            gate=mlp.gate,
            up=mlp.up,
            down=mlp.down,
            before_attention=norm("input_layernorm", _NORMS_BEFORE, _NORMS_AROUND),
            after_attention=norm("post_attention_layernorm", _NORMS_AFTER, _NORMS_AROUND),
            before_mlp=norm("post_attention_layernorm", _NORMS_BEFORE)
            or norm("pre_feedforward_layernorm", _NORMS_AROUND),
            after_mlp=norm("post_feedforward_layernorm", _NORMS_AFTER, _NORMS_AROUND),
            query_norm=query_norm,
            key_norm=key_norm,
            softmax_scale=asked.softmax_scale,
            softcap=asked.softcap,
            window=asked.window,
            rope_idx=self._rope_idx(layer.self_attn, layer_idx),
        )

    def _rope_idx(self, attention: Any, layer_idx: int) -> int | None:
        if not getattr(attention, "use_rope", True):
            return None
        layer_types = getattr(self._config, "layer_types", None)
        return self._ropes.index_of(layer_types[layer_idx] if layer_types else None)

    def _read_heads(self, module: Any, name: str) -> tuple[Projection, ...]:
        if not self._family.is_class(module, "Attention"):
            raise NotRecognisedError(f"{name} is a {type(module).__name__}")
        layout = take_children(module, name, _SEPARATE_HEADS, _NORMED_HEADS, _PACKED_HEADS)
        query_size, kv_size = self._num_heads * self._head_dim, self._num_kv_heads * self._head_dim
        sizes = (query_size, kv_size, kv_size)

        def take(child: str, in_features: int, out_features: int) -> Projection:
            return take_projection(
                getattr(module, child), f"{name}.{child}", in_features, out_features
            )

        output = take("o_proj", query_size, self._hidden_size)
        if layout == _PACKED_HEADS:
            packed = take("qkv_proj", self._hidden_size, sum(sizes))
            return (*split_projection(packed, sizes), output)
        parts = zip(("q_proj", "k_proj", "v_proj"), sizes, strict=True)
        return (*(take(child, self._hidden_size, size) for child, size in parts), output)

    def _read_head_norms(self, module: Any, name: str) -> tuple[Norm | None, Norm | None]:
        if not hasattr(module, "q_norm"):
            return None, None
        weight = getattr(module.q_norm, "weight", None)
        is_whole = weight is not None and weight.numel() != self._head_dim
        sizes = (self._num_heads, self._num_kv_heads) if is_whole else (1, 1)
        query_norm, key_norm = (
            self._norm(getattr(module, child), f"{name}.{child}", count * self._head_dim)
            for child, count in zip(("q_norm", "k_norm"), sizes, strict=True)
        )
        return query_norm, key_norm

    def _read_mlp(self, module: nn.Module, name: str) -> _Mlp:
        if not self._family.is_class(module, "MLP"):
            raise NotRecognisedError(f"{name} is a {type(module).__name__}")
        layout = take_children(module, name, _SEPARATE_GATE, _PACKED_GATE)
        any_module: Any = module
        if layout == _PACKED_GATE:
            packed = take_projection(
                any_module.gate_up_proj, f"{name}.gate_up_proj", self._hidden_size
            )
            width = packed.weight.shape[0] // 2
            gate, up = split_projection(packed, (width, width))
            activation = take_activation(any_module.activation_fn, f"{name}.activation_fn")
        else:
            gate = take_projection(any_module.gate_proj, f"{name}.gate_proj", self._hidden_size)
            width = gate.weight.shape[0]
            up = take_projection(any_module.up_proj, f"{name}.up_proj", self._hidden_size, width)
            activation = take_activation(any_module.act_fn, f"{name}.act_fn")
        down = take_projection(any_module.down_proj, f"{name}.down_proj", width, self._hidden_size)
        return _Mlp(gate, up, down, activation)
