"""Chooses the next token of every sequence of a batch at once.

A row's choice depends on that row's logits, history, settings and (seed, choice, position) alone.
Everything happens where the logits are; token ids and the logprobs asked for come to the host in
one copy. Typical sampling and grammars are worked out on the host.
Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels.draw_cpu import RandomKeys, draw
from .logits_filters import apply_filters, make_filters, masking_filters
from .logprobs import TokenScores, logprob_entries, score_tokens
from .outputs import Logprob
from .sequence import Sequence
from .transfer import take_rows, to_device, to_host
from .truncation import keep_min_p, keep_top_k, keep_top_p, keep_typical

MIN_TEMPERATURE = 1e-30
MAX_TEMPERATURE = 1e30
"""Beyond these a temperature acts as its limit does: greedy, or uniform."""

NUM_DRAWN_LOGITS = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Logits that are drawn from at once: on CPU their float64 copies stay in the processor's cache, on
a GPU they take a few hundred MB."""

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
    plain_ids = _plain_tokens(seqs, logits)
    if plain_ids is not None:
        return SampledTokens(list(plain_ids), [None] * len(seqs), [None] * len(seqs))
    _complete_filters(seqs, logits)
    allowed, failed = apply_filters(seqs, logits)
    wanted = [
        (row, seq.params.num_logprobs)
        for row, seq in enumerate(seqs)
        if seq.params.num_logprobs is not None
    ]
    found, is_finite, *scores = to_host(*_pick(seqs, logits, allowed, wanted))
    chosen = found.astype(np.int64).tolist()
    errors: list[str | None] = [None] * len(seqs)
    for row in np.flatnonzero(is_finite == 0.0).tolist():
        if row not in failed:
            errors[row] = _explain(seqs[row], logits[row])
    for row, reason in failed.items():
        errors[row] = reason
    logprobs: list[dict[int, Logprob] | None] = [None] * len(seqs)
    if wanted:
        rows, counts = zip(*wanted, strict=True)
        entries = logprob_entries([chosen[row] for row in rows], counts, scores)
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


def _plain_tokens(seqs: SequenceABC[Sequence], logits: Tensor) -> list[int] | None:
    """Each row's token, if all are plain and on the CPU; else None.

    NumPy and our own draws are ten times as fast as torch, whose operators and threads would take a
    good part of a step at a few hundred logits a row.
    """
    if logits.device.type != "cpu" or not all(seq.is_plain for seq in seqs):
        return None
    values = logits.numpy()
    chosen = values.argmax(axis=1)
    if not np.isfinite(values[np.arange(len(chosen)), chosen]).all():  # somebody's error
        return None
    rows = [row for row, seq in enumerate(seqs) if not seq.params.is_greedy]
    if rows:
        chosen[rows] = _draw(seqs, rows, logits)
    token_ids: list[int] = chosen.tolist()
    return token_ids


def _pick(
    seqs: SequenceABC[Sequence], logits: Tensor, allowed: Tensor, wanted: list[tuple[int, int]]
) -> tuple[Tensor, ...]:
    """Token ids ``[num_seqs]``, whether each row had a finite maximum, and a ``TokenScores`` of
    the rows ``wanted``, with their numbers of logprobs; all on the device, and nothing waits."""
    best = allowed.max(dim=-1)
    chosen = _choose(seqs, allowed, best.indices)
    scores: TokenScores | tuple[()] = ()
    if wanted:
        rows, counts = zip(*wanted, strict=True)
        scores = score_tokens(take_rows(logits, rows), take_rows(chosen, rows), max(counts))
    return chosen, best.values.isfinite(), *scores


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


def _choose(seqs: SequenceABC[Sequence], logits: Tensor, best: Tensor) -> Tensor:
    """``best`` of each row where the sequence is greedy, a random draw elsewhere."""
    rows = [row for row, seq in enumerate(seqs) if not seq.params.is_greedy]
    if logits.device.type == "cpu":
        # As among plain ones: what a sequence draws must not depend on who else is there.
        whole = [row for row in rows if not seqs[row].params.truncates]
        rows = [row for row in rows if seqs[row].params.truncates]
        if whole:
            drawn = torch.tensor(_draw(seqs, whole, logits))
            best = best.index_copy(0, torch.tensor(whole), drawn)
    if not rows:
        return best
    num_at_once = max(1, NUM_DRAWN_LOGITS[logits.device.type] // logits.shape[1])
    blocks = [rows[start : start + num_at_once] for start in range(0, len(rows), num_at_once)]
    found = torch.cat(
        [_choose_randomly([seqs[row] for row in some], take_rows(logits, some)) for some in blocks]
    )
    if len(rows) == len(seqs):
        return found
    return best.index_copy(0, to_device(np.array(rows), best.device), found)


def _draw(seqs: SequenceABC[Sequence], rows: list[int], logits: Tensor) -> list[int]:
    """A draw from the whole distribution, on the CPU, for the sequences ``seqs[row]``."""
    drawn = [seqs[row] for row in rows]
    return draw(logits.contiguous(), rows, _temperatures(drawn), _keys(drawn))


def _temperatures(seqs: SequenceABC[Sequence]) -> list[float]:
    # float32 holds nothing smaller or larger: 0 / 0 and inf / inf would be NaN.
    return [min(max(seq.params.temperature, MIN_TEMPERATURE), MAX_TEMPERATURE) for seq in seqs]


def _keys(seqs: SequenceABC[Sequence]) -> RandomKeys:
    return RandomKeys(
        [seq.seed for seq in seqs],
        [seq.choice_idx for seq in seqs],
        [len(seq.token_ids) for seq in seqs],
    )


def _choose_randomly(seqs: SequenceABC[Sequence], logits: Tensor) -> Tensor:
    """Invert the cumulative distribution, in vocabulary order, at one uniform number per row."""
    params = [seq.params for seq in seqs]
    temperatures = np.array(_temperatures(seqs), dtype=np.float32)
    temperature = to_device(temperatures, logits.device)
    # From the maximum down, so that a tiny temperature gives -inf and never inf.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature.unsqueeze(1)
    scaled = keep_top_k(params, keep_typical(params, keep_min_p(params, scaled)))
    probs = keep_top_p(params, scaled.softmax(dim=-1))
    cumulative = probs.double().cumsum(dim=-1)
    total = cumulative.select(1, -1)
    target = to_device(_keys(seqs).uniforms(), logits.device) * total
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(target, below_total).unsqueeze(1)
    # The first entry above the target has probability, whatever was masked before it.
    found = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return found.clamp_(max=logits.shape[1] - 1)  # NaN rows: see sample
