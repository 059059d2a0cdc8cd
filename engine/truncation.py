"""Cuts unlikely tokens off a distribution before a draw: min-p, typical, top-k and top-p.

Each function leaves rows that do not ask for it untouched; a row's result is its own alone.
Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .sampling_params import SamplingParams
from .transfer import take_rows, to_device


def keep_min_p(params: Sequence[SamplingParams], scores: Tensor) -> Tensor:
    """Mask tokens whose probability is below ``min_p`` times the largest one's.

    ``scores [num_rows, vocab_size]`` are logits less each row's maximum.
    """
    if all(one.min_p == 0.0 for one in params):
        return scores
    floors = [math.log(one.min_p) if one.min_p > 0.0 else -math.inf for one in params]
    floor = to_device(np.array(floors, dtype=np.float32), scores.device).unsqueeze(1)
    return scores.masked_fill(scores < floor, -torch.inf)


def keep_typical(params: Sequence[SamplingParams], scores: Tensor) -> Tensor:
    """Mask all but the fewest tokens closest to the expected information that reach ``typical_p``.

    Meister et al., "Locally Typical Sampling"; ties with the last of those stay.
    """
    rows = [row for row, one in enumerate(params) if one.typical_p < 1.0]
    if not rows:
        return scores
    mass = np.array([params[row].typical_p for row in rows])
    kept = take_rows(scores, rows)
    # In numpy, on the host: its sums of a row do not depend on how many rows or threads there are.
    logprobs = kept.double().log_softmax(dim=-1).cpu().numpy()
    probs = np.exp(logprobs)
    parts = np.multiply(probs, logprobs, out=np.zeros_like(probs), where=probs > 0.0)
    entropy = -parts.sum(axis=-1, keepdims=True)
    # As float32, for tokens of equal logits to tie.
    distance = np.abs(-logprobs - entropy).astype(np.float32)
    # An argsort, several times faster: bits of positive floats sort as the floats do.
    keys = distance.view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(distance.shape[1], dtype=np.uint64)
    keys.sort(axis=-1)
    order = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    reached = np.cumsum(np.take_along_axis(probs, order, axis=-1), axis=-1) < mass[:, None]
    last = np.minimum(reached.sum(axis=-1, keepdims=True), scores.shape[1] - 1)
    limit = np.take_along_axis(distance, np.take_along_axis(order, last, axis=-1), axis=-1)
    is_far = to_device(distance > limit, scores.device)
    return _put_rows(scores, rows, kept.masked_fill(is_far, -torch.inf))


def keep_top_k(params: Sequence[SamplingParams], scores: Tensor) -> Tensor:
    """Mask scores below each row's k-th largest; ties with it stay."""
    vocab_size = scores.shape[1]
    rows = [row for row, one in enumerate(params) if 0 < one.top_k < vocab_size]
    if not rows:
        return scores
    counts = np.array([params[row].top_k for row in rows])
    kept = take_rows(scores, rows)
    largest = kept.topk(int(counts.max()), dim=-1).values
    threshold = largest.gather(1, to_device(counts - 1, scores.device).unsqueeze(1))
    return _put_rows(scores, rows, kept.masked_fill(kept < threshold, -torch.inf))


def keep_top_p(params: Sequence[SamplingParams], probs: Tensor) -> Tensor:
    """Drop tokens after the fewest that reach ``top_p``; ties with the last of those stay."""
    rows = [row for row, one in enumerate(params) if one.top_p < 1.0]
    if not rows:
        return probs
    top_p = to_device(np.array([params[row].top_p for row in rows]), probs.device)
    kept = take_rows(probs, rows)
    falling = _sorted_down(kept)
    reached = falling.double().cumsum(dim=-1) < top_p.unsqueeze(1)
    last = reached.sum(dim=-1).clamp(max=probs.shape[1] - 1)
    threshold = falling.gather(1, last.unsqueeze(1))
    return _put_rows(probs, rows, kept.masked_fill(kept < threshold, 0.0))


def _sorted_down(values: Tensor) -> Tensor:
    """Each row from its largest value down."""
    if values.device.type == "cpu":  # numpy sorts a row of floats some thirty times faster
        return torch.from_numpy(np.sort(values.numpy(), axis=-1)[:, ::-1].copy())
    return values.sort(dim=-1, descending=True).values


def _put_rows(values: Tensor, rows: Sequence[int], changed: Tensor) -> Tensor:
    """``values`` with some rows replaced, as a new tensor."""
    if len(rows) == len(values):
        return changed
    return values.index_copy(0, to_device(np.array(rows), values.device), changed)
