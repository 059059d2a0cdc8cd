"""One token stream: what is known of it, what is computed, and how it ended.

Owns: the token ids of one completion.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .outputs import Logprob

if TYPE_CHECKING:
    from .logits_filters import SequenceFilters
    from .sampling_params import SamplingParams
    from .tokenizer import Detokenizer


class Sequence:
    """A prompt and what was generated from it.

    Attributes:
        seq_id: its name towards the KV cache.
        choice_idx: its number among the sequences of its request; part of its random numbers' key.
        prompt_token_ids: the prompt's tokens, for all sequences of a request to share.
        token_ids: prompt and generated tokens.
        num_computed_tokens: leading tokens whose K and V stand in the cache.
        num_rows: rows that are backed for it; more than the above while a step is under way.
        has_kv: whether the cache knows it, swapped out or not.
        seed: 64-bit key of its random numbers.
        filters: what changes its logits before a token is chosen; None if nothing does.
        is_plain: whether its next token needs no more than the logits and a temperature: nothing
            changes them, nothing is cut off, nobody asks for logprobs.
        is_end_reported: whether an output said that it ended.
        num_unstoppable_chars: leading text from before ``min_tokens``, where no stop string counts.
        num_searched_chars: leading text that was searched for stop strings.
        finish_reason, stop_reason: how it ended, see ``CompletionOutput``.
    """

    __slots__ = (
        "choice_idx",
        "cumulative_logprob",
        "detokenizer",
        "filters",
        "finish_reason",
        "has_kv",
        "is_end_reported",
        "is_plain",
        "logprobs",
        "max_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_reported_chars",
        "num_reported_tokens",
        "num_rows",
        "num_searched_chars",
        "num_unstoppable_chars",
        "params",
        "prompt_token_ids",
        "request_id",
        "seed",
        "seq_id",
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
        choice_idx: int = 0,
        stop_token_ids: frozenset[int] = frozenset(),
        detokenizer: Detokenizer | None = None,
        filters: SequenceFilters | None = None,
    ) -> None:
        self.seq_id = seq_id
        self.request_id = request_id
        self.choice_idx = choice_idx
        self.params = params
        self.max_tokens = max_tokens
        self.seed = seed
        self.stop_token_ids = stop_token_ids
        self.filters = filters
        self.is_plain = (
            not params.has_filters
            and (params.is_greedy or not params.truncates)
            and params.min_tokens == 0
            and params.num_logprobs is None
        )
        self.prompt_token_ids = prompt_token_ids
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_rows = 0
        self.has_kv = False
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.logprobs: list[dict[int, Logprob]] = []
        self.cumulative_logprob = 0.0
        self.detokenizer = detokenizer
        self.num_reported_tokens = 0
        self.num_reported_chars = 0
        self.num_unstoppable_chars = 0
        self.num_searched_chars = 0
        self.is_end_reported = False

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
        return self.finish_reason is not None

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        """Mark it ended; its KV is the scheduler's to free."""
        self.finish_reason = reason
        self.stop_reason = stop_reason

    def __repr__(self) -> str:
        state = self.finish_reason or ("with KV" if self.has_kv else "without KV")
        return (
            f"Sequence({self.seq_id}, {state}, {self.num_computed_tokens}/{self.num_tokens} tokens)"
        )
