"""Chooses the next token of every sequence of a batch at once.

A row's choice depends on that row's logits, history, settings and (seed, choice, position) alone.
Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

import torch
from torch import Tensor

from .logits_filters import apply_filters, make_filters, masking_filters
from .logprobs import token_logprobs
from .outputs import Logprob
from .philox import uniforms
from .sequence import Sequence
from .truncation import keep_min_p, keep_top_k, keep_top_p, keep_typical

MIN_TEMPERATURE = 1e-30
MAX_TEMPERATURE = 1e30
"""Beyond these a temperature acts as its limit does: greedy, or uniform."""

NUM_DRAWN_LOGITS = 1 << 17
"""Logits that are drawn from at once: their float64 copies stay in the processor's cache."""

NOT_FINITE = "the model's logits are not finite"


@dataclass(slots=True)
class SampledTokens:
    """What a step chose.

    Attributes:
        token_ids: one per sequence; None where no token can be chosen.
        logprobs: per sequence, candidates by token id, the chosen one first; None if not asked for.
        errors: per sequence, why there is no token; None where there is one.
    """

    token_ids: list[int | None]
    logprobs: list[dict[int, Logprob] | None]
    errors: list[str | None]


@torch.inference_mode()
def sample(seqs: SequenceABC[Sequence], logits: Tensor) -> SampledTokens:
    """Choose a token per sequence from float32 ``logits [num_seqs, vocab_size]`` (not changed)."""
    _complete_filters(seqs, logits)
    allowed, failed = apply_filters(seqs, logits)
    best = allowed.max(dim=-1)
    chosen = _choose(seqs, allowed, best.indices.tolist())
    errors: list[str | None] = [None] * len(seqs)
    for row, is_finite in enumerate(best.values.isfinite().tolist()):
        if row in failed:
            errors[row] = failed[row]
        elif not is_finite:
            errors[row] = _explain(seqs[row], logits[row])
    logprobs: list[dict[int, Logprob] | None] = [None] * len(seqs)
    wanted = [
        (row, seq.params.num_logprobs)
        for row, seq in enumerate(seqs)
        if seq.params.num_logprobs is not None
    ]
    if wanted:
        rows, counts = zip(*wanted, strict=True)
        entries = token_logprobs(logits[list(rows)], [chosen[row] for row in rows], counts)
        for row, entry in zip(rows, entries, strict=True):
            logprobs[row] = entry
    token_ids = [
        token_id if error is None else None for token_id, error in zip(chosen, errors, strict=True)
    ]
    return SampledTokens(token_ids, logprobs, errors)


@torch.inference_mode()
def score_beams(seqs: SequenceABC[Sequence], logits: Tensor) -> tuple[Tensor, str | None]:
    """Scores of every next token of one request's beams, for ``BeamSearch.advance``.

    Returns float32 ``[num_beams, vocab_size]``: log-softmax of ``logits``, then the filters, as
    Hugging Face orders them; and what ended the request, or None. A beam that its grammar lets go
    nowhere is -inf throughout.
    """
    _complete_filters(seqs, logits)
    if not bool(logits.amax(dim=-1).isfinite().all()):
        return logits, NOT_FINITE
    scores, errors = apply_filters(seqs, logits.log_softmax(dim=-1))
    for row, error in errors.items():
        filters = seqs[row].filters
        if filters is None or not filters.is_stuck:
            return scores, error
    if not bool((scores > -torch.inf).any()):
        return scores, next(iter(errors.values()), None) or _explain(seqs[0], logits[0])
    return scores, None


def _complete_filters(seqs: SequenceABC[Sequence], logits: Tensor) -> None:
    """Filters that no engine has made, for those that need no tokenizer."""
    for seq in seqs:
        if seq.filters is None and seq.params.has_filters:
            seq.filters = make_filters(seq.params, logits.shape[1])


def _explain(seq: Sequence, logits: Tensor) -> str:
    """Why a row holds no finite maximum."""
    masks = masking_filters(seq)
    if masks and bool(logits.max().isfinite()):
        return f"no token is left to choose from; {masks} let none through"
    return NOT_FINITE


def _choose(seqs: SequenceABC[Sequence], logits: Tensor, best: list[int]) -> list[int]:
    """``best`` of each row where the sequence is greedy, a random draw elsewhere."""
    rows = [row for row, seq in enumerate(seqs) if not seq.params.is_greedy]
    if not rows:
        return best
    chosen = list(best)
    num_at_once = max(1, NUM_DRAWN_LOGITS // logits.shape[1])
    for start in range(0, len(rows), num_at_once):
        block = rows[start : start + num_at_once]
        block_logits = logits if len(block) == len(seqs) else logits[block]
        drawn = _choose_randomly([seqs[row] for row in block], block_logits)
        for row, token_id in zip(block, drawn, strict=True):
            chosen[row] = token_id
    return chosen


def _choose_randomly(seqs: SequenceABC[Sequence], logits: Tensor) -> list[int]:
    """Invert the cumulative distribution, in vocabulary order, at one uniform number per row."""
    params = [seq.params for seq in seqs]
    # float32 holds nothing smaller or larger: 0 / 0 and inf / inf would be NaN.
    temperature = torch.tensor(
        [min(max(one.temperature, MIN_TEMPERATURE), MAX_TEMPERATURE) for one in params]
    )
    # From the maximum down, so that a tiny temperature gives -inf and never inf.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature.unsqueeze(1)
    scaled = keep_top_k(params, keep_typical(params, keep_min_p(params, scaled)))
    probs = keep_top_p(params, scaled.softmax(dim=-1))
    cumulative = probs.double().cumsum(dim=-1)
    total = cumulative[:, -1]
    numbers = uniforms(
        [seq.seed for seq in seqs],
        [seq.choice_idx for seq in seqs],
        [seq.num_tokens for seq in seqs],
    )
    target = torch.from_numpy(numbers) * total
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(target, below_total).unsqueeze(1)
    # The first entry above the target has probability, whatever was masked before it.
    found = torch.searchsorted(cumulative, target, right=True)[:, 0]
    token_ids: list[int] = found.clamp_(max=logits.shape[1] - 1).tolist()  # NaN rows: see sample
    return token_ids
