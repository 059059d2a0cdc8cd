"""What the logits of a step make of the sequences: tokens, beams, logprobs, ends.

Owns: the text of tokens seen in logprobs.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .beam_decoding import advance_beams
from .logprobs import prompt_logprobs
from .outputs import Logprob
from .sampler import SampledTokens, sample, score_beams
from .schedule import ScheduledBatch, ScheduledGroup
from .scheduler import Scheduler
from .sequence import Sequence
from .sequence_group import SequenceGroup
from .stop import check_stop, complete_text
from .token_counts import TokenCounts
from .transfer import take_rows


def scored_prompts(batch: ScheduledBatch) -> frozenset[int]:
    """Places in ``batch.seqs`` of prompts whose own tokens are to be scored, so at every row."""
    groups = [part.group for part in batch.groups if part.group.prompt_logprobs is not None]
    wanted = {
        group.root.seq_id
        for group in groups
        if len(group.prompt_logprobs or ()) < len(group.prompt_token_ids)
    }
    if not wanted:
        return frozenset()
    return frozenset(idx for idx, seq in enumerate(batch.seqs) if seq.seq_id in wanted)


_Scored = list[tuple[SequenceGroup, list[dict[int, Logprob]]]]


@dataclass(slots=True)
class _Ends:
    """The sequences that reached their last token, and the rows of logits they go by.

    Attributes:
        groups: groups that get tokens, or end for want of any to get.
        seqs, rows: sequences that sample, and the row of each.
        beams: groups in a beam search, and the rows of their beams.
    """

    groups: list[SequenceGroup] = field(default_factory=list)
    seqs: list[Sequence] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    beams: list[tuple[SequenceGroup, list[int]]] = field(default_factory=list)


class Generation:
    """Gives every sequence whose end was computed its next token.

    Args:
        scheduler: told what was computed and what ended.
        tokenizer: for the text of logprobs, or None.
        new_seq_id: names the sequences of requests that have several.
        clock: seconds, for when tokens were there.

    Attributes:
        tokens: what is counted as steps go by.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        tokenizer: Any,
        new_seq_id: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._tokenizer = tokenizer
        self._new_seq_id = new_seq_id
        self._decoded_tokens: dict[int, str] = {}
        self.tokens = TokenCounts()

    def advance(
        self,
        batch: ScheduledBatch,
        logits: Tensor,
        ended: list[SequenceGroup],
        started: float,
    ) -> list[SequenceGroup]:
        """Append tokens; returns the groups that have something new.

        Args:
            logits: float32 ``[num_rows, vocab_size]`` as ``ModelRunner.forward`` gives them, every
                row of ``scored_prompts(batch)`` included.
            ended: takes the groups that end here, also if this raises. Sequences without a new
                token are then as if their last one was never run.
            started: when the step began, by the same clock.
        """
        ends, scored = self._read(batch, logits)
        sampled = None
        if ends.seqs:
            sampled = sample(ends.seqs, take_rows(logits, ends.rows))
        beams = []
        for group, rows in ends.beams:
            own_logits = take_rows(logits, rows)
            scored_beams = score_beams(group.active[: len(rows)], own_logits)
            beams.append((group, own_logits, *scored_beams))
        # Tokens have come to the host by now, so what computed them is done.
        now = self._clock()
        try:
            self._scheduler.complete(batch)
            for part in batch.groups:
                if part.group.metrics.first_scheduled_time is None:
                    part.group.metrics.first_scheduled_time = started
            for group, entries in scored:
                self._name_candidates(entries)
                assert group.prompt_logprobs is not None
                group.prompt_logprobs.extend(entries)
            for group in ends.groups:
                self._note_time(group, now)
            if sampled is not None:
                self._append_all(ends, sampled)
            for group, own_logits, scores, error in beams:
                if error is None:
                    self.tokens.note_generated(len(group.active))
                    error = advance_beams(group, own_logits, scores, self._name_candidates)
                if error is not None:
                    _fail(group, error)
        finally:
            self._settle(ends.groups, ended)
        return ends.groups

    def _note_time(self, group: SequenceGroup, now: float) -> None:
        """The end of its prompt was computed, or of what it wrote since."""
        metrics = group.metrics
        if metrics.first_token_time is None:
            self.tokens.note_prompt(len(group.prompt_token_ids))
        if group.root.max_tokens != 0:
            metrics.first_token_time = metrics.first_token_time or now
            metrics.last_token_time = now

    def _read(self, batch: ScheduledBatch, logits: Tensor) -> tuple[_Ends, _Scored]:
        """Who gets a token from which row, and the scores of prompt tokens."""
        ends, scored = _Ends(), _Scored()
        all_rows, idx, row = scored_prompts(batch), 0, 0
        for part in batch.groups:
            rows: list[int] = []
            for seq, num_new_tokens in zip(part.seqs, part.num_new_tokens, strict=True):
                is_end = len(seq.token_ids) - seq.num_computed_tokens == num_new_tokens
                num_rows = 1 if is_end else 0
                if all_rows and idx in all_rows:
                    num_rows = num_new_tokens
                    entries = _prompt_scores(part.group, seq, logits[row : row + num_rows])
                    scored.append((part.group, entries))
                idx, row = idx + 1, row + num_rows
                if is_end:
                    rows.append(row - 1)
            if rows:
                self._note_ends(part, rows, ends)
        return ends, scored

    def _note_ends(self, part: ScheduledGroup, rows: list[int], ends: _Ends) -> None:
        group, seqs = part.group, part.seqs
        ends.groups.append(group)
        if seqs[0].max_tokens == 0:  # only its prompt was asked for
            return
        if not group.is_expanded:
            group.expand(self._new_seq_id)
            seqs = group.active
            if group.beams is None:
                rows = rows * len(seqs)
        if group.beams is not None:
            ends.beams.append((group, rows))
        else:
            ends.seqs.extend(seqs)
            ends.rows.extend(rows)

    def _append_all(self, ends: _Ends, sampled: SampledTokens) -> None:
        """Append what was chosen. An error ends the whole request, and no other one."""
        groups = {seq.seq_id: group for group in ends.groups for seq in group.active}
        for idx, seq in enumerate(ends.seqs):
            token_id, error = sampled.token_ids[idx], sampled.errors[idx]
            if token_id is None:
                _fail(groups[seq.seq_id], error or "no token was chosen")
            elif not seq.is_finished:
                self._append(seq, token_id, sampled.logprobs[idx])

    def _append(self, seq: Sequence, token_id: int, logprobs: dict[int, Logprob] | None) -> None:
        num_tokens, cumulative_logprob = seq.num_tokens, seq.cumulative_logprob
        try:
            seq.token_ids.append(token_id)
            if logprobs is not None:
                self._name_candidates([logprobs])
                seq.logprobs.append(logprobs)
                seq.cumulative_logprob += logprobs[token_id].logprob
            check_stop(seq)
            self.tokens.note_generated(1)
        except BaseException:
            if not seq.is_finished:
                del seq.token_ids[num_tokens:]
                del seq.logprobs[num_tokens - seq.num_prompt_tokens :]
                seq.cumulative_logprob = cumulative_logprob
            raise

    def _name_candidates(self, entries: list[dict[int, Logprob]]) -> None:
        """Give logprobs the text of their tokens."""
        if self._tokenizer is None:
            return
        for candidates in entries:
            for token_id, entry in candidates.items():
                text = self._decoded_tokens.get(token_id)
                if text is None:
                    text = self._decoded_tokens[token_id] = self._tokenizer.decode([token_id])
                entry.decoded_token = text

    def _settle(self, groups: list[SequenceGroup], ended: list[SequenceGroup]) -> None:
        """Release what ended; let the last token of what got none be computed again."""
        changed = []
        for group in groups:
            if group.root.max_tokens == 0 and group.root.num_uncomputed_tokens == 0:
                group.finish("length")
            has_ended = group.is_finished
            for seq in group.active:
                if seq.finish_reason is not None:
                    has_ended = True
                elif len(seq.token_ids) == seq.num_computed_tokens:
                    seq.num_computed_tokens -= 1
            if has_ended:
                changed.append(group)
        if changed:
            self._scheduler.release(changed)
            ended.extend(group for group in changed if group.is_finished)


def _prompt_scores(group: SequenceGroup, seq: Sequence, logits: Tensor) -> list[dict[int, Logprob]]:
    """Scores of the prompt tokens behind these rows, without those that are there already."""
    assert group.prompt_logprobs is not None
    assert group.params.prompt_logprobs is not None
    start = seq.num_computed_tokens
    # A request that was preempted comes by again.
    skipped = max(0, len(group.prompt_logprobs) - 1 - start)
    next_ids = group.prompt_token_ids[start + 1 + skipped : start + 1 + len(logits)]
    return prompt_logprobs(logits[skipped:], next_ids, group.params.prompt_logprobs)


def _fail(group: SequenceGroup, error: str) -> None:
    for seq in group.active:
        complete_text(seq)
    group.finish("error", f"request {group.request_id}: {error}", "request")
