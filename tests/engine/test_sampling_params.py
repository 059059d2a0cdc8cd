"""Sampling settings: what is refused, what is frozen, what follows from them."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest

from vmalloc.engine import ConfigError, SamplingParams, StructuredOutputsParams

BEAMS = {"use_beam_search": True, "n": 2, "temperature": 0.0}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"n": True}, "n is True.*integer"),
        ({"best_of": 1, "n": 2}, "best_of is 1.*at least n, 2"),
        ({"best_of": 2, "temperature": 0.0}, "best_of is 2 with temperature 0"),
        ({"max_tokens": 0}, "max_tokens is 0.*prompt_logprobs"),
        ({"max_tokens": 0, "prompt_logprobs": 1, "n": 2}, "max_tokens is 0 with 2 sequences"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"prompt_logprobs": 1.0}, "prompt_logprobs is 1.0.*integer"),
        ({"min_p": 1.5}, "min_p is 1.5.*between 0 and 1"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"typical_p": 0.0}, "typical_p is 0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0.*above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1.*-2.0 and 2.0"),
        ({"frequency_penalty": -3}, "frequency_penalty is -3"),
        ({"length_penalty": float("inf")}, "length_penalty is inf.*10.0"),
        ({"length_penalty": None}, "length_penalty is None.*number"),
        ({"early_stopping": "always"}, "early_stopping is 'always'"),
        ({"early_stopping": 1}, "early_stopping is 1"),
        ({"logit_bias": [3]}, "logit_bias is a list"),
        ({"logit_bias": {"3": 1.0}}, "logit_bias holds '3'"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias holds inf"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids holds -1"),
        ({"allowed_token_ids": "ab"}, "allowed_token_ids is a str"),
        ({"bad_words": "ab"}, "bad_words is a str"),
        ({"bad_words": [" "]}, "bad_words holds ' '"),
        ({"logits_processors": [5]}, "logits_processors holds 5"),
        ({"logits_processors": [lambda logits: logits]}, "logits_processors holds <function"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs is"),
        ({"cache_salt": 5}, "cache_salt is 5"),
        ({"cache_salt": "s" * 1025}, "cache_salt has 1025 characters; it must have at most 1024"),
        ({"use_prefix_cache": None}, "use_prefix_cache is None"),
        ({"use_beam_search": True}, "use_beam_search is set with a width of 1"),
        ({**BEAMS, "temperature": 0.5}, "temperature is 0.5 with use_beam_search"),
        ({**BEAMS, "top_p": 0.9}, "top_p is 0.9 with use_beam_search"),
        ({**BEAMS, "min_p": 0.1}, "min_p is 0.1 with use_beam_search"),
        ({**BEAMS, "typical_p": 0.1}, "typical_p is 0.1 with use_beam_search"),
        ({**BEAMS, "top_k": 3}, "top_k is 3 with use_beam_search"),
        ({**BEAMS, "stop": "x"}, "stop is 'x' with use_beam_search"),
    ],
)
def test_what_cannot_be_honoured_is_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        SamplingParams(**settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "nothing; exactly one"),
        ({"regex": "a", "json_object": True}, "regex, json_object; exactly one"),
        ({"json": "{"}, "json is not the text"),
        ({"json": "[1]"}, "json is a list"),
        ({"json": "false"}, "json is a bool"),
        ({"json": {"enum": [object()]}}, "json is not a JSON schema"),
        ({"regex": ""}, "regex is ''"),
        ({"grammar": 5}, "grammar is 5"),
        ({"choice": []}, "choice is \\[\\]"),
        ({"choice": "ab"}, "choice is 'ab'"),
        ({"choice": ["a", ""]}, "choice holds ''"),
        ({"json_object": 1}, "json_object is 1"),
    ],
)
def test_a_form_is_exactly_one_that_can_be_read(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        StructuredOutputsParams(**settings)


def test_a_schema_may_be_text_a_dict_or_a_pydantic_class() -> None:
    class Model:
        @staticmethod
        def model_json_schema() -> dict[str, Any]:
            return {"type": "object"}

    for schema in ({"type": "object"}, '{"type": "object"}', Model):
        kept = StructuredOutputsParams(json=schema)
        assert isinstance(kept.json, str)
        assert json.loads(kept.json) == {"type": "object"}
        assert kept.kind == "json"


def test_settings_do_not_follow_a_later_change_and_can_be_copied() -> None:
    bias, words, allowed = {3: 1.0}, ["a"], [1, 2]
    params = SamplingParams(logit_bias=bias, bad_words=words, allowed_token_ids=allowed)
    bias[4] = 2.0
    words.append("b")
    allowed.clear()
    assert params.logit_bias == {3: 1.0}
    assert (params.bad_words, params.allowed_token_ids) == (("a",), (1, 2))
    with pytest.raises(TypeError, match="cannot change"):
        params.logit_bias[5] = 1.0  # type: ignore[index]
    for twin in (copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert twin == params
        assert hash(twin) == hash(params)
    assert dataclasses.replace(params, n=2).logit_bias == params.logit_bias


def test_the_width_is_how_many_sequences_run() -> None:
    assert SamplingParams().width == 1
    assert SamplingParams(n=3).width == 3
    assert SamplingParams(n=3, temperature=0.0).width == 3  # equal, but what was asked for
    assert SamplingParams(n=2, best_of=5).width == 5
    assert SamplingParams(use_beam_search=True, best_of=4).width == 4
    assert SamplingParams(**BEAMS).width == 2


def test_ranked_candidates_need_the_logprobs_of_their_tokens() -> None:
    assert SamplingParams(n=2).num_logprobs is None
    assert SamplingParams(n=2, best_of=3).num_logprobs == 0
    assert SamplingParams(n=2, best_of=3, logprobs=4).num_logprobs == 4


def test_a_prompt_alone_can_be_scored() -> None:
    assert SamplingParams(max_tokens=0, prompt_logprobs=2).max_tokens == 0
