"""Every field of a sampling request: what it becomes, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from tests.server.running import RunningServer
from vmalloc.engine import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vmalloc.server.errors import ApiError, validation_error
from vmalloc.server.protocol.base import field_classes
from vmalloc.server.protocol.completions import CompletionRequest
from vmalloc.server.protocol.sampling import SamplingFields
from vmalloc.server.sampling import sampling_params

PROMPT = "def read(path):\n"
HUGE = 10**400
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}


def params_of(**fields: Any) -> SamplingParams:
    return sampling_params(SamplingFields.model_validate(fields), max_tokens=5)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        (
            {"temperature": 2, "top_p": 0.5, "top_k": -1},
            {"temperature": 2.0, "top_p": 0.5, "top_k": -1},
        ),
        ({"min_p": 0.1, "typical_p": 0.9}, {"min_p": 0.1, "typical_p": 0.9}),
        (
            {"repetition_penalty": 1.2, "presence_penalty": -2, "frequency_penalty": 2},
            {"repetition_penalty": 1.2, "presence_penalty": -2, "frequency_penalty": 2},
        ),
        ({"seed": 2**64 - 1}, {"seed": 2**64 - 1}),
        ({"seed": -2}, {"seed": 2**64 - 2}),
        ({"logit_bias": {"5": -100, "7": 1.5}}, {"logit_bias": {5: -100.0, 7: 1.5}}),
        ({"logit_bias": {}}, {}),
        (
            {"allowed_token_ids": [1, 2], "bad_words": ["a"]},
            {"allowed_token_ids": [1, 2], "bad_words": ["a"]},
        ),
        ({"stop": "x"}, {"stop": "x"}),
        ({"stop": ["a", "b", "c", "d"]}, {"stop": ["a", "b", "c", "d"]}),
        (
            {"stop_token_ids": [3], "include_stop_str_in_output": True, "ignore_eos": True},
            {"stop_token_ids": [3], "include_stop_str_in_output": True, "ignore_eos": True},
        ),
        (
            {"min_tokens": 2, "skip_special_tokens": False},
            {"min_tokens": 2, "skip_special_tokens": False},
        ),
        ({"n": 2, "best_of": 3}, {"n": 2, "best_of": 3}),
        (
            {
                "use_beam_search": True,
                "beam_width": 3,
                "length_penalty": 2,
                "early_stopping": "never",
            },
            {"use_beam_search": True, "best_of": 3, "length_penalty": 2, "early_stopping": "never"},
        ),
        ({"prompt_logprobs": 3}, {"prompt_logprobs": 3}),
        (
            {"cache_salt": "s", "use_prefix_cache": False},
            {"cache_salt": "s", "use_prefix_cache": False},
        ),
        ({"response_format": {"type": "text"}}, {}),
        (
            {"response_format": {"type": "json_object"}},
            {"structured_outputs": StructuredOutputsParams(json_object=True)},
        ),
        ({"response_format": SCHEMA}, {"structured_outputs": StructuredOutputsParams(json={})}),
        (
            {"structured_outputs": {"regex": "a+"}},
            {"structured_outputs": StructuredOutputsParams(regex="a+")},
        ),
        ({"guided_choice": ["a"]}, {"structured_outputs": StructuredOutputsParams(choice=["a"])}),
        ({"guided_grammar": "g"}, {"structured_outputs": StructuredOutputsParams(grammar="g")}),
        (
            {"response_format": {"type": "text"}, "guided_json": "{}"},
            {"structured_outputs": StructuredOutputsParams(json={})},
        ),
        ({"stream": True}, {"output_kind": RequestOutputKind.DELTA}),
    ],
    ids=str,
)
def test_fields_reach_the_engine(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    defaults = {"max_tokens": 5, "output_kind": RequestOutputKind.FINAL_ONLY}
    assert params_of(**fields) == SamplingParams(**{**defaults, **expected})


def test_null_is_the_default() -> None:
    nulls = dict.fromkeys(SamplingFields.model_fields)
    assert params_of(**nulls) == params_of()


def test_every_setting_of_the_engine_can_be_sent() -> None:
    """But for code, and what a server decides."""
    own = {"logits_processors", "detokenize", "output_kind", "max_tokens", "logprobs"}
    classes = field_classes(SamplingFields)
    for name in set(SamplingParams.__dataclass_fields__) - own:
        assert classes[name] == "honoured", name


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": HUGE}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": -0.1}, "min_p"),
    ({"min_p": 1.1}, "min_p"),
    ({"typical_p": 0}, "typical_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"seed": 2**64}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 1.0}, "seed"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias"),
    ({"cache_salt": "s" * 1025}, "cache_salt"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": "1"}}, "logit_bias"),
    ({"logit_bias": {"9999": 1}}, "logit_bias"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [9999]}, "allowed_token_ids"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
    ({"bad_words": [" "]}, "bad_words"),
    ({"bad_words": ["x"] * 257}, "bad_words"),
    ({"bad_words": "x"}, "bad_words"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ({"stop_token_ids": [True]}, "stop_token_ids"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 17}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 17}, "n"),  # more than the server runs at once
    ({"n": True}, "n"),
    ({"n": HUGE}, "n"),
    ({"n": 3, "best_of": 2}, "best_of"),
    ({"best_of": 2, "temperature": 0}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"use_beam_search": True, "best_of": 2, "stream": True}, "use_beam_search"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"use_beam_search": True, "beam_width": 2, "temperature": 0.5}, "temperature"),
    ({"use_beam_search": True, "beam_width": 2, "top_k": 5}, "top_k"),
    ({"use_beam_search": True, "beam_width": 2, "stop": "a"}, "stop"),
    ({"use_beam_search": True, "beam_width": 2, "best_of": 3}, "beam_width"),
    ({"use_beam_search": True, "beam_width": 2, "n": 3}, "beam_width"),
    ({"beam_width": 2}, "beam_width"),
    ({"length_penalty": 0.5}, "length_penalty"),
    ({"use_beam_search": True, "beam_width": 2, "length_penalty": 11}, "length_penalty"),
    ({"early_stopping": True}, "early_stopping"),
    ({"early_stopping": "soon"}, "early_stopping"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {**SCHEMA, "type": "text"}}, "response_format.json_schema"),
    ({"response_format": {"type": "text", "x": 1}}, "response_format.x"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
    ),
    ({"response_format": SCHEMA, "guided_regex": "a"}, "guided_regex"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"guided_json": 5}, "guided_json"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": {"type": "x"}}, "guided_json"),
    ({"guided_json": {"enum": ["a" * 70_000]}}, "guided_json"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_regex": "a" * 70_000}, "guided_regex"),
    ({"guided_grammar": "?"}, "guided_grammar"),
    ({"guided_choice": ["a"] * 1025}, "guided_choice"),
    ({"guided_choice": ["a" * 1000] * 70}, "guided_choice"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "x"}},
            }
        },
        "response_format.json_schema.schema",
    ),
    ({"stop": "\ud800"}, "stop"),
    ({"guided_choice": []}, "guided_choice"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
    ),
    ({"stream": 1}, "stream"),
    ({"priority": 1}, "priority"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"store": True}, "store"),
    ({"user": 5}, "user"),
    ({"metadata": "x"}, "metadata"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2048}, "max_tokens"),
    ({"max_tokens": HUGE}, "max_tokens"),
    ({"max_tokens": 0, "echo": True, "n": 2}, "max_tokens"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", [1]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [1.0]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [2048]}, "prompt"),
    ({"prompt": [HUGE]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"prompt_token_ids": [1]}}, "prompt"),
    ({"prompt": ["a"] * 1025}, "prompt"),
    ({"prompt": [1] * 2048}, "prompt"),
    ({"prompt": "a " * 3000}, "prompt"),
    ({"suffix": "x"}, "suffix"),
    ({"prompt_embeds": "x"}, "prompt_embeds"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[str(case)[:80] for case in WRONG])
def test_what_cannot_be_honoured_is_refused_by_name(
    demo_server: RunningServer, fields: dict[str, Any], param: str
) -> None:
    response = demo_server.post("/v1/completions", **{"prompt": PROMPT, **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param.split(".")[-1] in error["message"]
    assert error["code"] is not None


@pytest.mark.parametrize(
    "name",
    [name for name, kind in field_classes(CompletionRequest).items() if kind == "unsupported"],
)
def test_unsupported_fields_are_refused_by_name(demo_server: RunningServer, name: str) -> None:
    response = demo_server.post("/v1/completions", prompt=PROMPT, **{name: {"any": "thing"}})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, name)
    assert error["code"] == "unsupported_parameter"
    assert error["message"].startswith(f"{name} is not supported: ")


def test_unknown_fields_are_refused_by_name(demo_server: RunningServer) -> None:
    response = demo_server.post("/v1/completions", prompt=PROMPT, temprature=1)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["param"], error["code"]) == ("temprature", "unknown_parameter")


def test_accepted_fields_change_nothing(demo_server: RunningServer) -> None:
    values: dict[str, Any] = {"metadata": {"a": "b"}, "store": False}
    names = [name for name, kind in field_classes(CompletionRequest).items() if kind == "accepted"]
    fields = {name: values.get(name, "auto") for name in names}
    body = {"prompt": PROMPT, "seed": 4}
    plain = demo_server.complete(**body)["choices"]
    assert demo_server.complete(**body, **fields)["choices"] == plain
    neutral = {"suffix": "", "spaces_between_special_tokens": True}
    assert demo_server.complete(**body, **neutral)["choices"] == plain


def test_a_million_wrong_entries_are_one_error() -> None:
    for fields in (
        {"prompt": PROMPT, "structured_outputs": {"choice": [1] * 1_000_000}},
        {str(idx): 1 for idx in range(1_000_000)},
        {"prompt": ["a"] * 1_000_000},
        {"prompt": PROMPT, "stop_token_ids": ["a"] * 1_000_000},
        {"prompt": PROMPT, "guided_choice": [1] * 1_000_000},
        {"prompt": PROMPT, "logit_bias": {str(idx): "a" for idx in range(1_000_000)}},
        {"prompt": PROMPT, "stream_options": {str(idx): 1 for idx in range(1_000_000)}},
    ):
        with pytest.raises(ValidationError) as wrong:
            CompletionRequest.model_validate(fields)
        assert len(wrong.value.errors(include_input=False)) <= 2


def test_messages_name_value_and_limit() -> None:
    def message(**fields: Any) -> str:
        try:
            params_of(**fields)
        except ValidationError as wrong:
            return validation_error(wrong.errors()).message
        except ApiError as wrong:
            return wrong.message
        raise AssertionError("nothing was wrong")

    assert message(temperature=3) == "temperature: Input should be less than or equal to 2; it is 3"
    assert message(stop=["a"] * 5) == "stop: has 5 strings; at most 4"
    assert message(n=2, best_of=3, stream=True).startswith("best_of is 3 with stream and n 2; ")
