"""The rows of a batch on one device: row i of the batch is slot i, so a batch is one tensor.

Owns: one ``VirtualKVCache`` whose sequences are the rows of the batch, and its step.
Thread-safety: none; the thread that runs the model.

A batch must be viewable as one strided tensor ``[batch, heads, tokens, head_dim]``. So every slot
is taken at the start, empty, and row ``i`` keeps slot ``i`` for good: beams are reordered, and rows
repeated or picked, by mapping other pages at a slot's addresses (``VirtualKVCache.try_assign``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...backend import KVCacheStats, SequenceGroupSpec, Step
from ...config import KVCacheConfig
from ...errors import InvariantError
from ...kv_cache import VirtualKVCache
from .shapes import LayerShape, memory_bytes

_CUDA_COMMIT_AHEAD_TOKENS = 4


class _Base(NamedTuple):
    """Keys or values of one layer in all slots; ``strides`` are by slot, head, token, element."""

    all_rows: Tensor
    num_heads: int
    head_dim: int
    strides: tuple[int, int, int, int]
    offset: int


def _base_of(view: Tensor) -> _Base:
    _, _, num_heads, head_dim = view.shape
    slot, token, head, element = view.stride()
    return _Base(
        view, num_heads, head_dim, (slot, head, token, element), int(view.storage_offset())
    )


class DeviceRows:
    """Keys and values of some layers, all on one device.

    Args:
        shapes: what each of these layers stores, by layer index.
        max_batch, max_len: slots, and tokens of each; address space only.
        capacity_bytes: hard cap on physical memory. None: what the device has.
        page_bytes, layers_per_group, commit_ahead_tokens: see ``KVCacheConfig``; None: 1 layer a
            group and no worker on the CPU, all layers and a worker on CUDA.

    Raises:
        ConfigError: a value can never work.
    """

    def __init__(
        self,
        shapes: Mapping[int, LayerShape],
        *,
        max_batch: int,
        max_len: int,
        capacity_bytes: int | None,
        page_bytes: int | None,
        layers_per_group: int | None,
        commit_ahead_tokens: int | None,
    ) -> None:
        device = next(iter(shapes.values())).device
        is_cpu = device.type == "cpu"
        if layers_per_group is None:
            # Stock kernels read one layer's rows fastest where nothing lies between them; a device
            # with pages of megabytes cannot afford one for every layer.
            layers_per_group = 1 if is_cpu else len(shapes)
        if commit_ahead_tokens is None:
            commit_ahead_tokens = 0 if is_cpu else _CUDA_COMMIT_AHEAD_TOKENS
        self._kv = VirtualKVCache(
            KVCacheConfig(
                layers=tuple(shape.spec for shape in shapes.values()),
                max_num_seqs=max_batch,
                max_seq_len=max_len,
                capacity_bytes=capacity_bytes or memory_bytes(device),
                device="cpu" if is_cpu else f"cuda:{device.index or 0}",
                page_bytes=page_bytes,
                layers_per_group=min(layers_per_group, len(shapes)),
                num_slots=max_batch,
                commit_ahead_tokens=commit_ahead_tokens,
                low_watermark=0.0,
                prefix_caching=False,
            )
        )
        self._step: Step | None = None
        # Rows that end inside a page which others may share: only a cut leads there.
        self._is_cut = False
        empty = SequenceGroupSpec(tuple(range(max_batch)), 0, cache_salt=None)
        taken = self._kv.try_admit(empty)
        if taken is None or taken.slots != tuple(range(max_batch)):
            raise InvariantError(f"the slots of {max_batch} empty rows are {taken}")
        # Views made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self._bases = {
                layer_idx: tuple(map(_base_of, self._kv.layer_views(place)))
                for place, layer_idx in enumerate(shapes)
            }

    @property
    def capacity_bytes(self) -> int:
        return self.stats().capacity_bytes

    def views(self, layer_idx: int, batch: int, num_tokens: int, first: int = 0) -> list[Tensor]:
        """Keys and values ``[batch, num_kv_heads, tokens, head_dim]`` of rows from ``first`` on."""
        return [
            base.all_rows.as_strided(
                (batch, base.num_heads, num_tokens - first, base.head_dim),
                base.strides,
                base.offset + first * base.strides[2],
            )
            for base in self._bases[layer_idx]
        ]

    def try_extend(self, batch: int, num_tokens: int) -> bool:
        """Back so many tokens of every row of the batch, or change nothing."""
        rows = range(batch)
        self.end_step()
        if self._is_cut:
            if not self._kv.try_assign(rows, rows, self._kv.seq_len(0)):
                return False
            self._is_cut = False
        self._step = self._kv.begin_step()
        return self._kv.try_extend(rows, [num_tokens] * batch)

    def cut(self, batch: int, num_tokens: int) -> None:
        """Drop the tokens from ``num_tokens`` on."""
        for row in range(batch):
            self._kv.truncate(row, num_tokens)
        self._is_cut = num_tokens > 0 and self.stats().shared_bytes > 0

    def try_select(self, batch: int, sources: Sequence[int], num_tokens: int) -> bool:
        """Let row ``i`` be what row ``sources[i]`` is now, for all i or none; other rows end."""
        self.end_step()
        if not self._kv.try_assign(range(len(sources)), sources, num_tokens):
            return False
        for row in range(len(sources), batch):
            self._kv.truncate(row, 0)
        return True

    def end_step(self) -> None:
        """All kernels of the last forward pass are enqueued: pages that it dropped may go."""
        step, self._step = self._step, None
        if step is not None:
            self._kv.end_step(step)

    def stats(self) -> KVCacheStats:
        return self._kv.stats()

    def trim(self) -> int:
        """Give free pages back to the system; the count."""
        return self._kv.trim()

    def check_invariants(self) -> None:
        self._kv.check_invariants()

    def close(self) -> None:
        self._bases.clear()
        self._kv.close()
