"""What kernels need to know of a batch, packed into one int32 tensor and moved at once.

Owns: nothing.  Thread-safety: none; one engine thread.

On a CUDA device the host's side is pinned and fresh for every view: torch's allocator hands pinned
memory out again only when the copy from it is done. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .backend import KVBatchBuffers, KVBatchView, packed_offsets
from .errors import ConfigError

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences as a backend knows them.

    Attributes:
        lens: tokens of each, with the new ones.
        num_new_tokens: of those, new ones.
        slots: slot of each; None where block tables say where they are.
        table: ``[batch, width]`` block ids for a width; None where slots do.
        block_size: tokens of a block; 0 without block tables.
    """

    lens: Sequence[int] | Ints
    num_new_tokens: Sequence[int]
    slots: Sequence[int] | None = None
    table: Callable[[int], Ints] | None = None
    block_size: int = 0


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a view: ``batch`` sequences with padding, ``width`` blocks of each."""

    batch: int
    max_seqlen_q: int
    max_seqlen_k: int
    width: int


class BatchViews:
    """Makes the views of one backend.

    Args:
        device: where their tensors go.
        max_seq_len: most tokens of a sequence.
    """

    def __init__(self, device: torch.device, max_seq_len: int) -> None:
        self._device = device
        self._max_seq_len = max_seq_len

    def make(
        self,
        batch: Batch,
        *,
        take_scratch: Callable[[], int],
        out: KVBatchBuffers | None = None,
        pad_to: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> KVBatchView:
        """See ``KVBackend.batch_view``; ``take_scratch`` gives the slot, or block, to pad with."""
        shape = self._shape(batch, pad_to, max_seqlen_k)
        if out is not None:
            self._check_out(out, shape)
        scratch = 0 if pad_to is None else take_scratch()
        offsets = packed_offsets(shape.batch if out is None else out.max_batch)
        size = offsets[-1] + shape.batch * shape.width
        if self._device.type == "cpu":
            ints = np.empty(size, np.int32) if out is None else out.packed.numpy()
            _fill(ints, offsets, batch, shape, scratch)
            return _view(lambda first, end: torch.from_numpy(ints[first:end]), offsets, shape)
        staged = torch.empty(size, dtype=torch.int32, pin_memory=True)
        _fill(staged.numpy(), offsets, batch, shape, scratch)
        if out is None:
            packed = staged.to(self._device, non_blocking=True)
        else:
            packed = out.packed
            packed[:size].copy_(staged, non_blocking=True)
        return _view(lambda first, end: packed[first:end], offsets, shape)

    def _shape(self, batch: Batch, pad_to: int | None, max_seqlen_k: int | None) -> Shape:
        count = len(batch.lens)
        if len(batch.num_new_tokens) != count:
            raise ConfigError(
                f"{len(batch.num_new_tokens)} numbers of new tokens are given for {count} sequences"
            )
        if pad_to is not None and pad_to < count:
            raise ConfigError(f"pad_to is {pad_to}; the batch has {count} sequences")
        is_padded = pad_to is not None and pad_to > count
        longest = max(_longest(batch.lens), int(is_padded))
        if max_seqlen_k is not None and not longest <= max_seqlen_k <= self._max_seq_len:
            raise ConfigError(
                f"max_seqlen_k is {max_seqlen_k}; it must be between the longest sequence's "
                f"{longest} tokens and max_seq_len, {self._max_seq_len}"
            )
        most = longest if max_seqlen_k is None else max_seqlen_k
        return Shape(
            batch=count if pad_to is None else pad_to,
            max_seqlen_q=max(max(batch.num_new_tokens, default=0), int(is_padded)),
            max_seqlen_k=most,
            width=max(-(-most // batch.block_size), 1) if batch.block_size else 0,
        )

    def _check_out(self, out: KVBatchBuffers, shape: Shape) -> None:
        if shape.batch > out.max_batch:
            raise ConfigError(f"the batch has {shape.batch} sequences; out holds {out.max_batch}")
        if shape.width > out.max_blocks:
            raise ConfigError(
                f"max_seqlen_k, {shape.max_seqlen_k}, takes {shape.width} blocks; out holds "
                f"{out.max_blocks} of each sequence"
            )
        if out.packed.device != self._device:
            raise ConfigError(f"out is on {out.packed.device}; the cache is on {self._device}")


def _longest(lens: Sequence[int] | Ints) -> int:
    return int(lens.max(initial=0)) if isinstance(lens, np.ndarray) else max(lens, default=0)


def _view(
    part: Callable[[int, int], Tensor], offsets: tuple[int, int, int, int], shape: Shape
) -> KVBatchView:
    slots, sums, lens, table = offsets
    count, width = shape.batch, shape.width
    block_table = part(table, table + count * width).view(count, width) if width else None
    return KVBatchView(
        cache_batch_idx=part(slots, slots + count),
        cu_seqlens_q=part(sums, sums + count + 1),
        seqused_k=part(lens, lens + count),
        max_seqlen_q=shape.max_seqlen_q,
        max_seqlen_k=shape.max_seqlen_k,
        block_table=block_table,
    )


def _fill(
    ints: Ints, offsets: tuple[int, int, int, int], batch: Batch, shape: Shape, scratch: int
) -> None:
    """Write all parts; sequences past those of the batch are one row of ``scratch`` each."""
    slots, sums, lens, table = offsets
    count, padded = len(batch.lens), shape.batch
    ints[slots : slots + count] = 0 if batch.slots is None else batch.slots
    ints[sums] = 0
    new_tokens = ints[sums + 1 : sums + 1 + padded]
    new_tokens[:count] = batch.num_new_tokens
    ints[lens : lens + count] = batch.lens
    if padded > count:
        ints[slots + count : slots + padded] = 0 if batch.slots is None else scratch
        new_tokens[count:] = 1
        ints[lens + count : lens + padded] = 1
    new_tokens.cumsum(out=new_tokens)
    if batch.table is not None:
        rows = ints[table : table + padded * shape.width].reshape(padded, shape.width)
        rows[:count] = batch.table(shape.width)
        rows[count:] = 0
        rows[count:, 0] = scratch
