"""All sequences of one request, which are scheduled, preempted and resumed as one.

Owns: the sequences and timestamps of a request.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING

from .outputs import ErrorKind, Logprob, RequestMetrics
from .sequence import Sequence

if TYPE_CHECKING:
    from .beam_search import BeamSearch
    from .tokenizer import Detokenizer


class GroupStatus(Enum):
    """In which of the scheduler's queues a group stands."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED = "finished"


class SequenceGroup:
    """One request: a root sequence, and once the prompt is computed ``width`` sequences.

    Unfinished sequences of a group decode together: each of them waits, with one token left to
    compute, until all are there. A sequence without KV gets its own by a fork of the sibling with
    the longest common prefix; so a group that was preempted shares again what it shared before.

    Args:
        root: the first sequence; the others start as copies of it.
        arrival_idx: larger for later requests.
        priority: lower runs first, where the scheduler goes by priorities.
        prompt: its text, None if it came as token ids.
        make_detokenizer: makes the detokenizer of one more sequence, or None.

    Attributes:
        active: the sequences that are not finished.
        rank: place in the scheduler's order; smaller goes first.
        pending_parents: for each of ``active``, whose KV it goes on from: a beam step that the
            cache does not know yet. The token lists follow it already.
        num_cached_tokens: prompt tokens that were in the cache when it was first admitted.
        num_shared_tokens: tokens that were in the cache when it was last admitted.
        is_shielded: whether it was preempted and made no new token since.
        beams: the beam search, if it is one.
        prompt_logprobs: for the prompt's tokens so far, None for the first; None if not asked for.
        error, error_kind: what went wrong, if it ended with an error.
    """

    __slots__ = (
        "active",
        "arrival_idx",
        "beams",
        "error",
        "error_kind",
        "is_expanded",
        "is_shielded",
        "make_detokenizer",
        "metrics",
        "num_cached_tokens",
        "num_shared_tokens",
        "params",
        "pending_parents",
        "priority",
        "prompt",
        "prompt_logprobs",
        "prompt_token_ids",
        "rank",
        "request_id",
        "salt",
        "seqs",
        "status",
        "width",
    )

    def __init__(
        self,
        root: Sequence,
        *,
        arrival_idx: int,
        priority: int = 0,
        prompt: str | None = None,
        arrival_time: float = 0.0,
        make_detokenizer: Callable[[], Detokenizer | None] = lambda: None,
    ) -> None:
        params = root.params
        self.request_id = root.request_id
        self.params = params
        self.prompt = prompt
        self.prompt_token_ids = root.prompt_token_ids
        self.seqs = [root]
        self.active = [root]
        self.width = params.width
        self.is_expanded = self.width == 1
        self.arrival_idx = arrival_idx
        self.priority = priority
        self.rank = (priority, arrival_idx)
        self.salt = (params.cache_salt or "") if params.use_prefix_cache else None
        self.status = GroupStatus.WAITING
        self.pending_parents: list[int] | None = None
        self.num_cached_tokens: int | None = None
        self.num_shared_tokens = 0
        self.is_shielded = False
        self.beams: BeamSearch | None = None
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self.error: str | None = None
        self.error_kind: ErrorKind | None = None
        self.metrics = RequestMetrics(arrival_time)
        self.make_detokenizer = make_detokenizer

    @property
    def root(self) -> Sequence:
        """The first sequence."""
        return self.seqs[0]

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return not self.active

    @property
    def num_seats(self) -> int:
        """Sequences of the KV cache that it takes up, or will take up."""
        if not self.is_expanded:
            return self.width
        return sum(seq.has_kv or not seq.is_finished for seq in self.seqs)

    @property
    def is_decoding(self) -> bool:
        """Whether every unfinished sequence lacks just the K and V of its last token."""
        if self.pending_parents is not None:
            return False
        for seq in self.active:
            if not seq.has_kv or len(seq.token_ids) - seq.num_computed_tokens != 1:
                return False
        return True

    @property
    def needs_kv_change(self) -> bool:
        """Whether a fork or a reorder must come before its next decode."""
        if len(self.seqs) == 1:
            return False
        return self.pending_parents is not None or any(not seq.has_kv for seq in self.active)

    def prefill_goal(self, seq: Sequence) -> int:
        """Tokens of ``seq`` to compute before the group decodes; with it, where it is alone."""
        return seq.num_tokens if len(self.active) == 1 else seq.num_tokens - 1

    def expand(self, new_seq_id: Callable[[], int]) -> None:
        """Make the ``width`` sequences, each with the prompt's tokens; only the root has KV."""
        root = self.root
        for choice_idx in range(1, self.width):
            self.seqs.append(
                Sequence(
                    new_seq_id(),
                    root.request_id,
                    self.prompt_token_ids,
                    root.params,
                    max_tokens=root.max_tokens,
                    seed=root.seed,
                    choice_idx=choice_idx,
                    stop_token_ids=root.stop_token_ids,
                    detokenizer=self.make_detokenizer(),
                    filters=None if root.filters is None else root.filters.fork(),
                )
            )
        self.active = list(self.seqs)
        self.is_expanded = True

    def finish(
        self, reason: str, error: str | None = None, error_kind: ErrorKind | None = None
    ) -> None:
        """End every sequence that did not end yet."""
        for seq in self.active:
            seq.finish(reason)
        self.active = []
        self.error, self.error_kind = error, error_kind

    def drop_finished(self) -> None:
        """Take ended sequences off ``active``."""
        self.active = [seq for seq in self.active if not seq.is_finished]

    def forget_kv(self) -> None:
        """Note that the KV of every sequence is gone."""
        for seq in self.seqs:
            seq.has_kv = False
            seq.num_computed_tokens = seq.num_rows = 0
        self.pending_parents = None
        if self.width > 1 and not any(seq.num_output_tokens for seq in self.seqs):
            # Nothing was chosen after the prompt: the root alone computes it again.
            self.seqs = self.active = [self.root]
            self.is_expanded = False

    def num_distinct_tokens(self) -> int:
        """Tokens computed so far, where what sequences have in common counts once."""
        held = [seq for seq in self.seqs if seq.has_kv]
        total = 0
        for idx, seq in enumerate(held):
            shared = max((common_prefix(seq, other) for other in held[:idx]), default=0)
            total += max(0, seq.num_computed_tokens - shared)
        return total

    def __repr__(self) -> str:
        return f"SequenceGroup({self.request_id!r}, {self.status.value}, {self.seqs})"


def common_prefix(a: Sequence, b: Sequence) -> int:
    """Leading tokens that two sequences have in common."""
    ours, theirs = a.token_ids, b.token_ids
    low, high = 0, min(len(ours), len(theirs))
    while low < high:
        middle = (low + high + 1) // 2
        if ours[low:middle] == theirs[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
