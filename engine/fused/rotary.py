"""Tables of the cosines and sines that a model's own rotary module gives.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import NotRecognisedError
from .families import Family
from .parts import check_untouched, is_of_libraries

_ROTATIONS = ("apply_rotary_pos_emb", "rotate_half")
"""How a family's attention turns its heads; no module of the model shows it."""
_ROWS_AT_ONCE = 4096
"""The module computes both halves, and in steps: what it takes for them is bounded."""


class RopeTables:
    """The tables of one model, each made when a layer first asks for it.

    Args:
        module: the model's rotary module. Its frequencies must not follow the longest sequence
            of a batch: ``pin_rope`` sees to that.
        family: the model's.
        num_positions: rows that the tables have.
    """

    def __init__(self, module: nn.Module, family: Family, num_positions: int) -> None:
        if not family.is_class(module, "RotaryEmbedding"):
            raise NotRecognisedError(
                f"rotary_emb is a {type(module).__name__}, not a {family.prefix}RotaryEmbedding"
            )
        check_untouched(module, "rotary_emb")
        for name in _ROTATIONS:
            if not is_of_libraries(getattr(sys.modules[family.home], name, None)):
                raise NotRecognisedError(f"{family.home}.{name} was replaced")
        self._module = module
        self._num_positions = num_positions
        self._names: list[str | None] = []
        self.tables: list[Tensor] = []
        """``[num_positions, 2, half]`` each."""

    def index_of(self, layer_type: str | None) -> int:
        """The table of a layer type, where the module tells them apart; else None is the one."""
        if not isinstance(getattr(self._module, "rope_type", None), dict):
            layer_type = None
        if layer_type not in self._names:
            self.tables.append(self._make(layer_type))
            self._names.append(layer_type)
        return self._names.index(layer_type)

    @torch.inference_mode()
    def _make(self, layer_type: str | None) -> Tensor:
        module: Any = self._module
        arguments: Sequence[str] = () if layer_type is None else (layer_type,)
        # Not of torch's default dtype and device, which the caller may have set.
        like = torch.zeros(1, dtype=torch.float32, device="cpu")
        parts = []
        for start in range(0, self._num_positions, _ROWS_AT_ONCE):
            end = min(start + _ROWS_AT_ONCE, self._num_positions)
            positions = torch.arange(start, end, device="cpu")
            pair = torch.stack(module(like, positions.unsqueeze(0), *arguments), dim=2)
            half = pair.shape[3] // 2
            if pair.dtype != torch.float32 or not torch.equal(pair[..., :half], pair[..., half:]):
                raise NotRecognisedError("rotary_emb gives halves that differ")
            parts.append(pair[0, :, :, :half])
        return torch.cat(parts).contiguous()
