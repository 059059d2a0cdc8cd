"""A model lent to one engine: its attention and rope are ours until it is given back.

Owns: the note of which engine has which model.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch

from ..errors import ConfigError
from .probe import own_attention, restore_attention
from .rope import pin_rope

_leases: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[ModelLease]] = (
    weakref.WeakKeyDictionary()
)
"""The last lease of each model."""


class ModelLease:
    """What must be undone when an engine lets go of ``model``.

    An ``owner`` that is dropped without ``give_back`` gives it back too. Raises ``ConfigError`` if
    another engine has the model.
    """

    def __init__(self, model: torch.nn.Module, max_model_len: int, owner: Any) -> None:
        _check_unused(model)
        attention = own_attention(model)
        rope_pin = pin_rope(model, max_model_len)

        def restore() -> None:
            rope_pin.restore()
            restore_attention(model, attention)

        self._finalizer = weakref.finalize(owner, restore)
        self._finalizer.atexit = False
        _leases[model] = weakref.ref(self)

    @property
    def is_open(self) -> bool:
        """Whether the model was not given back yet."""
        return self._finalizer.alive

    def give_back(self) -> None:
        """Leave the model as it was before. Idempotent."""
        self._finalizer()


def _check_unused(model: torch.nn.Module) -> None:
    user = _leases.get(model)
    if user is None or not _is_open(user):
        return
    gc.collect()  # it may only wait, unreachable, to be collected
    if _is_open(user):
        raise ConfigError(
            f"model is a {type(model).__name__} that another engine uses; close that one first"
        )


def _is_open(user: weakref.ref[ModelLease]) -> bool:
    lease = user()
    return lease is not None and lease.is_open
