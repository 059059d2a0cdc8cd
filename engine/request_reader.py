"""From what a caller asks for to a sequence group: everything checked, nothing queued.

Owns: the numbers of sequences and the generator of seeds.
Thread-safety: none; one engine thread.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .beam_search import BeamSearch
from .config import EngineConfig
from .logits_filters import SequenceFilters, make_filters
from .prompt import read_prompt
from .sampling_params import MAX_SEED, SamplingParams
from .sequence import Sequence
from .sequence_group import SequenceGroup
from .structured_output import StructuredOutputCompiler
from .tokenizer import Detokenizer

Prompt = str | dict[str, Any] | SequenceABC[int]


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request that can be honoured.

    Attributes:
        text: the prompt, None if it came as token ids.
        token_ids: its tokens.
        params: its settings.
        filters: what they do to logits.
    """

    text: str | None
    token_ids: list[int]
    params: SamplingParams
    filters: SequenceFilters | None


class RequestReader:
    """Reads the requests of one engine.

    Args:
        tokenizer: the model's, or None.
        vocab_size: of the model.
        end_token_ids: tokens that end a text, unless a request ignores them.
        config: resolved settings.
        clock: seconds, for times of arrival.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        vocab_size: int,
        end_token_ids: frozenset[int],
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert config.max_model_len is not None
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.end_token_ids = end_token_ids
        self._config = config
        self._clock = clock
        self._max_model_len = config.max_model_len
        self._grammars = StructuredOutputCompiler(tokenizer, vocab_size, end_token_ids)
        self._seeds = random.Random(config.seed)
        self._num_seqs = 0
        self._num_requests = 0

    def prepare_structured_outputs(self) -> None:
        """Do now what the first structured output would wait for."""
        self._grammars.prepare()

    def read(self, prompt: Prompt, params: SamplingParams | None) -> CheckedRequest:
        """A request as it would run. Raises ``ConfigError`` for what cannot be honoured."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ConfigError(f"params is a {type(params).__name__}; it must be SamplingParams")
        text, token_ids = self.read_prompt(prompt)
        self._check_params(params)
        filters = make_filters(params, self._vocab_size, self._tokenizer, self._grammars)
        return CheckedRequest(text, token_ids, params, filters)

    def read_prompt(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Text if there is one, and token ids. Raises ``ConfigError``."""
        return read_prompt(
            prompt,
            self._tokenizer,
            vocab_size=self._vocab_size,
            max_model_len=self._max_model_len,
        )

    def make_group(self, request_id: str, request: CheckedRequest, priority: int) -> SequenceGroup:
        """The sequence group of a request, ready to be queued."""
        params, token_ids = request.params, request.token_ids
        room = self._max_model_len - len(token_ids)
        stop_token_ids = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            stop_token_ids |= self.end_token_ids
        # Drawn for every request, so that a later one does not depend on who brought a seed.
        drawn_seed = self._seeds.randint(0, MAX_SEED)

        def make_detokenizer() -> Detokenizer | None:
            if self._tokenizer is None or not params.detokenize:
                return None
            return Detokenizer(
                self._tokenizer, token_ids, skip_special_tokens=params.skip_special_tokens
            )

        root = Sequence(
            self.new_seq_id(),
            request_id,
            token_ids,
            params,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            seed=drawn_seed if params.seed is None else params.seed,
            stop_token_ids=stop_token_ids,
            detokenizer=make_detokenizer(),
            filters=request.filters,
        )
        self._num_requests += 1
        group = SequenceGroup(
            root,
            arrival_idx=self._num_requests,
            priority=priority,
            prompt=request.text,
            arrival_time=self._clock(),
            make_detokenizer=make_detokenizer,
        )
        if params.prompt_logprobs is not None:
            group.prompt_logprobs = [None]
        if params.use_beam_search:
            group.beams = BeamSearch(
                params.width,
                params.n,
                root.max_tokens,
                stop_token_ids,
                length_penalty=params.length_penalty,
                early_stopping=params.early_stopping,
            )
        return group

    def new_seq_id(self) -> int:
        """A number that no other sequence of the engine has or had."""
        self._num_seqs += 1
        return self._num_seqs - 1

    def _check_params(self, params: SamplingParams) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            if value is not None and value > self._config.max_logprobs:
                raise ConfigError(
                    f"{name} is {value}; it must not exceed max_logprobs, "
                    f"{self._config.max_logprobs}"
                )
        if params.width > self._config.max_num_seqs:
            name = "n" if params.best_of is None else "best_of"
            raise ConfigError(
                f"{name} is {params.width}; it must not exceed max_num_seqs, "
                f"{self._config.max_num_seqs}"
            )
        if params.stop_strings and self._tokenizer is None:
            raise ConfigError(f"stop is {params.stop!r}; stop strings need a tokenizer")
