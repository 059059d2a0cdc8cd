"""Responses over a real socket, read by the real client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, get_type_hints

import openai
import pydantic
import pytest
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from tests.server.running import RunningServer
from tests.server.templates import TAGGED, with_template
from vmalloc.server.protocol.base import field_classes
from vmalloc.server.protocol.response_request import ResponseRequest

PATH = "/v1/responses"
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "look",
    "description": "Looks.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"where": {"enum": ["up", "down"]}},
        "required": ["where"],
        "additionalProperties": False,
    },
}
USER: dict[str, Any] = {"role": "user", "content": "Hi"}
LOGPROBS: list[Any] = ["message.output_text.logprobs"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    running = RunningServer(with_template(tmp_path_factory.mktemp("responses"), TAGGED))
    yield running
    running.wait_idle()
    running.close()


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def chat_text(server: RunningServer, messages: list[Any], **settings: Any) -> str:
    answer = server.post("/v1/chat/completions", messages=messages, **settings).json()
    text: str = answer["choices"][0]["message"]["content"]
    return text


def events_of(server: RunningServer, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream; each is named by its type, and numbered."""
    with server.http.stream("POST", PATH, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        lines = [line for line in response.iter_lines() if line]
    names = [line.removeprefix("event: ") for line in lines[::2]]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert names == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def settled(response: dict[str, Any]) -> dict[str, Any]:
    """A response without what differs between two of the same request."""
    kept = {name: one for name, one in response.items() if name not in ("id", "usage")}
    for name in ("created_at", "completed_at"):
        assert kept.pop(name) is None or response[name] > 1e9
    items = [{**item} for item in response["output"]]
    for item in items:
        for name in ("id", "call_id"):
            item.pop(name, None)
    return {**kept, "output": items}


def test_a_response_is_the_chat_s_answer(client: openai.OpenAI, server: RunningServer) -> None:
    response = client.responses.create(
        model="demo",
        instructions="Be brief.",
        input="Tell me about the cache.",
        temperature=0,
        max_output_tokens=12,
        metadata={"a": "b"},
    )
    chat = [{"role": "system", "content": "Be brief."}]
    chat.append({"role": "user", "content": "Tell me about the cache."})
    assert response.output_text == chat_text(server, chat, temperature=0, max_tokens=12) != ""
    assert response.id.startswith("resp_")
    assert response.object == "response"
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.metadata == {"a": "b"}
    assert response.temperature == 0
    (message,) = response.output
    assert message.type == "message"
    assert (message.role, message.status) == ("assistant", "incomplete")
    usage = response.usage
    assert usage is not None
    assert usage.output_tokens == 12
    assert usage.total_tokens == usage.input_tokens + 12
    assert usage.input_tokens_details.cached_tokens < usage.input_tokens


def test_items_are_the_messages_of_a_chat(server: RunningServer) -> None:
    earlier = server.post(PATH, input="One", max_output_tokens=3, seed=1).json()["output"]
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "One"}]},
        *earlier,  # as it came back
        {"role": "user", "content": "Two"},
    ]
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": earlier[0]["content"][0]["text"]},
        {"role": "user", "content": "Two"},
    ]
    response = server.post(PATH, input=items, max_output_tokens=8, seed=4).json()
    expected = chat_text(server, chat, max_tokens=8, seed=4)
    assert response["output"][0]["content"][0]["text"] == expected
    tokens = server.post("/tokenize", messages=chat).json()
    assert response["usage"]["input_tokens"] == tokens["count"]


def test_calls_and_what_tools_answered_go_on(server: RunningServer) -> None:
    items = [
        USER,
        {"role": "assistant", "content": "I look."},
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
        {"type": "function_call", "call_id": "b", "name": "look", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "a", "output": "blue"},
        {
            "type": "function_call_output",
            "call_id": "b",
            "output": [{"type": "input_text", "text": "red"}],
        },
    ]
    calls = [
        {"id": name, "function": {"name": "look", "arguments": arguments}}
        for name, arguments in (("a", "{}"), ("b", '{"x": 1}'))
    ]
    chat = [
        USER,
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "a", "content": "blue"},
        {"role": "tool", "tool_call_id": "b", "content": "red"},
    ]
    response = server.post(PATH, input=items, max_output_tokens=1).json()
    tokens = server.post("/tokenize", messages=chat).json()
    assert response["usage"]["input_tokens"] == tokens["count"]


def test_a_stream_is_the_plain_response_in_pieces(server: RunningServer) -> None:
    body = {
        "input": "Hi",
        "seed": 3,
        "max_output_tokens": 10,
        "include": LOGPROBS,
        "top_logprobs": 2,
    }
    plain = server.post(PATH, **body).json()
    events = events_of(server, **body)
    kinds = [event["type"] for event in events]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{plain['status']}",
    ]
    assert len(deltas) > 1
    assert settled(events[-1]["response"]) == settled(plain)
    assert events[0]["response"]["status"] == "in_progress"
    part = plain["output"][0]["content"][0]
    assert "".join(delta["delta"] for delta in deltas) == part["text"]
    assert events[-4]["text"] == part["text"]
    logprobs = part["logprobs"]
    assert len(logprobs) == plain["usage"]["output_tokens"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in logprobs)
    streamed = [entry for delta in deltas for entry in delta["logprobs"]]
    assert streamed == logprobs[: len(streamed)]
    items = {event["item_id"] for event in events[3:-2]}
    assert items == {events[2]["item"]["id"]} == {events[-1]["response"]["output"][0]["id"]}


def test_the_client_reads_a_stream(client: openai.OpenAI) -> None:
    settings: Any = {
        "model": "demo",
        "input": "Hi",
        "temperature": 0,
        "extra_body": {"stop": ["e"]},
    }
    with client.responses.stream(**settings) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    plain = client.responses.create(**settings)
    assert final.status == plain.status == "completed"
    assert final.output_text == plain.output_text == "".join(texts) != ""
    assert final.completed_at is not None


class Verdict(pydantic.BaseModel):
    verdict: bool
    score: int = pydantic.Field(ge=0, le=9)


def test_the_client_parses_a_response_of_a_schema(client: openai.OpenAI) -> None:
    settings: Any = {"model": "demo", "input": "Hi", "text_format": Verdict, "temperature": 0}
    response = client.responses.parse(**settings)
    assert isinstance(response.output_parsed, Verdict)
    with client.responses.stream(**settings) as stream:
        stream.until_done()
        assert isinstance(stream.get_final_response().output_parsed, Verdict)


def test_text_is_json_where_it_must_be(server: RunningServer) -> None:
    for form, begin in (({"type": "json_object"}, "{"), ({"type": "text"}, "")):
        response = server.post(PATH, input="Hi", text={"format": form}, max_output_tokens=9).json()
        assert response["text"]["format"]["type"] == form["type"]
        assert response["output"][0]["content"][0]["text"].lstrip().startswith(begin)


def test_tools_are_called(client: openai.OpenAI) -> None:
    settings: Any = {
        "model": "demo",
        "input": "Look!",
        "tools": [TOOL],
        "tool_choice": {"type": "function", "name": "look"},
        "extra_body": {"seed": 2},
    }
    response = client.responses.create(**settings)
    (call,) = response.output
    assert response.status == "completed"
    assert call.type == "function_call"
    assert (call.name, call.status) == ("look", "completed")
    assert json.loads(call.arguments)["where"] in ("up", "down")
    assert response.tools[0].type == "function"
    with client.responses.stream(**settings) as stream:
        kinds = [event.type for event in stream]
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call"
    assert streamed.arguments == call.arguments
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_several_items_of_a_stream_are_the_plain_ones(server: RunningServer) -> None:
    body = {
        "input": "Look!",
        "tools": [TOOL],
        "tool_choice": "required",
        "seed": 5,
        "max_output_tokens": 75,
    }
    plain = server.post(PATH, **body).json()
    events = events_of(server, **body)
    assert len(plain["output"]) > 1
    assert settled(events[-1]["response"]) == settled(plain)
    added = [event for event in events if event["type"] == "response.output_item.added"]
    done = [event for event in events if event["type"] == "response.output_item.done"]
    indices = list(range(len(plain["output"])))
    assert [event["output_index"] for event in added] == indices
    assert [event["output_index"] for event in done] == indices
    assert [event["item"] for event in done] == events[-1]["response"]["output"]


def test_accepted_fields_change_nothing(server: RunningServer) -> None:
    body = {"input": "Hi", "temperature": 0, "max_output_tokens": 4}
    plain = server.post(PATH, **body).json()
    accepted = {
        "store": False,
        "user": "u",
        "service_tier": "auto",
        "truncation": "disabled",
        "background": False,
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"summary": "auto"},
        "prompt_cache_key": "k",
        "text": {"verbosity": "medium"},
    }
    assert (
        server.post(PATH, **body, **accepted).json()["output"][0]["content"]
        == (plain["output"][0]["content"])
    )


def test_nothing_is_stored(client: openai.OpenAI, server: RunningServer) -> None:
    made = client.responses.create(model="demo", input="Hi", max_output_tokens=1)
    assert made.to_dict()["store"] is False
    for ask in (
        client.responses.retrieve,
        client.responses.delete,
        client.responses.cancel,
        client.responses.input_items.list,
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask(made.id)
        assert (caught.value.code, caught.value.param) == ("response_not_found", "response_id")
        assert "not stored" in caught.value.message
    refused = server.http.put(f"{PATH}/{made.id}")
    assert (refused.status_code, refused.headers["allow"]) == (405, "DELETE, GET")


def test_every_parameter_of_openai_is_in_a_class() -> None:
    theirs = set(get_type_hints(ResponseCreateParamsBase)) | {"stream"}
    ours = field_classes(ResponseRequest)
    assert theirs <= set(ours)
    assert set(ours.values()) == {"honoured", "accepted", "unsupported"}


CALL: dict[str, Any] = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}


@pytest.mark.parametrize(
    ("param", "code", "body"),
    [
        ("input", "missing_required_parameter", {"input": ...}),
        ("input", "invalid_value", {"input": []}),
        ("input", "invalid_value", {"input": 3}),
        ("input.0", "invalid_value", {"input": [3]}),
        ("input.0.role", "invalid_value", {"input": [{"role": "tool", "content": "x"}]}),
        ("input.0.role", "invalid_value", {"input": [{"content": "x"}]}),
        ("input.0.content", "invalid_value", {"input": [{"role": "user"}]}),
        ("input.0.content", "invalid_value", {"input": [{"role": "user", "content": "\ud800"}]}),
        (
            "input.0.content",
            "unsupported_parameter",
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        ),
        (
            "input.0.content",
            "unsupported_parameter",
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
        ),
        ("input.0.type", "invalid_value", {"input": [{"type": "reasoning", "summary": []}]}),
        ("input.0.type", "invalid_value", {"input": [{"type": "item_reference", "id": "a"}]}),
        ("input.0.call_id", "invalid_value", {"input": [{**USER, "call_id": "a"}]}),
        ("input.1.name", "invalid_value", {"input": [USER, {**CALL, "name": None}]}),
        (
            "input.1.arguments",
            "invalid_value",
            {"input": [USER, {**CALL, "arguments": "[]"}]},
        ),
        ("input", "context_length_exceeded", {"input": "word " * 2100}),
        ("model", "model_not_found", {"model": "gpt-4"}),
        ("max_output_tokens", "invalid_value", {"max_output_tokens": 0}),
        ("max_output_tokens", "context_length_exceeded", {"max_output_tokens": 2048}),
        ("temperature", "invalid_value", {"temperature": 2.5}),
        ("top_logprobs", "invalid_value", {"top_logprobs": 2}),
        ("top_logprobs", "invalid_value", {"include": LOGPROBS, "top_logprobs": 21}),
        ("include.0", "invalid_value", {"include": ["file_search_call.results"]}),
        ("store", "invalid_value", {"store": True}),
        ("background", "unsupported_parameter", {"background": True}),
        ("previous_response_id", "unsupported_parameter", {"previous_response_id": "resp_1"}),
        ("conversation", "unsupported_parameter", {"conversation": "conv_1"}),
        ("prompt", "unsupported_parameter", {"prompt": {"id": "pmpt_1"}}),
        ("truncation", "unsupported_parameter", {"truncation": "auto"}),
        ("reasoning.effort", "invalid_value", {"reasoning": {"effort": "mild"}}),
        ("reasoning.effort", "unsupported_parameter", {"reasoning": {"effort": "high"}}),
        ("text.verbosity", "unsupported_parameter", {"text": {"verbosity": "high"}}),
        ("text.format.type", "invalid_value", {"text": {"format": {"type": "grammar"}}}),
        ("text.format.schema", "invalid_value", {"text": {"format": {"type": "json_schema"}}}),
        (
            "text.format",
            "invalid_value",
            {
                "text": {
                    "format": {
                        "type": "json_schema",
                        "name": "a",
                        "schema": {"type": "object", "not": {}},
                    }
                }
            },
        ),
        (
            "text.format",
            "unsupported_parameter",
            {"text": {"format": {"type": "json_object"}}, "tools": [TOOL]},
        ),
        ("tools.0.type", "invalid_value", {"tools": [{"type": "web_search"}]}),
        ("tools.1.name", "invalid_value", {"tools": [TOOL, TOOL]}),
        ("tool_choice", "invalid_value", {"tool_choice": "required"}),
        ("metadata.a", "invalid_value", {"metadata": {"a": 1}}),
        ("stream_options", "invalid_value", {"stream_options": {}}),
        ("messages", "unknown_parameter", {"messages": [USER]}),
        ("n", "unknown_parameter", {"n": 2}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    server: RunningServer, param: str, code: str, body: dict[str, Any]
) -> None:
    body = {name: one for name, one in {"input": "Hi", **body}.items() if one is not ...}
    headers = {"content-type": "application/json"}
    response = server.http.post(PATH, content=json.dumps(body), headers=headers)
    assert response.status_code == (404 if code == "model_not_found" else 400), response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert set(error) == {"message", "type", "param", "code"}


def test_a_stream_that_is_aborted_fails(server: RunningServer) -> None:
    body = {"input": "Hi", "ignore_eos": True, "stream": True}
    with server.http.stream("POST", PATH, json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        assert next(lines) == "event: response.created"
        name = json.loads(next(lines).removeprefix("data: "))["response"]["id"]
        assert server.post("/abort", request_id=name).json() == {"num_aborted": 1}
        rest = list(lines)
    assert rest[-2] == "event: response.failed"
    failed = json.loads(rest[-1].removeprefix("data: "))["response"]
    assert failed["status"] == "failed"
    assert failed["error"]["code"] == "request_aborted"
