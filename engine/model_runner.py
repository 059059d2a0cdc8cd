"""The forward pass of one step: a batch of sequences packed into rows, or a replayed decode.

Owns: nothing.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from collections.abc import Set
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..backend import KVBackend
from ..kernels.cpu import use_num_threads
from .decode_graphs import DecodeGraphs
from .packed_batch import PackedBatch, pack
from .packed_forward import ForwardPass
from .sequence import Sequence
from .transfer import to_device

if TYPE_CHECKING:
    from .tensor_parallel.leader import RankLeader

INVARIANT_ROW_MULTIPLE = 8
INVARIANT_MIN_ROWS = 16
"""Matrix products of at least this many rows, in steps of the multiple, give each row the same
bits whatever the other rows are."""


class ModelRunner:
    """Runs a decoder over the sequences of a step, its K and V in ``backend``.

    Args:
        forward: the forward pass, over the layers of ``backend``.
        backend: where K and V live.
        device: where the model computes.
        pads_rows: pad rows so that the logits of torch's products do not depend on batch mates,
            bit for bit.
        decodes: what batches of decodes go through, as far as it takes them; None: nothing.

    Attributes:
        leader: has every other rank compute what is computed here; None: there is none.
    """

    def __init__(
        self,
        forward: ForwardPass,
        backend: KVBackend,
        device: torch.device,
        *,
        pads_rows: bool = False,
        decodes: DecodeGraphs | None = None,
    ) -> None:
        self._forward = forward
        self._backend = backend
        self._device = device
        self._pads_rows = pads_rows
        self.leader: RankLeader | None = None
        self.decodes = decodes
        if device.type == "cpu":
            # One knob for the CPU: torch's, which OMP_NUM_THREADS and torch.set_num_threads turn.
            use_num_threads(torch.get_num_threads())

    @property
    def forward_name(self) -> str:
        """Who computes what is not recorded, see ``ForwardPass``."""
        return self._forward.name

    def forward(
        self,
        seqs: SequenceABC[Sequence],
        num_new_tokens: SequenceABC[int],
        all_rows: Set[int] = frozenset(),
    ) -> Tensor:
        """Compute the next ``num_new_tokens[i]`` tokens of each sequence; rows are backed.

        To be called between ``begin_step`` and ``end_step``.

        Returns float32 logits ``[num_rows, vocab_size]`` on the device, good until the next call,
        sequence by sequence: every new row of those whose place is in ``all_rows``, and the last
        row of the others that reach their last known token in this step. Raises ``VmallocError``
        if the model attended elsewhere than in the cache.
        """
        batch = pack(seqs, num_new_tokens, all_rows)
        if self.leader is None:
            return self.compute(batch)
        self.leader.lead(batch)
        with self.leader.computing():
            return self.compute(batch)

    def compute(self, batch: PackedBatch) -> Tensor:
        """Compute a packed batch; float32 logits of ``batch.rows``, as from ``forward``."""
        if self.decodes is not None and self.decodes.takes(batch):
            return self.decodes.run(batch)
        view = self._backend.batch_view(batch.seq_ids, batch.num_new_tokens)
        token_ids, positions, rows = batch.token_ids, batch.positions, batch.rows
        num_kept = len(rows)
        if self._pads_rows:
            padding = [0] * (_invariant_rows(len(token_ids)) - len(token_ids))
            token_ids, positions = token_ids + padding, positions + padding
            rows = rows + [0] * (_invariant_rows(num_kept) - num_kept)
        packed = to_device(np.array([*token_ids, *positions, *rows], dtype=np.int64), self._device)
        num_rows = len(token_ids)
        return self._forward(
            packed[:num_rows], packed[num_rows : 2 * num_rows], packed[2 * num_rows :], view
        )[:num_kept]

    def close(self) -> None:
        """Let go of what it holds on the device; nothing can be computed afterwards."""
        self._forward.close()
        if self.decodes is not None:
            self.decodes.close()


def _invariant_rows(num_rows: int) -> int:
    multiple = INVARIANT_ROW_MULTIPLE
    return max(INVARIANT_MIN_ROWS, (num_rows + multiple - 1) // multiple * multiple)
