"""A beam search over the sequences of a group: its steps become tokens, its results outputs.

Owns: nothing; the search is ``SequenceGroup.beams``.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .logprobs import token_logprobs
from .outputs import CompletionOutput, Logprob
from .sequence_group import SequenceGroup
from .transfer import take_rows


def advance_beams(
    group: SequenceGroup,
    logits: Tensor,
    scores: Tensor,
    name_candidates: Callable[[list[dict[int, Logprob]]], None],
) -> str | None:
    """One step of the group's beam search; what went wrong, or None.

    The token lists follow the search at once. The cache follows when the group is next scheduled,
    see ``SequenceGroup.pending_parents``.

    Args:
        logits, scores: ``[num_beams, vocab_size]``, one row at the first step; see
            ``sampler.score_beams``.
        name_candidates: gives logprobs the text of their tokens.
    """
    assert group.beams is not None
    beams, seqs = group.beams, group.active
    step = beams.advance(scores)
    num_logprobs = group.params.logprobs
    new_logprobs: list[dict[int, Logprob]] = []
    if num_logprobs is not None:
        last_ids = [hypothesis.token_ids[-1] for hypothesis in step.finished]
        rows = [*step.parent_idx, *(hypothesis.parent_idx for hypothesis in step.finished)]
        rows = [min(row, len(logits) - 1) for row in rows]
        token_ids = [*step.token_ids, *last_ids]
        counts = [num_logprobs] * len(rows)
        new_logprobs = token_logprobs(take_rows(logits, rows), token_ids, counts)
        name_candidates(new_logprobs)
        for hypothesis, entry in zip(step.finished, new_logprobs[len(seqs) :], strict=True):
            hypothesis.logprobs = [*seqs[hypothesis.parent_idx].logprobs, entry]
    if step.is_done:
        if not beams.results():
            return "no beam came to an end"
        group.finish("stop")
        return None
    parents = [seqs[idx] for idx in step.parent_idx]
    tokens = [
        [*parent.token_ids, token_id]
        for parent, token_id in zip(parents, step.token_ids, strict=True)
    ]
    logprobs = [
        [*parent.logprobs, entry] for parent, entry in zip(parents, new_logprobs, strict=False)
    ]
    # Each remembers its own way; two that go on from one parent part here.
    filters = [None if parent.filters is None else parent.filters.fork() for parent in parents]
    for idx, seq in enumerate(seqs):
        seq.token_ids, seq.filters = tokens[idx], filters[idx]
        if logprobs:
            seq.logprobs = logprobs[idx]
    is_moved = step.parent_idx != list(range(len(seqs)))
    if is_moved and all(seq.has_kv for seq in seqs):
        group.pending_parents = step.parent_idx
    return None


def beam_completions(group: SequenceGroup) -> list[CompletionOutput]:
    """The results of a finished search, best first."""
    assert group.beams is not None
    params = group.params
    completions = []
    for idx, hypothesis in enumerate(group.beams.results()):
        token_ids = hypothesis.token_ids
        is_stop = hypothesis.finish_reason == "stop"
        shown = token_ids[:-1] if is_stop and not params.include_stop_str_in_output else token_ids
        text = ""
        detokenizer = group.make_detokenizer()
        if detokenizer is not None:
            detokenizer.finish(shown)
            text = detokenizer.text
        is_named = is_stop and token_ids[-1] in (params.stop_token_ids or ())
        completions.append(
            CompletionOutput(
                index=idx,
                text=text,
                token_ids=token_ids,
                cumulative_logprob=hypothesis.cumulative_logprob,
                logprobs=hypothesis.logprobs,
                finish_reason=hypothesis.finish_reason,
                stop_reason=token_ids[-1] if is_named else None,
            )
        )
    return completions
