"""Beam search over scores that somebody else computes, as Hugging Face's ``generate`` does it.

Follows ``GenerationMixin._beam_search`` of transformers 5 for one prompt, float32 operation by
operation, so that ties and rounding fall the same way.
Owns: the running and finished beams of one request.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError
from .outputs import Logprob
from .transfer import to_device, to_host

NO_BEAM = -1.0e9
"""Added to the score of what must not be chosen; finite, so chosen for want of better."""

_REAL_SCORE = NO_BEAM / 2
"""Sums of log-probabilities below this hold ``NO_BEAM``, or lead through masked tokens."""


@dataclass(slots=True)
class BeamHypothesis:
    """A finished beam.

    Attributes:
        token_ids: generated tokens, the end token included.
        cumulative_logprob: sum of their scores.
        score: that, divided by ``len(token_ids) ** length_penalty``.
        finish_reason: ``"stop"`` at an end token, ``"length"`` at the token limit.
        parent_idx: the running beam that its last token was added to.
        logprobs: for the caller to keep, per token, what the request asked to report.
    """

    token_ids: list[int]
    cumulative_logprob: float
    score: float
    finish_reason: str
    parent_idx: int
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass(slots=True)
class BeamStep:
    """How the running beams go on.

    Attributes:
        parent_idx: per new beam, the old one whose tokens (and KV) it continues.
        token_ids: per new beam, the token added to it.
        finished: beams that ended in this step and are among the best so far.
        is_done: whether the search is over; the running beams are then of no use.
    """

    parent_idx: list[int]
    token_ids: list[int]
    finished: list[BeamHypothesis]
    is_done: bool


class BeamSearch:
    """The ``width`` most likely continuations of one prompt.

    Args:
        width: running beams; ``num_beams`` of ``generate``.
        num_returned: most results.
        max_tokens: a beam of that many tokens is finished.
        end_token_ids: a beam that ends in one is finished. Ban them in the scores to forbid it.
        length_penalty: results rank by cumulative log-probability / length ** this.
        early_stopping: True stops once ``width`` beams are finished; False when the best running
            beam, at its present length, would not make it into the results; ``"never"`` when it
            would not at the most favourable length either.

    Raises ``ConfigError`` for counts that cannot work.
    """

    def __init__(
        self,
        width: int,
        num_returned: int,
        max_tokens: int,
        end_token_ids: Iterable[int] = (),
        *,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
    ) -> None:
        if not 1 <= num_returned <= width:
            raise ConfigError(
                f"num_returned is {num_returned}; it must be from 1 to width, {width}"
            )
        if max_tokens < 1:
            raise ConfigError(f"max_tokens is {max_tokens}; it must be at least 1")
        self._width = width
        self._num_returned = num_returned
        self._max_tokens = max_tokens
        self._end_ids = torch.tensor(sorted(set(end_token_ids)), dtype=torch.int64)
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        # Enough that `width` can go on when the best ones all end.
        self._num_candidates = max(2, 1 + len(self._end_ids)) * width
        self._num_tokens = 0
        self._is_done = False
        self._running: list[list[int]] = [[] for _ in range(width)]
        # All beams are equal at first: only one may be continued.
        self._running_scores = torch.zeros(1, width)
        self._running_scores[:, 1:] = NO_BEAM
        self._finished: list[BeamHypothesis | None] = [None] * width
        self._finished_scores = torch.full((1, width), NO_BEAM)
        self._is_finished = torch.zeros(1, width, dtype=torch.bool)
        self._can_improve = True

    @property
    def is_done(self) -> bool:
        """Whether the search is over."""
        return self._is_done

    @property
    def running(self) -> list[list[int]]:
        """Generated tokens of each running beam."""
        return self._running

    @torch.inference_mode()
    def advance(self, scores: Tensor) -> BeamStep:
        """Add a token to every beam.

        Args:
            scores: log-probabilities of the next token, after any filters, ``[width, vocab_size]``
                in the order of the last step's beams; the first step takes ``[1, vocab_size]`` too.
                On any device: the best few come to the host.
        """
        if self._is_done:
            raise ValueError("the beam search is over")
        vocab_size = scores.shape[1]
        if self._num_tokens == 0:
            scores = scores[:1].expand(self._width, vocab_size)
        running = to_device(self._running_scores[0], scores.device)
        totals = (scores.float() + running[:, None]).reshape(1, -1)
        # The rest goes by few numbers, and on the host.
        best = torch.topk(totals, k=min(self._num_candidates, totals.shape[1]))
        best_totals, places = map(torch.from_numpy, to_host(best.values, best.indices))
        best_totals, places = best_totals.float(), places.long()
        parents, token_ids = places // vocab_size, places % vocab_size
        num_tokens = self._num_tokens + 1
        if num_tokens >= self._max_tokens:
            has_ended = torch.ones_like(token_ids, dtype=torch.bool)
        else:
            has_ended = torch.isin(token_ids, self._end_ids)
        candidates = list(zip(parents[0].tolist(), token_ids[0].tolist(), strict=True))
        finished = self._keep_finished(candidates, best_totals, has_ended)
        kept_parents, kept_tokens = self._keep_running(candidates, best_totals, has_ended)
        self._num_tokens = num_tokens
        self._is_done = self._has_stopped(bool(has_ended.all()))
        return BeamStep(kept_parents, kept_tokens, finished, self._is_done)

    def results(self) -> list[BeamHypothesis]:
        """The best finished beams, best first.

        Fewer than ``num_returned`` where filters left fewer ways to go on: Hugging Face fills the
        rest up with copies of no meaning.
        """
        found = [
            hypothesis
            for hypothesis in self._finished
            if hypothesis is not None and hypothesis.cumulative_logprob > _REAL_SCORE
        ]
        return found[: self._num_returned]

    def _keep_running(
        self, candidates: list[tuple[int, int]], totals: Tensor, has_ended: Tensor
    ) -> tuple[list[int], list[int]]:
        """Continue the best candidates that have not ended; their parents and tokens."""
        totals = totals + has_ended.to(torch.float32) * NO_BEAM
        places = torch.topk(totals, k=self._width)[1]
        self._running_scores = totals.gather(1, places)
        parents, token_ids = [], []
        for place in places[0].tolist():
            parent, token_id = candidates[place]
            parents.append(parent)
            token_ids.append(token_id)
        self._running = [
            [*self._running[parent], token_id]
            for parent, token_id in zip(parents, token_ids, strict=True)
        ]
        return parents, token_ids

    def _keep_finished(
        self, candidates: list[tuple[int, int]], totals: Tensor, has_ended: Tensor
    ) -> list[BeamHypothesis]:
        """Put ended candidates among the best finished beams; those that got in."""
        # The others are only there so that enough are left to go on.
        is_eligible = torch.arange(len(candidates)).unsqueeze(0) < self._width
        is_new = has_ended & is_eligible
        scores = totals / ((self._num_tokens + 1) ** self._length_penalty)
        is_full = bool(self._is_finished.all()) and self._early_stopping is True
        # Float32 sums, as there: these may be told apart by rounding.
        scores += float(is_full) * NO_BEAM
        scores += float(not self._can_improve) * NO_BEAM
        scores += (~is_new) * NO_BEAM
        merged_scores = torch.cat((self._finished_scores, scores), dim=1)
        merged_is_finished = torch.cat((self._is_finished, is_new), dim=1)
        places = torch.topk(merged_scores, k=self._width)[1]
        self._finished_scores = merged_scores.gather(1, places)
        self._is_finished = merged_is_finished.gather(1, places)
        kept: list[BeamHypothesis | None] = []
        entered: list[BeamHypothesis] = []
        for rank, place in enumerate(places[0].tolist()):
            candidate = place - self._width
            if candidate < 0:
                kept.append(self._finished[place])
            elif not bool(is_new[0, candidate]):
                kept.append(None)
            else:
                total, score = float(totals[0, candidate]), float(self._finished_scores[0, rank])
                entered.append(self._hypothesis(candidates[candidate], total, score))
                kept.append(entered[-1])
        self._finished = kept
        return entered

    def _hypothesis(self, candidate: tuple[int, int], total: float, score: float) -> BeamHypothesis:
        parent_idx, token_id = candidate
        is_end = bool((self._end_ids == token_id).any())
        return BeamHypothesis(
            [*self._running[parent_idx], token_id],
            total,
            score,
            "stop" if is_end else "length",
            parent_idx,
        )

    def _has_stopped(self, has_none_to_continue: bool) -> bool:
        """Whether the next step is the last one's business no more."""
        best_running = self._running_scores[:, :1]
        is_to_the_end = self._early_stopping == "never" and self._length_penalty > 0.0
        length = self._max_tokens if is_to_the_end else self._num_tokens
        best_possible = best_running / (length**self._length_penalty)
        worst = self._finished_scores.min(dim=1, keepdim=True)[0]
        worst_finished = torch.where(self._is_finished, worst, NO_BEAM)
        self._can_improve = self._can_improve and bool((best_possible > worst_finished).any())
        is_full = bool(self._is_finished.all()) and self._early_stopping is True
        # Not Hugging Face's: nothing but placeholders runs on where filters leave no token.
        is_dead = bool(best_running <= _REAL_SCORE)
        return not self._can_improve or is_full or has_none_to_continue or is_dead
