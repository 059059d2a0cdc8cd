"""Chats over a real socket: what the real client reads is what the engine makes offline."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, get_type_hints

import fastjsonschema
import httpx
import openai
import pydantic
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase

from tests.server.running import RunningServer
from vmalloc.engine import LLM, SamplingParams
from vmalloc.server.protocol.base import field_classes
from vmalloc.server.protocol.chat import ChatRequest

CHAT = "/v1/chat/completions"
ASK: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Tell me about the cache."},
]
PROMPT = "<|bos|><|system|>Be brief.<|user|>Tell me about the cache.<|assistant|>"


@pytest.fixture
def client(demo_server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=demo_server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def prompt_ids(llm: LLM, text: str = PROMPT) -> dict[str, Any]:
    token_ids: list[int] = llm.get_tokenizer().encode(text, add_special_tokens=False)
    return {"prompt_token_ids": token_ids}


def offline(llm: LLM, text: str = PROMPT, **settings: Any) -> Any:
    """What the engine makes of a rendered chat."""
    return llm.generate([prompt_ids(llm, text)], SamplingParams(**settings), use_tqdm=False)[0]


def joined(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    return "".join(one["delta"].get("content", "") for one in choices if one["index"] == index)


def test_a_greedy_answer_is_the_engine_s(client: openai.OpenAI, demo_llm: LLM) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=ASK, temperature=0, max_tokens=20
    )
    expected = offline(demo_llm, temperature=0.0, max_tokens=20)
    (choice,) = answer.choices
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "demo")
    assert choice.message.role == "assistant"
    assert choice.message.content == expected.outputs[0].text != ""
    assert choice.finish_reason == expected.outputs[0].finish_reason
    assert choice.logprobs is None
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens == len(expected.prompt_token_ids)
    assert usage.completion_tokens == len(expected.outputs[0].token_ids)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_seeded_answers_and_their_logprobs_are_the_engine_s(
    client: openai.OpenAI, demo_llm: LLM
) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=ASK,
        seed=7,
        n=3,
        max_completion_tokens=6,
        logprobs=True,
        top_logprobs=2,
        top_p=0.9,
        frequency_penalty=0.5,
        logit_bias={"300": 2},
        stop=["zzz"],
    )
    expected = offline(
        demo_llm,
        seed=7,
        n=3,
        max_tokens=6,
        logprobs=2,
        top_p=0.9,
        frequency_penalty=0.5,
        logit_bias={300: 2.0},
        stop=["zzz"],
    )
    assert len({choice.message.content for choice in answer.choices}) > 1
    for choice, other in zip(answer.choices, expected.outputs, strict=True):
        assert choice.index == other.index
        assert choice.message.content == other.text
        assert choice.logprobs is not None
        entries = choice.logprobs.content or []
        for entry, token_id, place in zip(entries, other.token_ids, other.logprobs, strict=True):
            assert entry.logprob == pytest.approx(place[token_id].logprob, abs=1e-4)
            assert entry.bytes is not None
            assert bytes(entry.bytes).decode("utf-8", "replace") == place[token_id].decoded_token
            ranked = sorted(place.values(), key=lambda one: one.rank)[:2]
            tops = [top.logprob for top in entry.top_logprobs]
            assert tops == pytest.approx([one.logprob for one in ranked], abs=1e-4)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)  # once, whatever n is


def test_a_stream_is_the_plain_answer_in_pieces(demo_server: RunningServer) -> None:
    body = {
        "messages": ASK,
        "seed": 5,
        "n": 2,
        "max_tokens": 12,
        "logprobs": True,
        "top_logprobs": 1,
        "return_token_ids": True,
    }
    plain = demo_server.post(CHAT, **body).json()
    chunks = demo_server.stream(CHAT, **body, stream_options={"include_usage": True})
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    for index, chunk in enumerate(chunks[:2]):  # the roles come first
        (choice,) = chunk["choices"]
        assert choice["index"] == index
        assert choice["delta"] == {"role": "assistant", "content": ""}
        assert choice["finish_reason"] is None
    assert chunks[0]["prompt_token_ids"] == plain["prompt_token_ids"]
    for expected in plain["choices"]:
        mine = [one["choices"][0] for one in chunks[:-1]]
        mine = [one for one in mine if one["index"] == expected["index"]]
        assert (
            "".join(one["delta"].get("content", "") for one in mine)
            == (expected["message"]["content"])
        )
        entries = [entry for one in mine if one["logprobs"] for entry in one["logprobs"]["content"]]
        assert entries == expected["logprobs"]["content"]
        assert [one for chunk in mine for one in chunk["token_ids"]] == expected["token_ids"]
        assert [one["finish_reason"] for one in mine if one["finish_reason"]] == [
            expected["finish_reason"]
        ]
        assert mine[-1]["delta"] == {}
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert chunks[-1]["usage"][name] == plain["usage"][name]


def test_usage_can_come_with_every_chunk(demo_server: RunningServer) -> None:
    options = {"include_usage": False, "continuous_usage_stats": True}
    chunks = demo_server.stream(
        CHAT, messages=ASK, max_tokens=4, ignore_eos=True, stream_options=options
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] == 4
    assert chunks[-1]["choices"]


def test_the_client_reads_a_stream(client: openai.OpenAI) -> None:
    settings: Any = {"model": "demo", "messages": ASK, "temperature": 0, "stop": ["e"]}
    with client.chat.completions.stream(**settings) as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    plain = client.chat.completions.create(**settings)
    assert plain.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == plain.choices[0].message.content


class Verdict(pydantic.BaseModel):
    verdict: bool
    score: int = pydantic.Field(ge=0, le=9)


def test_the_client_parses_an_answer_of_a_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="demo", messages=ASK, response_format=Verdict, max_tokens=200
    )
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, Verdict)
    assert answer.choices[0].finish_reason == "stop"


def test_answers_are_json_where_they_must_be(demo_server: RunningServer) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    named = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    for form in (named, {"type": "text"}):
        answer = demo_server.post(
            CHAT, messages=ASK, response_format=form, max_tokens=30, temperature=0, seed=0
        )
        assert answer.status_code == 200
        text = answer.json()["choices"][0]["message"]["content"]
        if form is named:
            fastjsonschema.compile(schema)(json.loads(text))
    answer = demo_server.post(
        CHAT, messages=ASK, response_format={"type": "json_object"}, max_tokens=9
    )
    text = answer.json()["choices"][0]["message"]["content"]
    assert text.lstrip().startswith("{")


def test_an_answer_is_as_long_as_the_context_holds(demo_server: RunningServer) -> None:
    words = "word " * 1000
    answer = demo_server.post(
        CHAT, messages=[{"role": "user", "content": words}], ignore_eos=True
    ).json()
    assert answer["usage"]["prompt_tokens"] > 1900  # so that it does not take long
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["total_tokens"] == 2048


def test_a_message_can_be_gone_on_with_and_echoed(
    demo_server: RunningServer, demo_llm: LLM
) -> None:
    begun = "The cache is"
    body: dict[str, Any] = {
        "messages": [*ASK, {"role": "assistant", "content": begun}],
        "temperature": 0,
        "max_tokens": 8,
        "continue_final_message": True,
    }
    expected = offline(demo_llm, PROMPT + begun, temperature=0.0, max_tokens=8).outputs[0].text
    plain = demo_server.post(CHAT, **body).json()["choices"][0]["message"]["content"]
    assert plain == expected
    echoed = demo_server.post(CHAT, **body, echo=True).json()["choices"][0]["message"]["content"]
    assert echoed == begun + expected
    assert joined(demo_server.stream(CHAT, **body, echo=True)) == begun + expected


def test_text_parts_are_lines(demo_server: RunningServer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    counts = [
        demo_server.post("/tokenize", messages=[{"role": "user", "content": content}]).json()[
            "tokens"
        ]
        for content in (parts, "one\ntwo")
    ]
    assert counts[0] == counts[1]


def test_tokenize_sees_a_chat_as_chats_do(demo_server: RunningServer, demo_llm: LLM) -> None:
    tokens = demo_server.post("/tokenize", messages=ASK, return_token_strs=True).json()
    assert tokens["tokens"] == prompt_ids(demo_llm)["prompt_token_ids"]
    assert tokens["token_strs"][:2] == ["<|bos|>", "<|system|>"]
    answer = demo_server.post(CHAT, messages=ASK, max_tokens=1, return_token_ids=True).json()
    assert answer["prompt_token_ids"] == tokens["tokens"]
    bare = demo_server.post("/tokenize", messages=ASK, add_generation_prompt=False).json()
    assert bare["tokens"] == tokens["tokens"][:-1]


def test_a_chat_s_beginning_is_cached(demo_server: RunningServer) -> None:
    long = [{"role": "user", "content": "A long story. " * 60}]
    body = {"messages": long, "max_tokens": 2, "cache_salt": "story"}
    first = demo_server.post(CHAT, **body).json()["usage"]
    second = demo_server.post(CHAT, **body).json()["usage"]
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] > first["prompt_tokens"] // 2


def test_beams_are_the_engine_s(demo_server: RunningServer, demo_llm: LLM) -> None:
    settings = {"n": 2, "best_of": 3, "use_beam_search": True, "temperature": 0, "max_tokens": 6}
    answer = demo_server.post(CHAT, messages=ASK, **settings).json()
    expected = offline(demo_llm, **{**settings, "temperature": 0.0})
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == [one.text for one in expected.outputs]


def test_prompt_logprobs_are_the_engine_s(demo_server: RunningServer, demo_llm: LLM) -> None:
    answer = demo_server.post(CHAT, messages=ASK, max_tokens=1, prompt_logprobs=1).json()
    expected = offline(demo_llm, max_tokens=1, prompt_logprobs=1)
    token_ids = expected.prompt_token_ids
    assert answer["prompt_logprobs"][0] is None
    for place, other, token_id in zip(
        answer["prompt_logprobs"][1:], expected.prompt_logprobs[1:], token_ids[1:], strict=True
    ):
        assert place[str(token_id)]["logprob"] == pytest.approx(other[token_id].logprob, abs=1e-4)


def test_accepted_fields_change_nothing(demo_server: RunningServer) -> None:
    body = {"messages": ASK, "temperature": 0, "max_tokens": 5}
    plain = demo_server.post(CHAT, **body).json()["choices"]
    accepted = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "prediction": {"type": "content", "content": "x"},
        "modalities": ["text"],
        "verbosity": "medium",
        "reasoning_effort": "none",
        "functions": [],
        "tools": None,
        "logit_bias": None,
        "max_completion_tokens": 5,
    }
    assert demo_server.post(CHAT, **body, **accepted).json()["choices"] == plain


def test_every_parameter_of_openai_is_in_a_class() -> None:
    theirs = set(get_type_hints(CompletionCreateParamsBase)) | {"stream"}
    ours = field_classes(ChatRequest)
    assert theirs <= set(ours)
    assert set(ours.values()) == {"honoured", "accepted", "unsupported"}


USER: dict[str, Any] = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("param", "code", "body"),
    [
        ("messages", "missing_required_parameter", {"messages": ...}),
        ("messages", "invalid_value", {"messages": []}),
        ("messages", "invalid_value", {"messages": "Hi"}),
        ("messages.0", "invalid_value", {"messages": ["Hi"]}),
        ("messages.0.role", "missing_required_parameter", {"messages": [{"content": "Hi"}]}),
        ("messages.0.role", "invalid_value", {"messages": [{"role": "boss", "content": "Hi"}]}),
        ("messages.0.content", "invalid_value", {"messages": [{"role": "user"}]}),
        ("messages.0.content", "invalid_value", {"messages": [{"role": "user", "content": 3}]}),
        (
            "messages.0.content",
            "unsupported_parameter",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        ),
        (
            "messages.0.content",
            "unsupported_parameter",
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        ),
        (
            "messages.0.content",
            "invalid_value",
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        ),
        (
            "messages.0.content",
            "invalid_value",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}]},
        ),
        (
            "messages.0.content",
            "invalid_value",
            {"messages": [{"role": "user", "content": "\ud800"}]},
        ),
        ("messages.0.name", "invalid_value", {"messages": [{**USER, "name": "<a>"}]}),
        ("messages.0.nick", "unknown_parameter", {"messages": [{**USER, "nick": "a"}]}),
        ("messages.0.tool_calls", "invalid_value", {"messages": [{**USER, "tool_calls": []}]}),
        ("messages.0.tool_call_id", "invalid_value", {"messages": [{**USER, "tool_call_id": "a"}]}),
        (
            "messages.0.tool_call_id",
            "invalid_value",
            {"messages": [{"role": "tool", "content": "x"}]},
        ),
        ("messages.0.refusal", "unsupported_parameter", {"messages": [{**USER, "refusal": "no"}]}),
        (
            "messages",
            "context_length_exceeded",
            {"messages": [{"role": "user", "content": "word " * 2100}]},
        ),
        ("model", "model_not_found", {"model": "gpt-4"}),
        ("max_tokens", "invalid_value", {"max_tokens": 0}),
        ("max_tokens", "context_length_exceeded", {"max_tokens": 2048}),
        ("max_tokens", "invalid_value", {"max_tokens": 1, "max_completion_tokens": 2}),
        ("max_completion_tokens", "context_length_exceeded", {"max_completion_tokens": 2048}),
        ("top_logprobs", "invalid_value", {"top_logprobs": 2}),
        ("top_logprobs", "invalid_value", {"logprobs": True, "top_logprobs": 21}),
        ("top_logprobs", "invalid_value", {"logprobs": True, "top_logprobs": -1}),
        ("logprobs", "invalid_value", {"logprobs": 1}),
        ("temperature", "invalid_value", {"temperature": 2.5}),
        ("n", "invalid_value", {"n": 0}),
        ("stream_options", "invalid_value", {"stream_options": {"include_usage": True}}),
        ("stop", "invalid_value", {"stop": ["a", "b", "c", "d", "e"]}),
        ("response_format.type", "invalid_value", {"response_format": {"type": "xml"}}),
        ("response_format.json_schema", None, {"response_format": {"type": "json_schema"}}),
        (
            "response_format",
            "invalid_value",
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "object", "not": {}}},
                }
            },
        ),
        ("echo", "invalid_value", {"echo": True}),
        ("continue_final_message", "invalid_value", {"continue_final_message": True}),
        (
            "continue_final_message",
            "invalid_value",
            {
                "messages": [USER, {"role": "assistant", "content": "a"}],
                "continue_final_message": True,
                "add_generation_prompt": True,
            },
        ),
        ("chat_template_kwargs", "unknown_parameter", {"chat_template_kwargs": {"a": 1}}),
        ("chat_template", "unsupported_parameter", {"chat_template": "{{ messages }}"}),
        ("reasoning_effort", "unsupported_parameter", {"reasoning_effort": "high"}),
        ("reasoning_effort", "invalid_value", {"reasoning_effort": "mild"}),
        ("verbosity", "unsupported_parameter", {"verbosity": "low"}),
        ("modalities", "unsupported_parameter", {"modalities": ["text", "audio"]}),
        ("audio", "unsupported_parameter", {"audio": {"voice": "alloy", "format": "wav"}}),
        ("web_search_options", "unsupported_parameter", {"web_search_options": {}}),
        ("moderation", "unsupported_parameter", {"moderation": {"model": "x"}}),
        ("store", "invalid_value", {"store": True}),
        ("temprature", "unknown_parameter", {"temprature": 1}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    demo_server: RunningServer, param: str, code: str | None, body: dict[str, Any]
) -> None:
    body = {name: one for name, one in {"messages": [USER], **body}.items() if one is not ...}
    for is_stream in (False, True):
        if is_stream and "stream_options" in body:
            continue
        response = post_ascii(demo_server, {**body, "stream": is_stream})
        assert response.status_code == (404 if code == "model_not_found" else 400), response.text
        error = response.json()["error"]
        assert error["param"] == param, error
        if code is not None:
            assert error["code"] == code, error
        assert set(error) == {"message", "type", "param", "code"}


def post_ascii(demo_server: RunningServer, body: dict[str, Any]) -> httpx.Response:
    """POST JSON that may have half surrogate pairs in it."""
    headers = {"content-type": "application/json"}
    return demo_server.http.post(CHAT, content=json.dumps(body), headers=headers)


def test_errors_have_the_client_s_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="demo", messages=ASK, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=ASK)
    assert missing.value.code == "model_not_found"


def test_a_stream_that_is_aborted_says_so(demo_server: RunningServer) -> None:
    body = {"messages": ASK, "ignore_eos": True, "stream": True}
    with demo_server.http.stream("POST", CHAT, json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        name = json.loads(next(lines).removeprefix("data: "))["id"]
        assert demo_server.post("/abort", request_id=name).json() == {"num_aborted": 1}
        rest = list(lines)
    assert rest[-1] == "data: [DONE]"
    error = json.loads(rest[-2].removeprefix("data: "))["error"]
    assert error["code"] == "request_aborted"


def test_a_chat_that_cannot_fit_is_refused_before_it_is_tokenised(
    demo_server: RunningServer,
) -> None:
    """Megabytes take the one tokenizer many seconds, and all other prompts wait."""
    messages = [{"role": "user", "content": "x" * 5_000_000}]
    response = demo_server.post("/v1/chat/completions", messages=messages)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
    assert re.match(r"messages make 50000\d\d characters; ", error["message"])
