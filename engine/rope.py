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

PINNED = "_pinned"
"""Appended to a module's rope type, so that transformers no longer updates its frequencies."""


def pin_rope(model: torch.nn.Module, max_model_len: int) -> None:
    """Fix every rotary module of ``model`` for sequences of up to ``max_model_len`` tokens.

    longrope takes its long factors if ``max_model_len`` exceeds the original context, else its
    short ones. dynamic keeps its original frequencies. Raises ``UnsupportedModelError`` where
    dynamic frequencies would have to grow.
    """
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        if isinstance(rope_type, str):
            module.rope_type = _pin(model, module, None, rope_type, max_model_len)  # type: ignore[assignment]
        elif isinstance(rope_type, dict):
            module.rope_type = {  # type: ignore[assignment]
                layer_type: _pin(model, module, layer_type, name, max_model_len)
                for layer_type, name in rope_type.items()
            }


def _pin(
    model: torch.nn.Module, module: Any, layer_type: str | None, name: str, max_model_len: int
) -> str:
    if name.endswith(PINNED):
        return name
    if name == "longrope":
        _pin_longrope(module, layer_type, max_model_len)
        return name + PINNED
    if "dynamic" in name:
        limit = module.original_max_seq_len
        if max_model_len > limit:
            raise UnsupportedModelError(
                type(model).__name__,
                "rope",
                f"dynamic RoPE beyond {limit} tokens depends on the longest sequence of a batch, "
                f"and max_model_len is {max_model_len}",
            )
        return "pinned"  # any name without "dynamic" in it stops the updates
    return name


def _pin_longrope(module: Any, layer_type: str | None, max_model_len: int) -> None:
    parameters = module.config.rope_parameters
    if layer_type is not None:
        parameters = parameters[layer_type]
    prefix = "" if layer_type is None else f"{layer_type}_"
    inv_freq = getattr(module, f"{prefix}inv_freq")
    chosen, _ = ROPE_INIT_FUNCTIONS["longrope"](
        module.config,
        inv_freq.device,
        # The init function looks at the length only to choose long or short factors.
        seq_len=max(max_model_len, 1)
        if max_model_len > parameters["original_max_position_embeddings"]
        else 1,
        layer_type=layer_type,
    )
    inv_freq.copy_(chosen)
