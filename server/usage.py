"""Counts the tokens of a request.

Owns: the counts of one request.  Thread-safety: none; one event loop.
"""

from __future__ import annotations

from collections import Counter

from ..engine import RequestOutput
from .protocol.generation import PromptTokensDetails, Usage


class UsageCounter:
    """Prompt tokens once for each prompt, generated tokens of all its completions."""

    def __init__(self) -> None:
        self._num_prompt_tokens: dict[int, int] = {}
        self._num_cached_tokens: dict[int, int] = {}
        self._num_choice_tokens: Counter[tuple[int, int]] = Counter()

    def add(self, prompt_idx: int, output: RequestOutput) -> None:
        """Count what is new in an output."""
        self._num_prompt_tokens[prompt_idx] = len(output.prompt_token_ids)
        self._num_cached_tokens[prompt_idx] = output.num_cached_tokens or 0
        for completion in output.outputs:
            self._num_choice_tokens[prompt_idx, completion.index] += len(completion.token_ids)

    def total(self) -> Usage:
        """Everything so far."""
        return _usage(
            sum(self._num_prompt_tokens.values()),
            self._num_choice_tokens.total(),
            sum(self._num_cached_tokens.values()),
        )

    def of_choice(self, prompt_idx: int, index: int) -> Usage:
        """A prompt and one of its completions, so far."""
        return _usage(
            self._num_prompt_tokens[prompt_idx],
            self._num_choice_tokens[prompt_idx, index],
            self._num_cached_tokens[prompt_idx],
        )


def _usage(num_prompt_tokens: int, num_completion_tokens: int, num_cached_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_completion_tokens,
        total_tokens=num_prompt_tokens + num_completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=num_cached_tokens),
    )
