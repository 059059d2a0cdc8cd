"""What a fused decoder computes, as the tensors and numbers of one model.

Owns: nothing but references to the model's weights.  Thread-safety: immutable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class Projection:
    """``y = x @ weight.T + bias``.

    Attributes:
        weight: ``[out_features, in_features]``, rows contiguous.
        bias: ``[out_features]``, or None.
    """

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """``y = x / sqrt(mean(x * x) + eps) * (weight + offset)``.

    Attributes:
        weight: ``[size]``.
        eps, offset: as above.
    """

    weight: Tensor
    eps: float
    offset: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer; norms that it does not have are None.

    Attributes:
        query, key, value, output: of attention.
        gate, up, down: of the MLP.
        before_attention, before_mlp: norms of what they read.
        after_attention, after_mlp: norms of what they add to the hidden row.
        query_norm, key_norm: before the rotation, of each head or of all heads together.
        softmax_scale: factor on the scores.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0.0 leaves them.
        window: tokens a row looks back, itself included, or None.
        rope_idx: which of the model's rotary tables; None: no rotation.
    """

    query: Projection
    key: Projection
    value: Projection
    output: Projection
    gate: Projection
    up: Projection
    down: Projection
    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None
    query_norm: Norm | None
    key_norm: Norm | None
    softmax_scale: float
    softcap: float
    window: int | None
    rope_idx: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """A whole decoder.

    Attributes:
        num_heads, num_kv_heads, head_dim: the same in every layer.
        embedding: ``[vocab_size, hidden_size]``.
        embedding_multiplier: of its rows.
        layers: first to last.
        activation: of the gate.
        residual_multiplier: of what attention and MLP add to the hidden row.
        final_norm: of the last hidden row.
        head: from hidden rows to logits.
        logit_multiplier: of the logits.
        logit_softcap: logits become ``softcap * tanh(logit / softcap)``; 0.0 leaves them.
        ropes: ``[num_positions, 2, half]`` cosines and sines of each rotary table, by position.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    embedding: Tensor
    embedding_multiplier: float
    layers: tuple[LayerSpec, ...]
    activation: Activation
    residual_multiplier: float
    final_norm: Norm
    head: Projection
    logit_multiplier: float
    logit_softcap: float
    ropes: tuple[Tensor, ...]
