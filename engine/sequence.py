"""One token stream: what is known of it, what is computed, and how it ended.

Owns: the token ids and timestamps of a request.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from .outputs import Logprob, RequestMetrics

if TYPE_CHECKING:
    from .logits_filters import SequenceFilters
    from .sampling_params import SamplingParams
    from .tokenizer import Detokenizer


class SequenceStatus(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """A prompt and what was generated from it.

    Attributes:
        seq_id: its name towards the KV cache; later arrivals have larger ones.
        token_ids: prompt and generated tokens.
        num_computed_tokens: leading tokens whose K and V stand in the cache.
        seed: 64-bit key of its random numbers.
        choice_idx: which of its request's candidates it is, from 0: seed and this make the numbers.
        filters: what changes its logits before a token is chosen; None if nothing does.
        prompt_token_ids: the prompt's tokens, for outputs to share.
        num_unstoppable_chars: leading text from before ``min_tokens``, where no stop string counts.
        num_searched_chars: leading text that was searched for stop strings.
        finish_reason, stop_reason, error: how it ended, see ``CompletionOutput``.
    """

    __slots__ = (
        "choice_idx",
        "cumulative_logprob",
        "detokenizer",
        "error",
        "filters",
        "finish_reason",
        "logprobs",
        "max_tokens",
        "metrics",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_reported_chars",
        "num_reported_tokens",
        "num_searched_chars",
        "num_unstoppable_chars",
        "params",
        "prompt",
        "prompt_token_ids",
        "request_id",
        "seed",
        "seq_id",
        "status",
        "stop_reason",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self,
        seq_id: int,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        max_tokens: int,
        seed: int = 0,
        stop_token_ids: frozenset[int] = frozenset(),
        prompt: str | None = None,
        arrival_time: float = 0.0,
        detokenizer: Detokenizer | None = None,
    ) -> None:
        self.seq_id = seq_id
        self.request_id = request_id
        self.prompt = prompt
        self.params = params
        self.max_tokens = max_tokens
        self.seed = seed
        self.choice_idx = 0
        self.filters: SequenceFilters | None = None
        self.stop_token_ids = stop_token_ids
        self.prompt_token_ids = list(prompt_token_ids)
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_computed_tokens = 0
        self.status = SequenceStatus.WAITING
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.logprobs: list[dict[int, Logprob]] = []
        self.cumulative_logprob = 0.0
        self.metrics = RequestMetrics(arrival_time)
        self.detokenizer = detokenizer
        self.num_reported_tokens = 0
        self.num_reported_chars = 0
        self.num_unstoppable_chars = 0
        self.num_searched_chars = 0

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that a step must still run: 1 while decoding, more while prefilling."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """A copy of the generated tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_finished(self) -> bool:
        """Whether it ended."""
        return self.status is SequenceStatus.FINISHED

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        """Mark it ended; its KV is the scheduler's to free."""
        self.status = SequenceStatus.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, {self.status.value}, "
            f"{self.num_computed_tokens}/{self.num_tokens} tokens)"
        )
