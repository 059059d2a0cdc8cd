"""Keeps the text of a request to a JSON schema, regular expression, choice or grammar.

Grammars are compiled and matched by llguidance; a token is allowed if its bytes can go on.
Owns: compiled grammars of an engine, and where each sequence stands in its own.
Thread-safety: none; one engine thread.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .structured_params import StructuredOutputsParams

try:
    import llguidance
    import llguidance.gbnf_to_lark
    import llguidance.hf
except ImportError:  # an optional extra
    llguidance = None

MAX_CACHED_GRAMMARS = 64
MAX_JSON_SPACE = 64
"""Characters of white space in a row; small models would go on with it for ever."""

_MAX_REASON_CHARS = 400

_LEXER_FUEL = {"initial_lexer_fuel": 200_000, "step_lexer_fuel": 40_000}
"""A fifth of llguidance's own limits on the work that it does ahead. With its own a hostile regular
expression such as ``(a{1000}){1000}`` holds every sequence up for a second, with these for 0.15."""


class GrammarMatcher:
    """Where one sequence stands in its grammar; follows the sequence's own token ids.

    Attributes:
        compiler: what made it.
        num_accepted: generated tokens that were taken.
        error: why no token can follow, if the sequence left the grammar or the grammar is beyond
            the library's limits.
    """

    __slots__ = ("_matcher", "compiler", "error", "num_accepted")

    def __init__(self, compiler: StructuredOutputCompiler, matcher: Any) -> None:
        self.compiler = compiler
        self._matcher = matcher
        self.num_accepted = 0
        self.error: str | None = None

    def clone(self) -> GrammarMatcher:
        """The same place for a forked sequence."""
        twin = GrammarMatcher(self.compiler, self._matcher.deep_copy())
        twin.num_accepted, twin.error = self.num_accepted, self.error
        return twin

    def accept(self, token_id: int) -> bool:
        """Go on by one token; False, and stuck for good, if the grammar does not allow it."""
        if self.error is not None:
            return False
        if self._matcher.try_consume_tokens([token_id]) != 1:
            self.error = self._matcher.get_error() or f"token {token_id} does not fit the grammar"
            return False
        self.num_accepted += 1
        return True

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens. Raises ``ValueError`` beyond the first."""
        if not 0 <= num_tokens <= self.num_accepted:
            raise ValueError(f"num_tokens is {num_tokens}; {self.num_accepted} were accepted")
        if num_tokens and not self._matcher.rollback(num_tokens):
            raise ValueError(f"cannot take back {num_tokens} tokens: {self._matcher.get_error()}")
        self.num_accepted -= num_tokens

    def follow(self, token_ids: Sequence[int], num_prompt_tokens: int) -> bool:
        """Bring the place up to date with a sequence's tokens; False if they left the grammar."""
        num_output_tokens = len(token_ids) - num_prompt_tokens
        if self.num_accepted > num_output_tokens:
            self.rollback(self.num_accepted - num_output_tokens)
        for token_id in token_ids[num_prompt_tokens + self.num_accepted :]:
            if not self.accept(token_id):
                return False
        return self.error is None

    @property
    def may_end(self) -> bool:
        """Whether the text may end here."""
        return self.error is None and bool(self._matcher.is_accepting())

    @property
    def is_complete(self) -> bool:
        """Whether the text is whole and nothing else can follow."""
        return self.may_end and bool(self._matcher.is_stopped())


class StructuredOutputCompiler:
    """Compiles forms against one tokenizer, and keeps those compiled last.

    Args:
        tokenizer: a fast Hugging Face tokenizer, or None, which refuses every form.
        vocab_size: columns of the logits.
        end_token_ids: tokens that end a text; allowed exactly where the grammar may end.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_token_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_token_ids = sorted(end_token_ids)
        self._ll_tokenizer: Any = None
        self._executor: Any = None
        self._compiled: OrderedDict[StructuredOutputsParams, Any] = OrderedDict()

    def prepare(self) -> None:
        """Read the vocabulary now: the first form then need not wait for it, nor hold others up.

        Does nothing where forms cannot be used.
        """
        with suppress(ConfigError):
            self._tokens()

    def matcher(self, params: StructuredOutputsParams) -> GrammarMatcher:
        """The start of a form's grammar.

        Raises ``ConfigError`` with the reason if there is no such grammar, if the tokenizer cannot
        be used, and if llguidance is not installed.
        """
        compiled = self._compiled.pop(params, None)
        if compiled is None:
            compiled = self._compile(params)
        self._compiled[params] = compiled
        if len(self._compiled) > MAX_CACHED_GRAMMARS:
            self._compiled.popitem(last=False)
        return GrammarMatcher(self, compiled.deep_copy())

    def allowed(self, matchers: Sequence[GrammarMatcher]) -> Tensor:
        """Which tokens may come next: bool ``[len(matchers), vocab_size]``; none where stuck.

        A matcher that runs into the library's limits here is stuck, with an ``error``.
        """
        ll_tokenizer = self._tokens()
        num_words = (ll_tokenizer.vocab_size + 31) // 32
        masks = np.zeros((len(matchers), num_words), dtype=np.int32)
        rows = [row for row, matcher in enumerate(matchers) if matcher.error is None]
        if len(rows) == 1:
            address = masks[rows[0]].ctypes.data
            matchers[rows[0]]._matcher.unsafe_compute_mask_ptr(address, num_words * 4)
        elif rows:
            self._executor.unsafe_compute_mask_ptr(
                [(matchers[row]._matcher, row) for row in rows],
                masks.ctypes.data,
                num_words * 4,
                len(matchers),
            )
        for row in rows:
            if matchers[row]._matcher.is_error():
                matchers[row].error = matchers[row]._matcher.get_error()
                masks[row] = 0
        bits = np.unpackbits(
            masks.view(np.uint8), axis=1, count=self._vocab_size, bitorder="little"
        )
        return torch.from_numpy(bits.view(np.bool_))

    def _compile(self, params: StructuredOutputsParams) -> Any:
        ll_tokenizer = self._tokens()
        value = getattr(params, params.kind)
        try:
            grammar = _grammar_text(params)
            is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(
                grammar, ll_tokenizer
            )
            reason = messages[0] if is_error else ""
            if not reason:
                limits = llguidance.LLParserLimits(verbose_errors=False, **_LEXER_FUEL)
                compiled = llguidance.LLMatcher(ll_tokenizer, grammar, log_level=0, limits=limits)
                reason = compiled.get_error()
        except (ValueError, TypeError, UnicodeError) as error:
            reason = str(error) or type(error).__name__
        if reason:
            raise ConfigError(
                f"{params.kind} is {_short(repr(value), 100)}; it cannot be compiled: "
                f"{_short(reason, _MAX_REASON_CHARS)}"
            )
        return compiled

    def _tokens(self) -> Any:
        """llguidance's view of the tokenizer."""
        if self._ll_tokenizer is not None:
            return self._ll_tokenizer
        if llguidance is None:
            raise ConfigError(
                "structured_outputs is set; it needs llguidance: pip install 'vmalloc[structured]'"
            )
        if self._tokenizer is None:
            raise ConfigError("structured_outputs is set; it needs a tokenizer")
        try:
            self._ll_tokenizer = llguidance.hf.from_tokenizer(
                self._tokenizer,
                n_vocab=max(self._vocab_size, len(self._tokenizer)),
                eos_token=self._end_token_ids or None,
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(
                "structured_outputs is set; it needs a fast tokenizer with an end token, and a "
                f"{type(self._tokenizer).__name__} cannot be used: {error}"
            ) from error
        self._executor = llguidance.LLExecutor(torch.get_num_threads())
        return self._ll_tokenizer


def _grammar_text(params: StructuredOutputsParams) -> str:
    """A form in llguidance's own notation."""
    matcher = llguidance.LLMatcher
    if params.json is not None or params.json_object:
        schema = {"type": "object"} if params.json is None else json.loads(str(params.json))
        # Defaults: a schema's own "x-guidance" has the last word.
        space = {"whitespace_pattern": rf"[\x20\x0A\x0D\x09]{{1,{MAX_JSON_SPACE}}}"}
        return str(matcher.grammar_from_json_schema(schema, defaults=space))
    if params.regex is not None:
        return str(matcher.grammar_from_regex(params.regex))
    if params.choice is not None:
        strings = (json.dumps(choice, ensure_ascii=False) for choice in params.choice)
        return str(matcher.grammar_from_lark("start: " + " | ".join(strings)))
    try:
        lark = llguidance.gbnf_to_lark.any_to_lark(params.grammar)
    except Exception as error:  # the converter has no error type of its own
        raise ValueError(f"it is neither Lark nor GBNF: {error}") from error
    return str(matcher.grammar_from_lark(lark))


def _short(text: str, num_chars: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= num_chars else line[: num_chars - 3] + "..."
