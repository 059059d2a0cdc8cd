"""What a step takes besides weights and KV, estimated without computing it.

Owns: nothing.  Thread-safety: none; the outline must not be in use.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .device_memory import draw, largest_logits

_NUM_DRAWN_ROWS = 2
"""Rows that the sampler's share is measured on; it grows in proportion."""


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the tensors that torch makes in a block; on the meta device they take no memory.

    Attributes:
        peak_bytes: most that was alive at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self._live_bytes = 0
        self._live: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._live:
            return
        self._live.add(key)
        self._live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, num_bytes: int) -> None:
        self._live.discard(key)
        self._live_bytes -= num_bytes


@torch.inference_mode()
def estimate_workspace(
    outline: torch.nn.Module, *, num_tokens: int, num_seqs: int, max_model_len: int
) -> int:
    """Most bytes that a forward pass of ``num_tokens`` rows, or a draw after it, holds at once.

    ``outline`` is on the meta device and its attention is ours. What attention kernels, experts of
    a mixture, and torch's allocator take of their own is not in it.
    """
    with without_experts(outline), PeakBytes() as forward:
        logits = largest_logits(
            outline, num_tokens=num_tokens, num_seqs=num_seqs, max_model_len=max_model_len
        )
    num_rows, vocab_size = logits.shape
    # The sampler reads what it draws from, so it runs on the host, for a few rows.
    rows = torch.zeros(min(num_rows, _NUM_DRAWN_ROWS), vocab_size)
    with PeakBytes() as drawing:
        draw(rows)
    drawing_bytes = drawing.peak_bytes * num_rows // len(rows)
    return int(max(forward.peak_bytes, logits.nbytes + drawing_bytes))


def has_experts(model: torch.nn.Module) -> bool:
    """Whether some layer is a mixture of experts."""
    return any(True for _ in _experts(model))


@contextmanager
def without_experts(outline: torch.nn.Module) -> Iterator[None]:
    """Let experts answer with nothing: which of them compute depends on the data."""
    replaced: list[torch.nn.Module] = list(_experts(outline))
    for module in replaced:
        module.forward = _no_experts
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def _experts(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    return (module for name, module in model.named_modules() if name.endswith(".experts"))


def _no_experts(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.empty_like(hidden)
