"""What one rank would hold of a model, told from the model's outline alone.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...config import LayerKVSpec
from .rank_join import check_devices
from .rank_share import RankShare
from .sharding_checks import check_shardable, has_whole_heads, leaf

_WHOLE_STYLES = frozenset(
    {"moe_identity_expert", "mla_kv_a_proj", "replicated_with_grad_allreduce"}
)
"""Styles under which every rank has the whole of a module."""

_ROW_STYLES = frozenset({"rowwise", "rowwise_split_input"})
"""Styles that leave a bias whole."""

_KV_PROJECTIONS = frozenset({"k_proj", "v_proj"})


@dataclass(frozen=True, slots=True)
class RankOutline:
    """One rank's share.

    Attributes:
        layers: what each decoder layer stores for a token here.
        num_heads: query heads of a layer that are computed here.
        weight_bytes: parameters here, as the plan says; what transformers makes of it may differ
            by little.
    """

    layers: tuple[LayerKVSpec, ...]
    num_heads: int
    weight_bytes: int


def outline_rank(
    name: str,
    outline: Any,
    layers: Sequence[LayerKVSpec],
    num_heads: int,
    size: int,
    device: torch.device,
) -> RankOutline:
    """The share that each of ``size`` ranks has of a model.

    Args:
        name: of the model, for errors.
        outline: the whole model without weights.
        layers, num_heads: what its layers store for a token, and their query heads.
        size: ranks; 1 is the whole model.
        device: a device of the kind that the ranks compute on.

    Raises as ``check_shardable`` and ``check_devices`` do.
    """
    weights = sum(parameter.nbytes for parameter in outline.parameters())
    if size == 1:
        return RankOutline(tuple(layers), num_heads, weights)
    check_devices(size, device.type)
    check_shardable(name, outline.config, size)
    plan: dict[str, str] = dict(outline.tp_plan)
    share = RankShare(0, size, has_whole_heads(plan))
    own = tuple(
        replace(spec, num_kv_heads=share.num_kv_heads(spec.num_kv_heads)) for spec in layers
    )
    num_kv_heads = max(spec.num_kv_heads for spec in layers)
    weights = sum(
        parameter.nbytes // _num_parts(key, parameter, plan, min(size, num_kv_heads), size)
        for key, parameter in outline.named_parameters()
    )
    return RankOutline(own, num_heads if share.has_whole_heads else num_heads // size, weights)


def _num_parts(
    key: str, parameter: torch.Tensor, plan: dict[str, str], num_kv_parts: int, size: int
) -> int:
    """In how many parts a parameter is cut."""
    pattern = re.sub(r"\.\d+(?=\.|$)", ".*", key)
    module, _, kind = pattern.rpartition(".")
    style = plan.get(pattern, plan.get(module))
    if style is None or style in _WHOLE_STYLES or (kind == "bias" and style in _ROW_STYLES):
        return 1
    if leaf(module) in _KV_PROJECTIONS:
        return num_kv_parts
    is_cut = any(length % size == 0 for length in parameter.shape)
    return size if is_cut else 1
