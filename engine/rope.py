"""Pins rotary embeddings whose frequencies would follow the longest sequence of a batch.

Left alone, "longrope" and "dynamic" make batch mates change each other's output: transformers
chooses the frequencies of a whole forward pass by its largest position.
Owns: nothing; changes the rotary modules it is given.  Thread-safety: none.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .errors import UnsupportedModelError

PINNED = "vmalloc_pinned"
"""Rope type of a pinned module: transformers does not know it, and updates no frequencies."""


class RopePin:
    """What ``pin_rope`` changed, and the way back."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, str, Any]] = []

    def change(self, module: Any, name: str, value: Any) -> None:
        """Set an attribute or buffer and remember what was there."""
        self._before.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def restore(self) -> None:
        """Undo every change. Idempotent."""
        while self._before:
            module, name, value = self._before.pop()
            setattr(module, name, value)


def pin_rope(model: torch.nn.Module, max_model_len: int) -> RopePin:
    """Fix every rotary module of ``model`` for sequences of up to ``max_model_len`` tokens.

    longrope takes its long factors if ``max_model_len`` exceeds the original context, else its
    short ones. dynamic takes its original frequencies. Raises ``UnsupportedModelError`` where
    dynamic frequencies would have to grow; nothing is changed then.
    """
    pin = RopePin()
    try:
        for module in model.modules():
            rope_type = getattr(module, "rope_type", None)
            if isinstance(rope_type, str):
                pinned = _pin(model, module, None, rope_type, max_model_len, pin)
                pin.change(module, "rope_type", pinned)
            elif isinstance(rope_type, dict):
                by_layer_type = {
                    layer_type: _pin(model, module, layer_type, name, max_model_len, pin)
                    for layer_type, name in rope_type.items()
                }
                pin.change(module, "rope_type", by_layer_type)
    except BaseException:
        pin.restore()
        raise
    return pin


def _pin(
    model: torch.nn.Module,
    module: Any,
    layer_type: str | None,
    name: str,
    max_model_len: int,
    pin: RopePin,
) -> str:
    """Pin the frequencies of one layer type; its new rope type."""
    if name == PINNED:  # a copy of a model that an engine used
        name = _parameters(module, layer_type)["rope_type"]
    prefix = "" if layer_type is None else f"{layer_type}_"
    if name == "longrope":
        chosen = _longrope(module, layer_type, max_model_len)
    elif "dynamic" in name:
        limit = module.original_max_seq_len
        if max_model_len > limit:
            raise UnsupportedModelError(
                type(model).__name__,
                "rope",
                f"dynamic RoPE beyond {limit} tokens depends on the longest sequence of a batch, "
                f"and max_model_len is {max_model_len}",
            )
        # A long forward pass before us may have grown inv_freq.
        chosen = getattr(module, f"{prefix}original_inv_freq")
    else:
        return name
    current = getattr(module, f"{prefix}inv_freq")
    pin.change(module, f"{prefix}inv_freq", chosen.to(current.device, current.dtype, copy=True))
    return PINNED


def _longrope(module: Any, layer_type: str | None, max_model_len: int) -> torch.Tensor:
    """Frequencies for every sequence of up to ``max_model_len`` tokens."""
    parameters = _parameters(module, layer_type)
    chosen: torch.Tensor = ROPE_INIT_FUNCTIONS["longrope"](
        module.config,
        getattr(module, "inv_freq" if layer_type is None else f"{layer_type}_inv_freq").device,
        # The init function looks at the length only to choose long or short factors.
        seq_len=max(max_model_len, 1)
        if max_model_len > parameters["original_max_position_embeddings"]
        else 1,
        layer_type=layer_type,
    )[0]
    return chosen


def _parameters(module: Any, layer_type: str | None) -> Any:
    parameters = module.config.rope_parameters
    return parameters if layer_type is None else parameters[layer_type]
