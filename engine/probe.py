"""Admits a model only after it has been seen to behave: the load probe.

Owns: nothing.  Thread-safety: stateless; the model must not be in use.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import LayerKVSpec
from ..errors import VmallocError
from ..kernels.cpu import HEAD_DIM_MULTIPLE, MAX_HEAD_DIM
from .cache_factory import CacheFactory
from .errors import UnsupportedModelError
from .kv_attention import (
    ATTENTION_NAME,
    AttentionCall,
    LayerAttention,
    attention_through,
    register_attention,
)
from .model_loader import text_config, vocab_size
from .packed_forward import MakeForward, PackedForward
from .tensor_parallel.rank_share import share_of
from .trial import run_trial

SUPPORTED_LAYER_TYPES = ("full_attention", "sliding_attention")
PROBE_LENGTHS = (11, 7)
"""Tokens of the two sequences that are packed together."""
PROBE_FIRST_CHUNKS = (6, 7)
"""Tokens of each that the first step computes; the second step computes the rest."""
RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Allowed difference of packed logits, as a share of the reference's largest logit."""


@dataclass(frozen=True, slots=True)
class ProbedModel:
    """What the probe learned.

    Attributes:
        layers: what each decoder layer stores, as seen at the attention function.
        num_heads: query heads of the first layer.
        attention: how each layer attends.
        logits: what ``probe_logits`` gave for it.
        max_error: largest difference of a packed logit from the model's own eager attention,
            as a share of the largest logit.
    """

    layers: tuple[LayerKVSpec, ...]
    num_heads: int
    attention: tuple[LayerAttention, ...]
    logits: tuple[Tensor, ...]
    max_error: float


def probe_model(model: torch.nn.Module, caches: CacheFactory) -> ProbedModel:
    """Check that ``model`` runs packed batches over a KV cache just as it runs alone.

    ``caches`` makes the cache, and is on the model's device.

    Leaves the model with our attention switched on. Raises ``UnsupportedModelError`` naming the
    failed check; the model's attention is then as before.
    """
    any_model: Any = model
    before = own_attention(model)
    register_attention()
    try:
        _check_architecture(any_model)
        reference = _eager_logits(any_model)
        _switch_attention(any_model, ATTENTION_NAME)
        layers, attention = _observe_layers(any_model)
        num_heads = attention[0].num_heads
        with _refusing(model, "packed forward"):
            logits = probe_logits(model, layers, num_heads, partial(PackedForward, model), caches)
        max_error = _compare(model, logits, reference)
    except BaseException:
        restore_attention(model, before)
        raise
    return ProbedModel(layers, num_heads, attention, tuple(logits), max_error)


def probe_logits(
    model: torch.nn.Module,
    layers: tuple[LayerKVSpec, ...],
    num_heads: int,
    make_forward: MakeForward,
    caches: CacheFactory,
) -> list[Tensor]:
    """Pack two sequences, in two steps, over a real cache; logits at the end of each."""
    prompts = [_probe_token_ids(model, which) for which in range(len(PROBE_LENGTHS))]
    return run_trial(
        make_forward, layers, num_heads, prompts, caches, first_chunks=list(PROBE_FIRST_CHUNKS)
    )


def relative_difference(logits: Tensor, reference: Tensor) -> float:
    """The largest difference, as a share of the reference's largest logit."""
    return float((logits - reference).abs().max() / reference.abs().max().clamp(min=1e-6))


def observe_outline(model: torch.nn.Module) -> tuple[tuple[LayerKVSpec, ...], int]:
    """What each layer of a model on the meta device would store, and its query heads.

    Makes those checks of the probe that need no weights, and raises ``UnsupportedModelError`` as it
    does. Leaves the model with our attention switched on.
    """
    any_model: Any = model
    register_attention()
    _check_architecture(any_model)
    _switch_attention(any_model, ATTENTION_NAME)
    layers, attention = _observe_layers(any_model)
    return layers, attention[0].num_heads


def own_attention(model: torch.nn.Module) -> str | None:
    """Name of the attention a model has of its own, to be restored later."""
    any_model: Any = model
    name: str | None = getattr(any_model.config, "_attn_implementation", None)
    # A copy of a model in use carries our name, and no engine answers it there.
    return "eager" if name == ATTENTION_NAME else name


def restore_attention(model: torch.nn.Module, name: str | None) -> None:
    """Give a model back the attention it came with."""
    any_model: Any = model
    if name is not None and getattr(any_model.config, "_attn_implementation", None) != name:
        any_model.set_attn_implementation(name)


def _check_architecture(model: Any) -> None:
    config = text_config(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise _refusal(model, "architecture", f"{type(model.config).__name__} is encoder-decoder")
    if model.get_output_embeddings() is None:
        raise _refusal(model, "architecture", "it has no language-model head")
    if getattr(model, "_is_stateful", False):
        raise _refusal(
            model, "architecture", "its recurrent state would leak between packed sequences"
        )
    if not model._can_set_attn_implementation():
        raise _refusal(
            model,
            "attention interface",
            "its attention does not go through transformers' AttentionInterface",
        )
    parameters = inspect.signature(model.forward).parameters
    missing = [name for name in ("input_ids", "position_ids") if name not in parameters]
    if missing:
        raise _refusal(
            model,
            "position ids",
            f"forward() does not take {' and '.join(missing)}, so packed sequences cannot be told "
            "their positions",
        )
    for idx, layer_type in enumerate(getattr(config, "layer_types", None) or ()):
        if layer_type not in SUPPORTED_LAYER_TYPES:
            raise _refusal(
                model,
                "layer types",
                f"layer {idx} is {layer_type!r}; supported: {', '.join(SUPPORTED_LAYER_TYPES)}",
            )


def _switch_attention(model: Any, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise _refusal(model, "attention interface", str(error)) from error


def _probe_token_ids(model: Any, which: int) -> list[int]:
    limit = vocab_size(model)
    return [(5 + 37 * which + 101 * idx) % limit for idx in range(PROBE_LENGTHS[which])]


def _as_input(model: Any, token_ids: list[int]) -> Tensor:
    """``[1, num_tokens]`` on the model's device."""
    return torch.tensor([token_ids], device=next(model.parameters()).device)


@torch.inference_mode()
def _eager_logits(model: Any) -> list[Tensor]:
    """Logits ``[vocab_size]`` at each sequence's end, alone, under the model's own attention."""
    _switch_attention(model, "eager")
    logits = []
    for which in range(len(PROBE_LENGTHS)):
        input_ids = _as_input(model, _probe_token_ids(model, which))
        with _refusing(model, "eager forward"):
            logits.append(model(input_ids=input_ids, use_cache=False).logits[0, -1].float().cpu())
    return logits


@torch.inference_mode()
def _observe_layers(model: Any) -> tuple[tuple[LayerKVSpec, ...], tuple[LayerAttention, ...]]:
    """Run one sequence and note what reaches the attention function."""
    calls: list[AttentionCall] = []

    def record(call: AttentionCall) -> Tensor:
        calls.append(call)
        return call.query.new_zeros(*call.query.shape[:2], call.value.shape[2])

    token_ids = _as_input(model, _probe_token_ids(model, 0))
    positions = torch.arange(token_ids.shape[1], device=token_ids.device).unsqueeze(0)
    with _refusing(model, "packed forward"), attention_through(record):
        model(input_ids=token_ids, position_ids=positions, use_cache=False)
    config = text_config(model)
    expected = list(range(config.num_hidden_layers))
    seen = [call.layer_idx for call in calls]
    if seen != expected:
        raise _refusal(
            model,
            "attention calls",
            f"each of {len(expected)} layers should call attention once, in order; "
            f"the calls came from layers {seen}",
        )
    layers = tuple(_layer_spec(model, config, call) for call in calls)
    return layers, tuple(map(LayerAttention.of, calls))


def _layer_spec(model: Any, config: Any, call: AttentionCall) -> LayerKVSpec:
    where = f"layer {call.layer_idx}"
    num_rows, num_kv_heads, k_head_dim = call.key.shape
    v_head_dim = call.value.shape[2]
    if num_rows != PROBE_LENGTHS[0] or call.query.shape[0] != num_rows:
        raise _refusal(model, "attention shapes", f"{where} brought {num_rows} keys")
    for head_dim in (k_head_dim, v_head_dim) if call.key.is_cpu else ():
        if head_dim % HEAD_DIM_MULTIPLE or head_dim > MAX_HEAD_DIM:
            raise _refusal(
                model,
                "head_dim",
                f"{where} has head_dim {head_dim}; it must be a multiple of {HEAD_DIM_MULTIPLE}, "
                f"at most {MAX_HEAD_DIM}",
            )
    _check_declared(model, config, call)
    dtype = str(call.key.dtype).removeprefix("torch.")
    if call.key.dtype not in RELATIVE_TOLERANCE:
        raise _refusal(model, "dtype", f"{where} brought keys in {dtype}")
    return LayerKVSpec(
        num_kv_heads=num_kv_heads,
        k_head_dim=k_head_dim,
        v_head_dim=v_head_dim,
        dtype=dtype,
        window=call.window,
    )


def _check_declared(model: Any, config: Any, call: AttentionCall) -> None:
    """Compare what was seen with what the config declares, where it declares it."""
    num_heads, num_kv_heads = call.query.shape[1], call.key.shape[1]
    if num_heads % num_kv_heads:
        raise _refusal(
            model, "attention shapes", f"{num_heads} query heads over {num_kv_heads} KV heads"
        )
    # Latent attention calls its rotary part head_dim, and the whole key qk_head_dim.
    dim_name = "qk_head_dim" if hasattr(config, "qk_head_dim") else "head_dim"
    share = share_of(model)
    for name, seen in (("num_key_value_heads", num_kv_heads), (dim_name, call.key.shape[2])):
        declared = _declared(config, name)
        if share is not None and name == "num_key_value_heads" and isinstance(declared, int):
            declared = share.num_kv_heads(declared)
        if isinstance(declared, int) and declared != seen:
            raise _refusal(
                model,
                "attention shapes",
                f"layer {call.layer_idx} is declared with {name} {declared} and brought {seen}",
            )
    layer_types = getattr(config, "layer_types", None)
    window = _declared(config, "sliding_window")
    if layer_types is not None and layer_types[call.layer_idx] != "sliding_attention":
        window = None
    if window != call.window:
        raise _refusal(
            model,
            "sliding window",
            f"layer {call.layer_idx} is declared with window {window} and asked for {call.window}",
        )


def _declared(config: Any, name: str) -> Any:
    """What the config says for all layers; None where it says nothing, or it differs by layer."""
    try:
        return getattr(config, name, None)
    except Exception as error:
        # Configs with values per layer refuse to name one; the class is not public.
        if "PerLayer" not in type(error).__name__:
            raise
        return None


def _compare(model: Any, logits: list[Tensor], reference: list[Tensor]) -> float:
    """The largest relative difference from each sequence alone."""
    tolerance = RELATIVE_TOLERANCE[next(model.parameters()).dtype]
    max_error = 0.0
    for which, (packed, alone) in enumerate(zip(logits, reference, strict=True)):
        difference = relative_difference(packed, alone)
        if not difference <= tolerance:
            raise _refusal(
                model,
                "packed logits",
                f"sequence {which} of a packed batch differs from itself run alone under eager "
                f"attention by {difference:.1e} of the largest logit; allowed: {tolerance:.0e}",
            )
        max_error = max(max_error, difference)
    return max_error


@contextmanager
def _refusing(model: Any, check: str) -> Iterator[None]:
    """Turn whatever a forward pass raises into a refusal that names ``check``.

    Our own attention function speaks as a plain ``VmallocError``: its reason is the refusal's.
    """
    try:
        yield
    except Exception as error:
        if type(error) is VmallocError:
            raise _refusal(model, "attention arguments", str(error)) from error
        raise _refusal(model, check, f"{type(error).__name__}: {error}") from error


def _refusal(model: Any, check: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(type(model).__name__, check, reason)
