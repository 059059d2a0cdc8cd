"""How tokens of one request are chosen and when it ends; names follow vLLM.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError
from .sampling_checks import MAX_SEED, check_settings, freeze
from .structured_params import StructuredOutputsParams

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAX_SEED", "RequestOutputKind", "SamplingParams", "StructuredOutputsParams"]


class RequestOutputKind(Enum):
    """What ``LLMEngine.step`` reports for a request that is still running."""

    CUMULATIVE = "cumulative"
    """All text and tokens so far, after every step."""
    DELTA = "delta"
    """Only what is new, after every step that has something new."""
    FINAL_ONLY = "final_only"
    """Nothing until the request is finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one request. A value that cannot be honoured raises ``ConfigError``.

    Each step takes a sequence's logits through these, in this order: ``repetition_penalty``,
    ``frequency_penalty``, ``presence_penalty``, ``logit_bias``, ``allowed_token_ids``,
    ``bad_words``, ``min_tokens``, ``logits_processors``, ``structured_outputs``; greedy sequences
    take the best of the result, others go on through ``temperature``, ``min_p``, ``typical_p``,
    ``top_k`` and ``top_p``. Beam search takes log-probabilities through the first half.

    Attributes:
        n: completions per prompt. Greedy ones are all equal.
        best_of: candidates generated, of which the ``n`` with the largest sum of log-probabilities
            are returned; with ``use_beam_search`` the beam width. None: ``n``.
        use_beam_search: keep the ``best_of`` most likely sequences, as ``model.generate`` of
            Hugging Face does with ``num_beams``. Nothing is drawn: ``temperature`` must be 0 or 1,
            the filters below it off. Stop strings cannot end a beam; stop tokens can.
        length_penalty: beams are ranked by log-probability / generated length ** this.
        early_stopping: True ends a beam search with as many finished beams as it is wide; False
            when the running ones look unlikely to beat them; "never" when they cannot.
        temperature: 0 takes the most likely token; otherwise logits are divided by it.
        top_k: sample among the k most likely tokens (ties with the k-th stay). 0 or -1: all.
        top_p: then among the fewest tokens whose probabilities reach this sum.
        min_p: drop tokens less likely than this share of the most likely one's probability.
        typical_p: keep the fewest tokens of the most typical information content (Meister et al.,
            "Locally Typical Sampling") whose probabilities reach this sum.
        repetition_penalty: logits of tokens in prompt or output are divided by it where positive
            and multiplied where negative (Keskar et al., CTRL). 1: none.
        presence_penalty: taken off the logit of every token that the output holds.
        frequency_penalty: taken off once for each time that the output holds it.
        seed: fixes the request's random numbers whatever runs beside it. None: drawn by the engine.
        logit_bias: added to the logits of these token ids.
        allowed_token_ids: no other token is ever chosen; name the end token too if it may end.
        bad_words: strings whose last token is not chosen after the tokens before it, with and
            without a space in front.
        logits_processors: called in turn as ``fn(output_token_ids, logits)`` or, with three
            parameters, ``fn(prompt_token_ids, output_token_ids, logits)`` with float32
            ``logits [vocab_size]`` on the engine's device, which they may change; they return
            logits of that shape.
        structured_outputs: the form that the text must have.
        max_tokens: most tokens to generate. None: as many as the context holds. 0 computes the
            prompt only and needs ``prompt_logprobs``.
        min_tokens: no stop token or stop string ends the request before this many tokens.
        stop: strings that end the request; the text ends before them.
        stop_token_ids: tokens that end the request, in addition to the model's end token.
        ignore_eos: go on past the model's end token.
        include_stop_str_in_output: keep the stop string at the end of the text.
        logprobs: report the log-probabilities of that many most likely tokens, and of the chosen
            one: log-softmax of the raw logits, before everything above. 0: of the chosen one only.
        prompt_logprobs: the same for every token of the prompt but the first.
        skip_special_tokens: leave special tokens out of the text.
        detokenize: make text at all.
        output_kind: what is reported while the request runs.
        cache_salt: prompts share cached KV only with those of the same salt.
        use_prefix_cache: start from cached KV of the same prompt beginning, if there is any.
    """

    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    logits_processors: Sequence[Callable[..., Tensor]] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    cache_salt: str | None = None
    use_prefix_cache: bool = True

    def __post_init__(self) -> None:
        for name in (
            "logit_bias",
            "allowed_token_ids",
            "bad_words",
            "logits_processors",
            "stop",
            "stop_token_ids",
        ):
            object.__setattr__(self, name, freeze(name, getattr(self, name)))
        for name, kind in (
            ("output_kind", RequestOutputKind),
            ("structured_outputs", StructuredOutputsParams | None),
            ("cache_salt", str | None),
        ):
            self._check_instance(name, kind)
        check_settings(self)

    def _check_instance(self, name: str, kind: Any) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind):
            wanted = getattr(kind, "__name__", kind)
            raise ConfigError(f"{name} is {value!r}; it must be a {wanted}")

    @property
    def width(self) -> int:
        """Sequences that the request runs at once: candidates, or beams."""
        return self.n if self.best_of is None else self.best_of

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0.0

    @property
    def num_logprobs(self) -> int | None:
        """Most likely tokens whose log-probabilities are wanted; None: not even the chosen one's.

        Candidates that are to be ranked need those of their chosen tokens.
        """
        return 0 if self.logprobs is None and self.width > self.n else self.logprobs

    @property
    def truncates(self) -> bool:
        """Whether unlikely tokens are cut off before a draw."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0 or self.typical_p < 1.0

    @property
    def has_filters(self) -> bool:
        """Whether anything but stop tokens changes the logits before ``temperature``."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or bool(self.logit_bias)
            or bool(self.allowed_token_ids)
            or bool(self.bad_words)
            or bool(self.logits_processors)
            or self.structured_outputs is not None
        )
