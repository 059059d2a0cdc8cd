"""Chooses the next token of every sequence of a batch at once.

A row's choice depends on that row's logits, settings and (seed, position) alone.
Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .outputs import Logprob
from .philox import uniforms
from .sequence import Sequence

MIN_TEMPERATURE = 1e-30
MAX_TEMPERATURE = 1e30
"""Beyond these a temperature acts as its limit does: greedy, or uniform."""


@dataclass(slots=True)
class SampledTokens:
    """What a step chose.

    Attributes:
        token_ids: one per sequence; None where the logits hold no finite maximum.
        logprobs: per sequence, candidates by token id, the chosen one first; None if not asked for.
    """

    token_ids: list[int | None]
    logprobs: list[dict[int, Logprob] | None]


@torch.inference_mode()
def sample(seqs: SequenceABC[Sequence], logits: Tensor) -> SampledTokens:
    """Choose a token per sequence from float32 ``logits [num_seqs, vocab_size]`` (not changed)."""
    allowed = _ban_early_stops(seqs, logits)
    best = allowed.max(dim=-1)
    chosen = _choose(seqs, allowed, best.indices.tolist())
    logprobs: list[dict[int, Logprob] | None] = [None] * len(seqs)
    rows = [row for row, seq in enumerate(seqs) if seq.params.logprobs is not None]
    if rows:
        _fill_logprobs(seqs, rows, logits, chosen, logprobs)
    is_finite = best.values.isfinite().tolist()
    token_ids = [
        token_id if is_valid else None for token_id, is_valid in zip(chosen, is_finite, strict=True)
    ]
    return SampledTokens(token_ids, logprobs)


def _ban_early_stops(seqs: SequenceABC[Sequence], logits: Tensor) -> Tensor:
    """Logits without the stop tokens of sequences that are below ``min_tokens``."""
    banned = [
        (row, token_id)
        for row, seq in enumerate(seqs)
        if seq.num_output_tokens < seq.params.min_tokens
        for token_id in seq.stop_token_ids
        if token_id < logits.shape[1]
    ]
    if not banned:
        return logits
    logits = logits.clone()
    rows, token_ids = zip(*banned, strict=True)
    logits[list(rows), list(token_ids)] = -torch.inf
    return logits


def _choose(seqs: SequenceABC[Sequence], logits: Tensor, best: list[int]) -> list[int]:
    """``best`` of each row where the sequence is greedy, a random draw elsewhere."""
    rows = [row for row, seq in enumerate(seqs) if not seq.params.is_greedy]
    if not rows:
        return best
    chosen = list(best)
    is_all = len(rows) == len(seqs)
    drawn = _choose_randomly([seqs[row] for row in rows], logits if is_all else logits[rows])
    for row, token_id in zip(rows, drawn, strict=True):
        chosen[row] = token_id
    return chosen


def _choose_randomly(seqs: SequenceABC[Sequence], logits: Tensor) -> list[int]:
    """Invert the cumulative distribution, in vocabulary order, at one uniform number per row."""
    # float32 holds nothing smaller or larger: 0 / 0 and inf / inf would be NaN.
    temperature = torch.tensor(
        [min(max(seq.params.temperature, MIN_TEMPERATURE), MAX_TEMPERATURE) for seq in seqs]
    )
    # From the maximum down, so that a tiny temperature gives -inf and never inf.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature.unsqueeze(1)
    scaled = _keep_top_k(seqs, scaled)
    probs = _keep_top_p(seqs, scaled.softmax(dim=-1))
    cumulative = probs.double().cumsum(dim=-1)
    total = cumulative[:, -1]
    numbers = uniforms(
        [seq.seed for seq in seqs], [0] * len(seqs), [seq.num_tokens for seq in seqs]
    )
    target = torch.from_numpy(numbers) * total
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(target, below_total).unsqueeze(1)
    # The first entry above the target has probability, whatever was masked before it.
    found = torch.searchsorted(cumulative, target, right=True)[:, 0]
    token_ids: list[int] = found.clamp_(max=logits.shape[1] - 1).tolist()  # NaN rows: see sample
    return token_ids


def _keep_top_k(seqs: SequenceABC[Sequence], scores: Tensor) -> Tensor:
    """Mask scores below each row's k-th largest; ties with it stay."""
    vocab_size = scores.shape[1]
    rows = [row for row, seq in enumerate(seqs) if 0 < seq.params.top_k < vocab_size]
    if not rows:
        return scores
    counts = torch.tensor([seqs[row].params.top_k for row in rows])
    kept = scores[rows]
    largest = kept.topk(int(counts.max()), dim=-1).values
    threshold = largest.gather(1, (counts - 1).unsqueeze(1))
    return scores.index_copy(0, torch.tensor(rows), kept.masked_fill(kept < threshold, -torch.inf))


def _keep_top_p(seqs: SequenceABC[Sequence], probs: Tensor) -> Tensor:
    """Drop tokens after the fewest that reach ``top_p``; ties with the last of those stay."""
    rows = [row for row, seq in enumerate(seqs) if seq.params.top_p < 1.0]
    if not rows:
        return probs
    top_p = torch.tensor([seqs[row].params.top_p for row in rows], dtype=torch.float64)
    kept = probs[rows]
    # numpy sorts a row of floats some thirty times faster than torch does on CPU.
    falling = torch.from_numpy(np.sort(kept.numpy(), axis=-1)[:, ::-1].copy())
    reached = falling.double().cumsum(dim=-1) < top_p.unsqueeze(1)
    last = reached.sum(dim=-1).clamp(max=probs.shape[1] - 1)
    threshold = falling.gather(1, last.unsqueeze(1))
    return probs.index_copy(0, torch.tensor(rows), kept.masked_fill(kept < threshold, 0.0))


def _fill_logprobs(
    seqs: SequenceABC[Sequence],
    rows: list[int],
    logits: Tensor,
    chosen: list[int],
    logprobs: list[dict[int, Logprob] | None],
) -> None:
    """Log-softmax of the raw logits: the chosen token of each row, then its most likely ones."""
    all_logprobs = logits[rows].log_softmax(dim=-1)
    chosen_logprobs = all_logprobs.gather(
        1, torch.tensor([chosen[row] for row in rows]).unsqueeze(1)
    )
    ranks = (all_logprobs > chosen_logprobs).sum(dim=-1).add_(1).tolist()
    most = max(seqs[row].params.logprobs or 0 for row in rows)
    top = all_logprobs.topk(min(most, logits.shape[1]), dim=-1)
    top_values, top_ids = top.values.tolist(), top.indices.tolist()
    for idx, row in enumerate(rows):
        entries = {chosen[row]: Logprob(float(chosen_logprobs[idx, 0]), ranks[idx])}
        for place in range(min(seqs[row].params.logprobs or 0, logits.shape[1])):
            entries.setdefault(top_ids[idx][place], Logprob(top_values[idx][place], place + 1))
        logprobs[row] = entries
