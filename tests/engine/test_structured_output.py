"""Structured output on the demo model's tokenizer: whatever is drawn parses and fits."""

from __future__ import annotations

import json
import re
from typing import Any

import fastjsonschema
import pytest
import torch

from vmalloc.engine import ConfigError, SamplingParams, StructuredOutputsParams
from vmalloc.engine import structured_output as structured_output_module
from vmalloc.engine.logits_filters import make_filters
from vmalloc.engine.model_loader import resolve_model_name
from vmalloc.engine.sampler import sample, score_beams
from vmalloc.engine.sequence import Sequence
from vmalloc.engine.stop import check_stop
from vmalloc.engine.structured_output import GrammarMatcher, StructuredOutputCompiler
from vmalloc.engine.tokenizer import load_tokenizer

VOCAB = 2048
END = 1
PROMPT = [40, 41, 42]
MAX_TOKENS = 400

SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "é😀"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-f]{2,5}$"}]},
    {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "number", "minimum": -1, "maximum": 1},
                    "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    {"type": "string", "format": "date"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(resolve_model_name("demo"))


@pytest.fixture(scope="module")
def compiler(tokenizer: Any) -> StructuredOutputCompiler:
    return StructuredOutputCompiler(tokenizer, VOCAB, [END])


def ids_of(text: str, tokenizer: Any) -> list[int]:
    token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return token_ids


def start(compiler: StructuredOutputCompiler, params: SamplingParams, seed: int = 0) -> Sequence:
    seq = Sequence(
        seed,
        str(seed),
        PROMPT,
        params,
        max_tokens=MAX_TOKENS,
        seed=seed,
        stop_token_ids=frozenset([END]),
    )
    seq.filters = make_filters(params, VOCAB, None, compiler)
    return seq


def settings(**form: Any) -> SamplingParams:
    return SamplingParams(structured_outputs=StructuredOutputsParams(**form))


def random_logits(count: int, generator: torch.Generator) -> torch.Tensor:
    """Random ones, with white space (which may go on for ever) unlikely, closers likely."""
    logits = torch.randn(count, VOCAB, generator=generator) * 2
    logits[:, WHITE_SPACE] -= 10
    logits[:, CLOSERS] += 4
    return logits


WHITE_SPACE: list[int] = []
CLOSERS: list[int] = []


@pytest.fixture(scope="module", autouse=True)
def _classes(tokenizer: Any) -> None:
    texts = [tokenizer.decode([token_id]) for token_id in range(VOCAB)]
    WHITE_SPACE[:] = [idx for idx, text in enumerate(texts) if not text.strip()]
    CLOSERS[:] = [END, *(ids_of(text, tokenizer)[-1] for text in ('"', "}", "]"))]


def run(compiler: StructuredOutputCompiler, params: list[SamplingParams]) -> list[Sequence]:
    """Draw tokens for all of them, as the engine does, until every one has ended."""
    generator = torch.Generator().manual_seed(7)
    seqs = [start(compiler, one, seed) for seed, one in enumerate(params)]
    running = list(seqs)
    while running:
        sampled = sample(running, random_logits(len(running), generator))
        assert sampled.errors == [None] * len(running)
        for seq, token_id in zip(running, sampled.token_ids, strict=True):
            assert token_id is not None
            seq.token_ids.append(token_id)
            check_stop(seq)
        running = [seq for seq in running if not seq.is_finished]
    return seqs


def text_of(seq: Sequence, tokenizer: Any) -> str:
    text: str = tokenizer.decode(seq.output_token_ids, skip_special_tokens=True)
    return text


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_every_text_parses_and_fits_its_schema(
    schema: dict[str, Any], compiler: StructuredOutputCompiler, tokenizer: Any
) -> None:
    texts = set()
    for seq in run(compiler, [settings(json=schema)] * 12):
        assert seq.finish_reason == "stop", text_of(seq, tokenizer)
        value = json.loads(text_of(seq, tokenizer))
        fastjsonschema.validate(schema, value)
        texts.add(json.dumps(value))
    assert len(texts) > 3


def test_any_json_object(compiler: StructuredOutputCompiler, tokenizer: Any) -> None:
    seqs = run(compiler, [settings(json_object=True)] * 12)
    whole = [text_of(seq, tokenizer) for seq in seqs if seq.finish_reason == "stop"]
    assert len(whole) > 6  # objects have no longest one
    assert all(isinstance(json.loads(text), dict) for text in whole)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[a-z]{3}-[0-9]{1,4}"}, "[a-z]{3}-[0-9]{1,4}"),
        ({"regex": "^(yes|no)$"}, "yes|no"),
        ({"choice": ["yes", "no", "é😀", 'a"b\\c\nd']}, 'yes|no|é😀|a"b\\\\c\nd'),
        ({"grammar": 'root ::= "<" [0-9] digits ">"\ndigits ::= [0-9] | ""'}, "<[0-9]{1,2}>"),
        ({"grammar": 'start: "<" (NUMBER ",")~2 ">"\nNUMBER: /[0-9]/'}, "<([0-9],){2}>"),
    ],
)
def test_patterns_choices_and_grammars(
    form: dict[str, Any], pattern: str, compiler: StructuredOutputCompiler, tokenizer: Any
) -> None:
    seqs = run(compiler, [settings(**form)] * 12)
    texts = {text_of(seq, tokenizer) for seq in seqs}
    assert {seq.finish_reason for seq in seqs} == {"stop"}
    assert all(re.fullmatch(pattern, text) for text in texts), texts
    assert len(texts) > 1


def test_forms_of_one_batch_do_not_touch_each_other(
    compiler: StructuredOutputCompiler, tokenizer: Any
) -> None:
    free = SamplingParams(max_tokens=9)
    mixed = [settings(choice=["yes", "no"]), free, settings(regex="[0-9]{4}")]
    seqs = [start(compiler, one, seed) for seed, one in enumerate(mixed)]
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(3))
    together = sample(seqs, logits).token_ids
    for row, one in enumerate(mixed):
        alone = sample([start(compiler, one, row)], logits[row : row + 1])
        assert alone.token_ids == together[row : row + 1]


def allowed_ids(matcher: GrammarMatcher) -> list[int]:
    found: list[int] = matcher.compiler.allowed([matcher])[0].nonzero()[:, 0].tolist()
    return found


def test_the_end_is_allowed_exactly_where_the_grammar_may_end(
    compiler: StructuredOutputCompiler, tokenizer: Any
) -> None:
    matcher = compiler.matcher(StructuredOutputsParams(regex="ab(cd)?"))
    seen = []
    for letter in "abcd":
        seen.append((END in allowed_ids(matcher), matcher.may_end, matcher.is_complete))
        assert matcher.accept(ids_of(letter, tokenizer)[0])
    assert seen == [(False,) * 3, (False,) * 3, (True, True, False), (False,) * 3]
    assert (allowed_ids(matcher), matcher.is_complete) == ([END], True)


def test_no_token_without_text_is_ever_allowed(
    compiler: StructuredOutputCompiler, tokenizer: Any
) -> None:
    wide = StructuredOutputCompiler(tokenizer, VOCAB + 70, [END])
    matcher = wide.matcher(StructuredOutputsParams(regex="(?s).*"))
    allowed = allowed_ids(matcher)
    assert len(allowed) > 1500
    assert set(allowed) & set(range(6)) == {END}
    assert max(allowed) < VOCAB


def test_white_space_in_json_does_not_go_on_for_ever(
    compiler: StructuredOutputCompiler, tokenizer: Any
) -> None:
    space = ids_of(" ", tokenizer)[0]
    for form in ({"json_object": True}, {"json": {"type": "object"}}):
        matcher = compiler.matcher(StructuredOutputsParams(**form))
        assert matcher.accept(ids_of("{", tokenizer)[0])
        num_spaces = 0
        while space in allowed_ids(matcher):
            assert matcher.accept(space)
            num_spaces += 1
        assert num_spaces == structured_output_module.MAX_JSON_SPACE
        assert matcher.accept(ids_of("}", tokenizer)[0])


def test_a_place_follows_the_tokens_back_and_forth(
    compiler: StructuredOutputCompiler, tokenizer: Any
) -> None:
    form = StructuredOutputsParams(regex="[ab]{6}")
    a, b = (ids_of(letter, tokenizer)[0] for letter in "ab")
    matcher = compiler.matcher(form)
    assert matcher.follow([*PROMPT, a, b, a], len(PROMPT))
    twin = matcher.clone()
    assert matcher.follow([*PROMPT, a, b, a, b], len(PROMPT))
    assert (matcher.num_accepted, twin.num_accepted) == (4, 3)
    assert matcher.follow([*PROMPT, a], len(PROMPT))
    assert matcher.num_accepted == 1
    replayed = compiler.matcher(form)  # as after a restart
    assert replayed.follow([*PROMPT, a, b, a], len(PROMPT))
    assert allowed_ids(replayed) == allowed_ids(twin)
    assert not twin.accept(ids_of("c", tokenizer)[0])
    assert twin.error is not None
    assert (allowed_ids(twin), twin.accept(a)) == ([], False)
    with pytest.raises(ValueError, match="1 were accepted"):
        matcher.rollback(2)


def test_forks_go_their_own_ways(compiler: StructuredOutputCompiler, tokenizer: Any) -> None:
    seq = start(compiler, settings(choice=["ab", "cd"]))
    twin = start(compiler, seq.params)
    assert seq.filters is not None
    logits = torch.zeros(2, VOCAB)
    a, c = (ids_of(letter, tokenizer)[0] for letter in "ac")
    twin.filters = seq.filters.fork()
    seq.token_ids.append(a)
    twin.token_ids.append(c)
    b, d = (ids_of(letter, tokenizer)[0] for letter in "bd")
    assert sample([seq, twin], logits).token_ids == [b, d]


def test_a_sequence_that_left_its_grammar_ends_alone(
    compiler: StructuredOutputCompiler, tokenizer: Any
) -> None:
    stray, other = start(compiler, settings(regex="[0-9]+")), start(compiler, SamplingParams())
    stray.token_ids.append(ids_of("x", tokenizer)[0])
    sampled = sample([stray, other], torch.randn(2, VOCAB))
    assert sampled.token_ids[0] is None
    assert "structured_outputs cannot go on" in str(sampled.errors[0])
    assert sampled.errors[1] is None
    scores, error = score_beams([stray, stray], torch.randn(2, VOCAB))
    assert "structured_outputs" in str(error)
    whole = start(compiler, stray.params)
    scores, error = score_beams([stray, whole], torch.randn(2, VOCAB))  # the other beam lives
    assert error is None
    assert bool((scores[0] == -torch.inf).all())
    assert bool((scores[1] > -torch.inf).any())


def test_masks_that_exclude_each_other_end_the_request(compiler: StructuredOutputCompiler) -> None:
    params = SamplingParams(
        structured_outputs=StructuredOutputsParams(regex="[0-9]+"), allowed_token_ids=[500]
    )
    sampled = sample([start(compiler, params)], torch.randn(1, VOCAB))
    assert sampled.token_ids == [None]
    assert "allowed_token_ids, structured_outputs let none through" in str(sampled.errors[0])


def test_compiled_grammars_are_kept(compiler: StructuredOutputCompiler) -> None:
    first = compiler.matcher(StructuredOutputsParams(regex="[xy]+"))
    assert first.accept(allowed_ids(first)[0])
    again = compiler.matcher(StructuredOutputsParams(regex="[xy]+"))
    assert again.num_accepted == 0
    assert len(compiler._compiled) <= structured_output_module.MAX_CACHED_GRAMMARS


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ({"regex": "[a-z]+("}, "regex is.*unclosed group"),
        ({"regex": "a(?=b)"}, "regex is.*look-around"),
        ({"json": {"type": "wibble"}}, "json is.*wibble"),
        ({"json": {"type": "string", "format": "wibble"}}, "json is.*format: wibble"),
        ({"json": {"enum": []}}, "json is"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 4}}, "json is"),
        ({"grammar": "start: nowhere"}, "grammar is.*nowhere"),
        ({"grammar": "wibble wobble"}, "grammar is.*neither Lark nor GBNF"),
        ({"choice": ["a\ud800"]}, "choice is"),
    ],
)
def test_a_bad_form_is_refused_with_the_reason(
    form: dict[str, Any], text: str, compiler: StructuredOutputCompiler
) -> None:
    with pytest.raises(ConfigError, match=text):
        make_filters(settings(**form), VOCAB, None, compiler)


def test_what_it_needs_is_named(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        make_filters(settings(json_object=True), VOCAB)
    with pytest.raises(ConfigError, match="fast tokenizer"):
        make_filters(settings(json_object=True), VOCAB, tokenizer=[1, 2])
    monkeypatch.setattr(structured_output_module, "llguidance", None)
    with pytest.raises(ConfigError, match=r"vmalloc\[structured\]"):
        make_filters(settings(json_object=True), VOCAB, tokenizer)


def test_an_expression_of_a_million_letters_is_followed(
    compiler: StructuredOutputCompiler, tokenizer: Any
) -> None:
    """Within the limits that keep it from holding others up for seconds."""
    matcher = compiler.matcher(StructuredOutputsParams(regex="(a{1000}){1000}"))
    texts = {tokenizer.decode([token_id]) for token_id in allowed_ids(matcher)}
    assert "a" in texts
    assert all(set(text) == {"a"} for text in texts)
    assert not matcher.may_end
