"""One full-attention layer of a ``VirtualCache``: new states in, views of all rows out.

Owns: how many tokens the layer holds.  Thread-safety: none; the thread that runs the model.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import __version__
from transformers.cache_utils import CacheLayerMixin

from ...errors import VmallocError
from .batch_rows import BatchRows
from .errors import InferenceOnlyError
from .shapes import LayerShape


class VirtualLayer(CacheLayerMixin):  # type: ignore[misc]
    """What ``DynamicLayer`` does, over rows that grow in place.

    Attributes:
        keys, values: views ``[batch, num_kv_heads, num_tokens, head_dim]``, None before the first
            update. They are good until the cache changes, and are not copies.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, layer_idx: int, rows: BatchRows) -> None:
        self._layer_idx = layer_idx
        self._rows = rows
        self._num_tokens = 0
        super().__init__()

    @property
    def keys(self) -> Tensor | None:
        return self._view(0)

    @keys.setter
    def keys(self, value: None) -> None:
        _check_none("keys", value)

    @property
    def values(self) -> Tensor | None:
        return self._view(1)

    @values.setter
    def values(self, value: None) -> None:
        _check_none("values", value)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = LayerShape.of(key_states, value_states)
        self._rows.bind(self._layer_idx, shape)
        self.dtype, self.device = shape.dtype, shape.device
        self._shape = shape
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new states ``[batch, num_kv_heads, new tokens, head_dim]`` behind the others.

        Returns:
            Keys and values of all tokens, as views.

        Raises:
            CacheFullError: pages or tokens run out; the layer is as it was.
            ConfigError: the states are not of this batch, or of another shape than before.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        else:
            self._check_shape(key_states, value_states)
        first, num_tokens = self._num_tokens, self._num_tokens + key_states.shape[2]
        self._rows.extend(key_states.shape[0], num_tokens, first)
        with torch.no_grad():
            new_keys, new_values = self._rows.views(self._layer_idx, num_tokens, first)
            new_keys.copy_(key_states)
            new_values.copy_(value_states)
            keys, values = self._rows.views(self._layer_idx, num_tokens)
        self._num_tokens = num_tokens
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            states = (key_states, value_states, keys, values)
            keys, values = _CachedStates.apply(*states)  # type: ignore[no-untyped-call]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._num_tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self._num_tokens

    def get_max_length(self) -> int:
        """Most tokens, if somebody named a limit; else -1, which is how transformers says none."""
        return self._rows.max_len if self._rows.is_max_len_said else -1

    def forget(self, num_tokens: int) -> None:
        """Forget the tokens from ``num_tokens`` on; the cache gives their pages back."""
        self._num_tokens = min(self._num_tokens, num_tokens)

    def crop(self, tokens_to_remove: int) -> NoReturn:
        raise VmallocError(_WHOLE_CACHE.format("crop"))

    def reset(self) -> None:
        """Forget everything; the next update may bring another batch, shape or element type."""
        self._num_tokens = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> NoReturn:
        raise VmallocError(_WHOLE_CACHE.format("reorder_cache"))

    def batch_repeat_interleave(self, repeats: int) -> NoReturn:
        raise VmallocError(_WHOLE_CACHE.format("batch_repeat_interleave"))

    def batch_select_indices(self, indices: Tensor) -> NoReturn:
        raise VmallocError(_WHOLE_CACHE.format("batch_select_indices"))

    def offload(self) -> NoReturn:
        raise VmallocError("a VirtualCache is not offloaded; its pages are where the model runs")

    def prefetch(self) -> None:
        """Nothing is ever elsewhere."""

    def _view(self, which: int) -> Tensor | None:
        if not (self.is_initialized and self._rows.is_laid_out):
            return None
        with torch.no_grad():
            return self._rows.views(self._layer_idx, self._num_tokens)[which]

    def _check_shape(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = self._shape
        batch, num_new = key_states.shape[0], key_states.shape[-2]
        if (
            key_states.shape == (batch, shape.num_kv_heads, num_new, shape.k_head_dim)
            and value_states.shape == (batch, shape.num_kv_heads, num_new, shape.v_head_dim)
            and key_states.dtype == shape.dtype == value_states.dtype
            and key_states.device == shape.device == value_states.device
        ):
            return  # as it nearly always is, in a few microseconds
        shape = LayerShape.of(key_states, value_states)
        if self._num_tokens == 0 and self._rows.num_tokens == 0:
            self.lazy_initialization(key_states, value_states)
            return
        raise VmallocError(f"layer {self._layer_idx} brings {shape}; it holds {self._shape}")


_WHOLE_CACHE = "{0} goes to the VirtualCache, not to one of its layers: a page holds several layers"

# Up to 5.17 a positive argument of crop() is a length to keep; later versions refuse it.
_KEEPS_POSITIVE = tuple(map(int, __version__.split(".")[:2])) < (5, 18)


def cropped(num_tokens: int, tokens_to_remove: int) -> int:
    """Tokens left of ``num_tokens``, by the rules of the transformers that is installed.

    Raises:
        ValueError: ``tokens_to_remove`` is positive, which meant "keep so many" up to 5.17.
    """
    if tokens_to_remove <= 0:
        return max(0, num_tokens + tokens_to_remove)
    if not _KEEPS_POSITIVE:
        raise ValueError(
            f"crop() got {tokens_to_remove}; give it a negative number, the tokens to remove"
        )
    return min(num_tokens, tokens_to_remove)


def _check_none(name: str, value: object) -> None:
    if value is not None:
        raise VmallocError(f"{name} of a VirtualCache cannot be replaced: they lie in its pages")


class _CachedStates(torch.autograd.Function):
    """Lets a forward pass run with gradients switched on, and says so if somebody wants one."""

    @staticmethod
    def forward(
        ctx: Any, key_states: Tensor, value_states: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        return keys.view_as(keys), values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise InferenceOnlyError(
            "a VirtualCache is for inference: its rows are overwritten in place and carry no "
            "gradient; use transformers' DynamicCache to train, or run under torch.no_grad()"
        )
