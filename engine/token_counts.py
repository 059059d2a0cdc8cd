"""Tokens that went through an engine: of prompts, written, and computed a step.

Owns: the counters.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

STEP_TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds, themselves included, that steps are counted by; vLLM's."""


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Counters since the engine was made.

    Attributes:
        prompt_tokens: tokens of the prompts that were computed, cached ones included.
        generation_tokens: tokens written, those of candidates and beams that were dropped too.
        computed_tokens: rows that went through the model, recomputed ones too.
        steps_by_tokens: steps of at most ``STEP_TOKEN_BOUNDS[i]`` tokens and more than the bound
            before it; the last entry has the larger ones.
    """

    prompt_tokens: int
    generation_tokens: int
    computed_tokens: int
    steps_by_tokens: tuple[int, ...]


class TokenCounts:
    """Counts as steps go by."""

    def __init__(self) -> None:
        self._num_prompt_tokens = 0
        self._num_generated_tokens = 0
        self._num_computed_tokens = 0
        self._steps = [0] * (len(STEP_TOKEN_BOUNDS) + 1)

    def note_step(self, num_tokens: int) -> None:
        """One step computed so many rows."""
        self._num_computed_tokens += num_tokens
        self._steps[bisect_left(STEP_TOKEN_BOUNDS, num_tokens)] += 1

    def note_prompt(self, num_tokens: int) -> None:
        """A prompt was computed to its end, for the first time."""
        self._num_prompt_tokens += num_tokens

    def note_generated(self, num_tokens: int) -> None:
        """So many tokens were written."""
        self._num_generated_tokens += num_tokens

    def stats(self) -> TokenStats:
        """The counters now."""
        return TokenStats(
            self._num_prompt_tokens,
            self._num_generated_tokens,
            self._num_computed_tokens,
            tuple(self._steps),
        )
