"""Whether two runs of a workload gave the same tokens.

Token-exact means: tokens are equal; where one differs, the model itself, given all that came
before, is undecided between the two by less than ``MAX_GAP``, and that happens to one sequence in
``SEQUENCES_A_DIFFERENCE`` at most (one is always allowed); log-probabilities agree within
``MAX_GAP``. For greedy sequences the gap is between the two best logits. For sampled ones it is how
far the random number stood from the interval that the other token has in the cumulative
distribution; for beams, how far the sums of log-probabilities are apart.

Owns: nothing.  Thread-safety: none; the model must not be in use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...kernels.draw_cpu import RandomKeys
from .replay import ServedCompletion, ServedRequest
from .workload import Workload, WorkloadRequest

MAX_GAP = 1e-4
SEQUENCES_A_DIFFERENCE = 1000


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a sequence parted from the reference.

    Attributes:
        workload, run: in which workload, and in which run of it, in words.
        request_idx, choice_idx: the sequence.
        token_idx: the first token that differs; None for a beam.
        gap: see the head of the file.
    """

    workload: str
    run: str
    request_idx: int
    choice_idx: int
    token_idx: int | None
    gap: float

    @property
    def is_tie(self) -> bool:
        """Whether the model is undecided there."""
        return self.gap < MAX_GAP

    def __str__(self) -> str:
        at = "" if self.token_idx is None else f" at token {self.token_idx}"
        return (
            f"{self.workload}, {self.run}: request {self.request_idx}, completion "
            f"{self.choice_idx} differs{at}; gap {self.gap:.1e}"
        )


@dataclass(slots=True)
class Equality:
    """What comparing found.

    Attributes:
        num_sequences: completions of the reference runs.
        num_compared: completions that were compared with one of them.
        num_unserved: completions that a run, or the reference run, did not get: they did not fit.
        differences: all of them.
        num_logprobs: tokens whose log-probabilities were compared.
        max_logprob_difference: the largest difference of those.
    """

    num_sequences: int = 0
    num_compared: int = 0
    num_unserved: int = 0
    differences: list[Difference] = field(default_factory=list)
    num_logprobs: int = 0
    max_logprob_difference: float = 0.0

    @property
    def num_different(self) -> int:
        """Sequences that differ in some run."""
        names = {(one.workload, one.request_idx, one.choice_idx) for one in self.differences}
        return len(names)

    @property
    def is_equal(self) -> bool:
        """Whether outputs are token-exact; if there was nothing to compare, nobody knows."""
        return (
            self.num_compared > 0
            and all(one.is_tie for one in self.differences)
            and self.num_different <= max(1, self.num_sequences // SEQUENCES_A_DIFFERENCE)
            and self.max_logprob_difference <= MAX_GAP
        )

    @property
    def words(self) -> str:
        """The outcome for people."""
        count = f"{self.num_compared:,} completions compared"
        if self.num_unserved:
            count += f", {self.num_unserved:,} did not fit"
        limit = self.max_logprob_difference
        within = f"within {limit:.1e}" if limit else "equal to the bit"
        logprobs = f"{self.num_logprobs:,} log-probabilities {within}"
        if not self.num_compared:
            return f"Outputs NOT COMPARED: no request was served by two runs ({count})"
        if not self.is_equal:
            return f"Outputs DIFFER: {self.num_different:,} sequences ({count}; {logprobs})"
        if self.differences:
            return f"Outputs equal but for {self.num_different:,} ties ({count}; {logprobs})"
        return f"Outputs equal, token for token ({count}; {logprobs})"


def compare_outputs(
    equality: Equality,
    model: torch.nn.Module,
    workload: Workload,
    reference: Sequence[ServedRequest],
    served: Sequence[ServedRequest],
    run: str,
) -> None:
    """Compare a run with the reference run of the same workload, and note it in ``equality``."""
    for idx, (asked, wanted, got) in enumerate(
        zip(workload.requests, reference, served, strict=True)
    ):
        if wanted.error is not None or got.error is not None:
            equality.num_unserved += asked.num_completions
            continue
        pairs = zip(wanted.completions, got.completions, strict=True)
        for choice_idx, (one, other) in enumerate(pairs):
            equality.num_compared += 1
            num_equal = len(one.token_ids)
            if one.token_ids != other.token_ids:
                num_equal = _first_difference(one.token_ids, other.token_ids)
                is_beam = asked.method == "beam"
                equality.differences.append(
                    Difference(
                        workload.name,
                        run,
                        idx,
                        choice_idx,
                        None if is_beam else num_equal,
                        _beam_gap(one, other)
                        if is_beam
                        else _gap(model, asked, choice_idx, one.token_ids, other.token_ids),
                    )
                )
            _compare_logprobs(equality, one.logprobs[:num_equal], other.logprobs[:num_equal])


def _compare_logprobs(equality: Equality, ours: list[float], theirs: list[float]) -> None:
    """Note the differences of equal tokens, where both were asked for."""
    gaps = [_known(abs(a - b)) for a, b in zip(ours, theirs, strict=False)]
    equality.num_logprobs += len(gaps)
    equality.max_logprob_difference = max(equality.max_logprob_difference, *gaps, 0.0)


def _known(gap: float) -> float:
    """A gap that is no number is as wide as can be: ``max`` and ``<`` would overlook it."""
    return math.inf if math.isnan(gap) else gap


def _beam_gap(one: ServedCompletion, other: ServedCompletion) -> float:
    if one.cumulative_logprob is None or other.cumulative_logprob is None:
        return math.inf
    return _known(abs(one.cumulative_logprob - other.cumulative_logprob))


def _first_difference(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    places = (idx for idx, (a, b) in enumerate(pairs) if a != b)
    return next(places, min(len(one), len(other)))


@torch.inference_mode()
def _gap(
    model: Any,
    asked: WorkloadRequest,
    choice_idx: int,
    one: list[int],
    other: list[int],
) -> float:
    """How undecided the model is where two completions part."""
    token_idx = _first_difference(one, other)
    if token_idx >= min(len(one), len(other)):
        return math.inf  # one is shorter: nothing that rounding does
    before = [*asked.prompt_token_ids, *one[:token_idx]]
    device = next(model.parameters()).device
    logits = model(torch.tensor([before], device=device), use_cache=False).logits[0, -1].float()
    rivals = one[token_idx], other[token_idx]
    if asked.method == "greedy":
        best = float(logits.max())
        return max(_known(best - float(logits[token_id])) for token_id in rivals)
    cumulative = logits.softmax(-1).double().cumsum(-1)
    (uniform,) = RandomKeys([asked.seed], [choice_idx], [len(before)]).uniforms()
    number = float(uniform) * float(cumulative[-1])
    return max(_distance(number, cumulative, token_id) for token_id in rivals)


def _distance(number: float, cumulative: torch.Tensor, token_id: int) -> float:
    """From a number to the interval that a token has."""
    low = float(cumulative[token_id - 1]) if token_id else 0.0
    gaps = low - number, number - float(cumulative[token_id])
    return max(0.0, *map(_known, gaps))
