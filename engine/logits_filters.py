"""Everything between the model's logits and the choice of a token, but for temperature and draws.

Owns: per sequence, its token history and its place in a grammar.
Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceABC
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .bad_words import TokenWords, banned_tokens, tokenize_bad_words
from .penalties import TokenHistory, apply_penalties, has_penalties
from .sampling_checks import num_processor_args
from .sampling_params import SamplingParams
from .structured_output import GrammarMatcher, StructuredOutputCompiler
from .transfer import flat_places, take_rows, to_device

if TYPE_CHECKING:
    from .sequence import Sequence


class SequenceFilters:
    """The filters of one sequence, ready to apply, with what they remember of it.

    All they remember follows from the sequence's token ids, so preemption needs no care.

    Args:
        params: the request's settings.
        bad_words: its ``bad_words`` as tokens.
        matcher: the start of its grammar.
    """

    __slots__ = ("allowed_ids", "bad_words", "bias", "history", "matcher", "params", "processors")

    def __init__(
        self,
        params: SamplingParams,
        bad_words: TokenWords = (),
        matcher: GrammarMatcher | None = None,
    ) -> None:
        self.params = params
        self.bad_words = bad_words
        self.matcher = matcher
        self.history = (
            TokenHistory(params.repetition_penalty != 1.0) if has_penalties(params) else None
        )
        bias = params.logit_bias or {}
        self.bias = list(bias), list(bias.values())
        allowed_ids = params.allowed_token_ids
        self.allowed_ids = None if allowed_ids is None else np.array(sorted(set(allowed_ids)))
        self.processors = [
            (processor, num_processor_args(processor) == 3)
            for processor in params.logits_processors or ()
        ]

    def fork(self) -> SequenceFilters:
        """The same for a sequence that goes on from the same tokens."""
        twin = SequenceFilters.__new__(SequenceFilters)
        for name in SequenceFilters.__slots__:
            setattr(twin, name, getattr(self, name))
        twin.history = None if self.history is None else self.history.copy()
        twin.matcher = None if self.matcher is None else self.matcher.clone()
        return twin

    @property
    def is_stuck(self) -> bool:
        """Whether the sequence left its grammar."""
        return self.matcher is not None and self.matcher.error is not None

    def is_complete(self, seq: Sequence) -> bool:
        """Whether the text of ``seq`` is whole and its grammar lets nothing else follow."""
        return (
            self.matcher is not None
            and self.matcher.follow(seq.token_ids, seq.num_prompt_tokens)
            and self.matcher.is_complete
        )


def make_filters(
    params: SamplingParams,
    vocab_size: int,
    tokenizer: Any = None,
    compiler: StructuredOutputCompiler | None = None,
) -> SequenceFilters | None:
    """The filters of a new request; None where logits go to the choice as they are.

    ``vocab_size`` is that of the logits; some models take more tokens than they can write.
    Raises ``ConfigError`` for token ids outside the vocabulary, for words without tokens, for a
    form that cannot be compiled, and where a tokenizer is needed and there is none.
    """
    for name in ("logit_bias", "allowed_token_ids", "stop_token_ids"):
        largest = max(getattr(params, name) or (0,))
        if largest >= vocab_size:
            raise ConfigError(f"{name} holds {largest}; it must be below {vocab_size}")
    if not params.has_filters:
        return None
    bad_words: TokenWords = ()
    if params.bad_words:
        bad_words = tokenize_bad_words(params.bad_words, tokenizer, vocab_size)
    matcher = None
    if params.structured_outputs is not None:
        if compiler is None:
            compiler = StructuredOutputCompiler(tokenizer, vocab_size)
        matcher = compiler.matcher(params.structured_outputs)
    return SequenceFilters(params, bad_words, matcher)


def apply_filters(seqs: SequenceABC[Sequence], logits: Tensor) -> tuple[Tensor, dict[int, str]]:
    """Filter ``logits [num_seqs, vocab_size]``, or log-probabilities of beams.

    Returns them, the same tensor if nothing was to do and a changed copy otherwise, and by row
    what went wrong with a user's processor or with a grammar.
    """
    filtered = [(row, seq.filters) for row, seq in enumerate(seqs) if seq.filters is not None]
    banned = [
        (row, token_id)
        for row, seq in enumerate(seqs)
        if seq.num_output_tokens < seq.params.min_tokens
        for token_id in seq.stop_token_ids
        if token_id < logits.shape[1]
    ]
    if not filtered and not banned:
        return logits, {}
    logits = logits.clone(memory_format=torch.contiguous_format)
    _penalize(seqs, filtered, logits)
    _add_bias(filtered, logits)
    _keep_allowed(filtered, logits)
    for row, filters in filtered:
        if filters.bad_words:
            seq = seqs[row]
            words = banned_tokens(filters.bad_words, seq.token_ids, seq.num_prompt_tokens)
            banned.extend((row, token_id) for token_id in words)
    if banned:
        rows, columns = zip(*banned, strict=True)
        places = flat_places(rows, columns, logits)
        logits.view(-1).index_fill_(0, places, -torch.inf)
    errors = {}
    for row, filters in filtered:
        if filters.processors:
            error = _process(seqs[row], filters, logits, row)
            if error is not None:
                errors[row] = error
    errors.update(_match(seqs, filtered, logits))
    return logits, errors


def masking_filters(seq: Sequence) -> str:
    """Names of the settings that can leave ``seq`` without a token."""
    params = seq.params
    is_early = seq.num_output_tokens < params.min_tokens and bool(seq.stop_token_ids)
    names = (
        ("allowed_token_ids", params.allowed_token_ids),
        ("bad_words", params.bad_words),
        ("min_tokens", is_early),
        ("logits_processors", params.logits_processors),
        ("structured_outputs", params.structured_outputs),
    )
    return ", ".join(name for name, is_on in names if is_on)


_Filtered = list[tuple[int, SequenceFilters]]


def _penalize(seqs: SequenceABC[Sequence], filtered: _Filtered, logits: Tensor) -> None:
    penalized = [
        (row, filters, filters.history) for row, filters in filtered if filters.history is not None
    ]
    if not penalized:
        return
    for row, _, history in penalized:
        history.follow(seqs[row].token_ids, seqs[row].num_prompt_tokens)
    rows, filters, histories = zip(*penalized, strict=True)
    apply_penalties(logits, rows, histories, [one.params for one in filters])


def _add_bias(filtered: _Filtered, logits: Tensor) -> None:
    rows: list[int] = []
    ids: list[int] = []
    values: list[float] = []
    for row, filters in filtered:
        rows.extend([row] * len(filters.bias[0]))
        ids.extend(filters.bias[0])
        values.extend(filters.bias[1])
    if rows:
        added = to_device(np.array(values, dtype=np.float32), logits.device)
        logits.view(-1).index_add_(0, flat_places(rows, ids, logits), added)


def _keep_allowed(filtered: _Filtered, logits: Tensor) -> None:
    rows = [row for row, filters in filtered if filters.allowed_ids is not None]
    if not rows:
        return
    lists = [filters.allowed_ids for _, filters in filtered if filters.allowed_ids is not None]
    owners = np.repeat(rows, [len(ids) for ids in lists])
    places = flat_places(owners, np.concatenate(lists), logits)
    kept = logits.view(-1).index_select(0, places)
    logits.index_fill_(0, to_device(np.array(rows), logits.device), -torch.inf)
    logits.view(-1).index_copy_(0, places, kept)


def _process(seq: Sequence, filters: SequenceFilters, logits: Tensor, row: int) -> str | None:
    """Run a request's own processors over its row, in place; what went wrong, or None."""
    processed = logits[row].clone()  # theirs to change, and to keep
    output_ids = seq.token_ids[seq.num_prompt_tokens :]
    for idx, (processor, takes_prompt) in enumerate(filters.processors):
        name = f"logits_processors[{idx}]"
        try:
            processed = _call(processor, takes_prompt, seq, list(output_ids), processed)
        except Exception as error:  # whatever a caller's function raises ends that request alone
            return f"{name} raised {type(error).__name__}: {error}"
        if not isinstance(processed, Tensor):
            return f"{name} returned a {type(processed).__name__}; it must be a tensor"
        if processed.shape != logits.shape[1:]:
            return (
                f"{name} returned shape {tuple(processed.shape)}; it must be "
                f"{tuple(logits.shape[1:])}"
            )
        if bool(processed.isnan().any()):
            return f"{name} returned logits that are not numbers"
    logits[row] = processed
    return None


def _call(
    processor: Callable[..., Any],
    takes_prompt: bool,
    seq: Sequence,
    output_ids: list[int],
    logits: Tensor,
) -> Any:
    if takes_prompt:
        return processor(list(seq.prompt_token_ids), output_ids, logits)
    return processor(output_ids, logits)


def _match(seqs: SequenceABC[Sequence], filtered: _Filtered, logits: Tensor) -> dict[int, str]:
    """Mask what each grammar does not allow; by row, why a sequence is stuck."""
    matched = [(row, filters.matcher) for row, filters in filtered if filters.matcher is not None]
    if not matched:
        return {}
    for row, matcher in matched:
        matcher.follow(seqs[row].token_ids, seqs[row].num_prompt_tokens)
    rows, matchers = zip(*matched, strict=True)
    is_banned = to_device(~matchers[0].compiler.allowed(matchers), logits.device)
    masked = take_rows(logits, rows).masked_fill(is_banned, -torch.inf)
    logits.index_copy_(0, to_device(np.array(rows), logits.device), masked)
    return {
        row: f"structured_outputs cannot go on: {matcher.error}"
        for row, matcher in matched
        if matcher.error is not None
    }
