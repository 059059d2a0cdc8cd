"""One forward pass over a packed batch of sequences.

Owns: the model's use of our attention while the runner lives.
Thread-safety: none; one engine thread.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence as SequenceABC
from collections.abc import Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backend import KVBackend, KVBatchView
from ..errors import VmallocError
from ..kernels.cpu import use_num_threads
from .kv_attention import PackedAttention, attention_through
from .sequence import Sequence

INVARIANT_ROW_MULTIPLE = 8
INVARIANT_MIN_ROWS = 16
"""Matrix products of at least this many rows, in steps of the multiple, give each row the same
bits whatever the other rows are."""


class ModelRunner:
    """Runs a decoder over packed rows, its K and V in ``backend``.

    Args:
        model: a transformers decoder whose attention is ``"vmalloc"``, in eval mode.
        backend: where K and V live.
        batch_invariant: pad rows so that logits do not depend on batch mates, bit for bit.
    """

    def __init__(
        self, model: torch.nn.Module, backend: KVBackend, *, batch_invariant: bool = False
    ) -> None:
        self._model: Any = model
        self._backend = backend
        self._batch_invariant = batch_invariant
        # One knob for the CPU: torch's, which OMP_NUM_THREADS and torch.set_num_threads turn.
        use_num_threads(torch.get_num_threads())
        num_layers = len(backend.config.layers)
        self._layer_caches = [backend.layer_views(layer_idx) for layer_idx in range(num_layers)]
        self._has_logits_to_keep = (
            "logits_to_keep" in inspect.signature(self._model.forward).parameters
        )

    @torch.inference_mode()
    def forward(
        self,
        seqs: SequenceABC[Sequence],
        num_new_tokens: SequenceABC[int],
        view: KVBatchView,
        all_rows: Set[int] = frozenset(),
    ) -> Tensor:
        """Compute the next ``num_new_tokens[i]`` tokens of each sequence; rows are backed.

        Returns float32 logits ``[num_rows, vocab_size]``, sequence by sequence: every new row of
        those whose place is in ``all_rows``, and the last row of the others that reach their last
        known token in this step. Raises ``VmallocError`` if the model attended elsewhere than in
        the cache.
        """
        token_ids, positions, kept_rows = _pack(seqs, num_new_tokens, all_rows)
        num_tokens, num_kept = len(token_ids), len(kept_rows)
        if num_kept == 0:
            kept_rows.append(0)  # some row: without any, models compute the logits of all rows
        if self._batch_invariant:
            padding = _invariant_rows(num_tokens) - num_tokens
            token_ids.extend([0] * padding)
            positions.extend([0] * padding)
            kept_rows.extend([0] * (_invariant_rows(num_kept) - len(kept_rows)))
        attention = PackedAttention(self._layer_caches, view)
        with attention_through(attention):
            logits = self._logits(
                _int64(token_ids).unsqueeze(0), _int64(positions).unsqueeze(0), _int64(kept_rows)
            )
        if attention.num_calls != len(self._layer_caches):
            raise VmallocError(
                f"{attention.num_calls} of {len(self._layer_caches)} layers attended to the KV "
                "cache; was the model's attention switched while an engine uses it?"
            )
        return logits[:num_kept].float()

    def _logits(self, input_ids: Tensor, position_ids: Tensor, rows: Tensor) -> Tensor:
        """Logits ``[len(rows), vocab_size]`` of the given rows of one packed forward pass."""
        if self._has_logits_to_keep:
            output = self._model(
                input_ids=input_ids,
                position_ids=position_ids,
                use_cache=False,
                logits_to_keep=rows,
            )
            logits: Tensor = output.logits[0]
            return logits
        output = self._model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return output.logits[0, rows]  # type: ignore[no-any-return]


def _pack(
    seqs: SequenceABC[Sequence], num_new_tokens: SequenceABC[int], all_rows: Set[int]
) -> tuple[list[int], list[int], list[int]]:
    """Token ids and positions of all rows, and the rows whose logits are wanted."""
    token_ids: list[int] = []
    positions: list[int] = []
    kept_rows: list[int] = []
    for idx, (seq, num_new) in enumerate(zip(seqs, num_new_tokens, strict=True)):
        start = seq.num_computed_tokens
        end = start + num_new
        if num_new == 1:
            token_ids.append(seq.token_ids[start])
            positions.append(start)
        else:
            token_ids.extend(seq.token_ids[start:end])
            positions.extend(range(start, end))
        if all_rows and idx in all_rows:
            kept_rows.extend(range(len(token_ids) - num_new, len(token_ids)))
        elif end == len(seq.token_ids):
            kept_rows.append(len(token_ids) - 1)
    return token_ids, positions, kept_rows


def _int64(values: list[int]) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int64))


def _invariant_rows(num_rows: int) -> int:
    multiple = INVARIANT_ROW_MULTIPLE
    return max(INVARIANT_MIN_ROWS, (num_rows + multiple - 1) // multiple * multiple)
