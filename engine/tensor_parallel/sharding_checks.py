"""Tells from a model's config alone whether it can be sharded over so many ranks.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

from typing import Any

import transformers

from ...errors import ConfigError
from ..errors import UnsupportedModelError

PLAN_CHECK = "tensor parallel plan"
"""Name of the check, as ``UnsupportedModelError`` gives it."""

EXACT_STYLES = frozenset(
    {
        "colwise",
        "rowwise",
        "colwise_gather_output",
        "rowwise_split_input",
        "embedding_rowwise",
        "packed_colwise",
        "moe_tp_experts",
        "moe_identity_expert",
        "mla_kv_a_proj",
        "replicated_with_grad_allreduce",
    }
)
"""How a plan may shard a module: ways that were seen to give the logits of the whole model."""

_PACKED_PROJECTIONS = frozenset({"qkv_proj", "query_key_value", "kv_b_proj"})
_KEY_PROJECTIONS = frozenset({"k_proj"}) | _PACKED_PROJECTIONS
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
"""Config entries that a plan cuts in equal parts."""


def check_shardable(name: str, hf_config: Any, size: int) -> None:
    """Raise unless a model can be sharded over ``size`` ranks; takes milliseconds.

    Args:
        name: of the model, for the error.
        hf_config: its transformers config.
        size: ranks.

    Raises ``UnsupportedModelError`` for a model that transformers has no plan for or whose plan
    cannot be followed exactly, and ``ConfigError`` for a number of ranks that does not fit.
    """
    if size == 1:
        return
    config = hf_config.get_text_config(decoder=True)
    plan = sharding_plan(name, hf_config)
    num_heads = _number(name, config, "num_attention_heads") or 0
    if size > num_heads:
        raise ConfigError(
            f"tensor_parallel_size is {size}; {name!r} has {num_heads} attention heads, and each "
            "rank needs one"
        )
    _check_division(name, "num_attention_heads", num_heads, size)
    if not has_whole_heads(plan):
        num_kv_heads = _number(name, config, "num_key_value_heads") or num_heads
        _check_kv_heads(name, num_kv_heads, plan, size)
    for entry in _WIDTHS:
        widths = _entry(config, entry)
        for width in set(widths) if isinstance(widths, tuple) else {widths}:
            if width:
                _check_division(name, entry, width, size)


def sharding_plan(name: str, hf_config: Any) -> dict[str, str]:
    """How transformers shards a model: styles by pattern of its module names.

    Raises ``UnsupportedModelError`` where there is no plan, or one that is not known to be exact.
    """
    config = hf_config.get_text_config(decoder=True)
    plan: dict[str, str] = dict(getattr(config, "base_model_tp_plan", None) or {})
    what = type(config).__name__
    if not plan:
        raise UnsupportedModelError(
            name, PLAN_CHECK, f"transformers {transformers.__version__} has none for {what}"
        )
    if getattr(hf_config, "quantization_config", None) is not None:
        raise UnsupportedModelError(name, PLAN_CHECK, "its weights are quantised")
    for module, style in plan.items():
        if style not in EXACT_STYLES:
            known = ", ".join(sorted(EXACT_STYLES))
            raise UnsupportedModelError(
                name, PLAN_CHECK, f"{module} of {what} is sharded as {style!r}; supported: {known}"
            )
    return plan


def has_whole_heads(plan: dict[str, str]) -> bool:
    """Whether every rank computes all heads under ``plan``."""
    return not any(
        style == "colwise" and leaf(module) in _KEY_PROJECTIONS for module, style in plan.items()
    )


def leaf(module: str) -> str:
    """``"q_proj"`` of ``"layers.*.self_attn.q_proj"``."""
    return module.rpartition(".")[2]


def _entry(config: Any, entry: str) -> Any:
    """What a config says; None where it says nothing, a tuple where it differs between layers."""
    try:
        value = getattr(config, entry, None)
    except Exception as error:
        # Configs with values per layer refuse to name one; the class is not public.
        if "PerLayer" not in type(error).__name__:
            raise
        layers = range(config.num_hidden_layers)
        return tuple(getattr(config.per_layer_config[idx], entry, None) for idx in layers)
    return tuple(value) if isinstance(value, list) else value


def _number(name: str, config: Any, entry: str) -> int | None:
    """A config entry that must be the same in all layers; None where there is none."""
    value = _entry(config, entry)
    if value is None or isinstance(value, int):
        return value
    raise UnsupportedModelError(
        name, PLAN_CHECK, f"{entry} is {value}; it must be the same in all layers"
    )


def _check_kv_heads(name: str, num_kv_heads: int, plan: dict[str, str], size: int) -> None:
    if num_kv_heads % size == 0:
        return
    if size % num_kv_heads:
        raise ConfigError(
            f"tensor_parallel_size is {size}; {name!r} has {num_kv_heads} KV heads, and one number "
            "must be a multiple of the other"
        )
    for module, style in plan.items():
        if style == "colwise" and leaf(module) in _PACKED_PROJECTIONS:
            raise UnsupportedModelError(
                name,
                PLAN_CHECK,
                f"{module} packs {num_kv_heads} KV heads with others, so {size} ranks cannot have "
                "one each",
            )


def _check_division(name: str, entry: str, value: int, size: int) -> None:
    if value % size:
        raise ConfigError(
            f"tensor_parallel_size is {size}; {name!r} has {entry} {value}, which must be a "
            "multiple of it"
        )
