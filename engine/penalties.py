"""Repetition, presence and frequency penalties over what a sequence holds already.

Owns: per sequence, how often each token occurred.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .transfer import flat_places, to_device

if TYPE_CHECKING:
    from .sampling_params import SamplingParams

_MIN_CAPACITY = 64


class TokenHistory:
    """The different tokens of a sequence and how often each was generated.

    It follows the sequence's token ids, which only ever grow behind what it has read; anything
    else makes it read them again from the start.

    Args:
        counts_prompt: also hold the prompt's tokens, generated 0 times.
    """

    __slots__ = ("_capacity", "_counts", "_ids", "_last", "_num_read", "_places", "counts_prompt")

    def __init__(self, counts_prompt: bool) -> None:
        self.counts_prompt = counts_prompt
        self._clear()

    def _clear(self) -> None:
        self._places: dict[int, int] = {}
        self._capacity = _MIN_CAPACITY
        self._ids: NDArray[np.int64] = np.empty(_MIN_CAPACITY, dtype=np.int64)
        self._counts: NDArray[np.float32] = np.zeros(_MIN_CAPACITY, dtype=np.float32)
        self._num_read = 0
        self._last = -1

    def copy(self) -> TokenHistory:
        """A history for a forked sequence."""
        twin = TokenHistory(self.counts_prompt)
        twin._places = dict(self._places)
        twin._capacity = self._capacity
        twin._ids, twin._counts = self._ids.copy(), self._counts.copy()
        twin._num_read, twin._last = self._num_read, self._last
        return twin

    def follow(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        """Take in the tokens that came since the last call."""
        num_read = self._num_read
        if num_read > len(token_ids) or (num_read and token_ids[num_read - 1] != self._last):
            self._clear()
        start = self._num_read
        if start < num_prompt_tokens:
            if self.counts_prompt:
                for token_id in dict.fromkeys(token_ids[start:num_prompt_tokens]):
                    self._place(token_id)
            start = num_prompt_tokens
        for token_id in token_ids[start:]:
            place = self._place(token_id)  # first: it may move the arrays
            self._counts[place] += 1.0
        self._num_read = len(token_ids)
        self._last = token_ids[-1]

    def _place(self, token_id: int) -> int:
        place = self._places.get(token_id)
        if place is not None:
            return place
        place = self._places[token_id] = len(self._places)
        if place == self._capacity:
            self._ids = np.concatenate([self._ids, np.empty_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._capacity *= 2
        self._ids[place] = token_id
        return place

    @property
    def ids(self) -> NDArray[np.int64]:
        """The different token ids."""
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> NDArray[np.float32]:
        """How often each of ``ids`` was generated."""
        return self._counts[: len(self._places)]


def has_penalties(params: SamplingParams) -> bool:
    """Whether any penalty is on."""
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def apply_penalties(
    logits: Tensor,
    rows: Sequence[int],
    histories: Sequence[TokenHistory],
    params: Sequence[SamplingParams],
) -> None:
    """Change contiguous ``logits [num_rows, vocab_size]`` at the tokens of each row's history.

    As vLLM does: first the repetition penalty, then frequency, then presence.
    """
    ids = np.concatenate([history.ids for history in histories])
    counts = np.concatenate([history.counts for history in histories])
    owners = np.repeat(np.arange(len(histories)), [len(history.ids) for history in histories])
    # A prompt may hold tokens that the model takes and never writes.
    is_written = ids < logits.shape[1]
    ids, counts, owners = ids[is_written], counts[is_written], owners[is_written]
    names = ("repetition_penalty", "frequency_penalty", "presence_penalty")
    settings = [[getattr(one, name) for one in params] for name in names]
    numbers = np.vstack([counts, np.array(settings, dtype=np.float32)[:, owners]])
    places = flat_places(np.array(rows)[owners], ids, logits)
    count, repetition, frequency, presence = to_device(numbers, logits.device)
    values = logits.view(-1).index_select(0, places)
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * count
    values -= presence * (count > 0)
    logits.view(-1).index_copy_(0, places, values)
