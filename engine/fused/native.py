"""The fused decoder of the core over one model's weights, and its view of a KV cache.

Owns: the core's decoder with its scratch memory; keeps the weights alive that it reads in place.
Thread-safety: one forward pass at a time.
"""

from __future__ import annotations

from torch import Tensor

from ... import _core
from ...backend import KVBackend
from .spec import DecoderSpec, LayerSpec, Norm, Projection

_Weight = tuple[int, int, int, int, int]
_Norm = tuple[int, float, float] | None
_Rows = tuple[int, int, int, int]


class NativeDecoder:
    """Computes what a spec says.

    Args:
        spec: the decoder. Its tensors are read where they are in every forward pass, so a change
            in place is seen; tensors that take their place in the model are not.

    Raises ``ConfigError`` if the shapes do not fit each other.
    """

    def __init__(self, spec: DecoderSpec) -> None:
        self.spec = spec
        self.core = _core.Decoder(
            layers=[_layer(layer) for layer in spec.layers],
            ropes=[(table.data_ptr(), table.shape[0], table.shape[2]) for table in spec.ropes],
            hidden_size=spec.embedding.shape[1],
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            embedding=spec.embedding.data_ptr(),
            vocab_size=spec.embedding.shape[0],
            head=_weight(spec.head),
            final_norm=_norm(spec.final_norm),
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


def cache_of(backend: KVBackend) -> _core.DecoderCache:
    """Where a backend keeps K and V. The addresses are reserved until it is closed."""
    views = [backend.layer_views(idx) for idx in range(len(backend.config.layers))]
    num_slots, num_rows = views[0][0].shape[:2]
    return _core.DecoderCache(
        layers=[(_rows(k), _rows(v)) for k, v in views], num_slots=num_slots, num_rows=num_rows
    )


def _layer(layer: LayerSpec) -> _core.DecoderLayer:
    return _core.DecoderLayer(
        query=_weight(layer.query),
        key=_weight(layer.key),
        value=_weight(layer.value),
        output=_weight(layer.output),
        gate=_weight(layer.gate),
        up=_weight(layer.up),
        down=_weight(layer.down),
        before_attention=_norm(layer.before_attention),
        after_attention=_norm(layer.after_attention),
        before_mlp=_norm(layer.before_mlp),
        after_mlp=_norm(layer.after_mlp),
        query_norm=_norm(layer.query_norm),
        key_norm=_norm(layer.key_norm),
        softmax_scale=layer.softmax_scale,
        softcap=layer.softcap,
        window_left=-1 if layer.window is None else layer.window - 1,
        rope_idx=-1 if layer.rope_idx is None else layer.rope_idx,
    )


def _norms_whole_rows(spec: DecoderSpec) -> bool:
    norm = spec.layers[0].query_norm
    return norm is not None and norm.weight.numel() != spec.head_dim


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


def _norm(norm: Norm | None) -> _Norm:
    return None if norm is None else (norm.weight.data_ptr(), norm.eps, norm.offset)


def _rows(cache: Tensor) -> _Rows:
    slot_stride, row_stride, head_stride, _ = cache.stride()
    return cache.data_ptr(), slot_stride, row_stride, head_stride
