"""Tools: what is refused, what the model is held to, and how calls are found in its text."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastjsonschema
import openai
import pytest
from transformers import AutoTokenizer

import vmalloc.engine as engine_package
from tests.server.running import RunningServer
from tests.server.templates import BARE, TAGGED, with_template
from vmalloc.engine.structured_output import StructuredOutputCompiler
from vmalloc.server.protocol.tools import FunctionDefinition, NamedTool
from vmalloc.server.template_source import read_template
from vmalloc.server.tool_parser import ParsedCall, ToolParser
from vmalloc.server.tools import ToolPlan, plan_tools

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Rome"]},
        "when": {"$ref": "#/$defs/Day"},
    },
    "required": ["city", "when"],
    "additionalProperties": False,
    "$defs": {
        "Day": {
            "type": "object",
            "properties": {"day": {"type": "integer", "minimum": 1, "maximum": 31}},
            "required": ["day"],
            "additionalProperties": False,
        }
    },
}
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "additionalProperties": False}
SCHEMAS = {"get_weather": WEATHER, "no_op": NO_ARGUMENTS}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "get_weather", "description": "Looks.", "parameters": WEATHER},
    },
    {"type": "function", "function": {"name": "no_op"}},
]
ASK: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module", params=["tagged", "bare"])
def tool_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    source = {"tagged": TAGGED, "bare": BARE}[request.param]
    running = RunningServer(with_template(tmp_path_factory.mktemp(request.param), source))
    yield running
    running.wait_idle()
    running.close()


@pytest.fixture(scope="module")
def plain_server() -> Iterator[RunningServer]:
    running = RunningServer()
    yield running
    running.close()


@pytest.fixture
def client(tool_server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=tool_server.url + "/v1", api_key="none", max_retries=0)


def check_call(call: Any) -> None:
    """The arguments follow the tool's schema."""
    fastjsonschema.compile(SCHEMAS[call.function.name])(json.loads(call.function.arguments))
    assert call.id.startswith("call_")
    assert call.type == "function"


@pytest.mark.parametrize("seed", range(2))
def test_a_named_tool_is_called_by_its_schema(client: openai.OpenAI, seed: int) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=ASK, tools=TOOLS, tool_choice=NAMED, seed=seed, max_tokens=200
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    (call,) = choice.message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "get_weather"
    check_call(call)


@pytest.mark.parametrize("seed", range(2))
def test_required_tools_are_called_once_if_calls_may_not_be_parallel(
    client: openai.OpenAI, seed: int
) -> None:
    answer = client.chat.completions.create(
        model="demo",
        messages=ASK,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        seed=seed,
        temperature=1.5,
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls or ()
    check_call(call)


def test_a_stream_of_calls_is_the_plain_answer(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {
        "model": "demo",
        "messages": ASK,
        "tools": TOOLS,
        "tool_choice": "required",
        "seed": 3,
        "max_tokens": 150,
        "n": 3,
    }
    plain = client.chat.completions.create(**settings)
    stream = client.chat.completions.create(stream=True, **settings)
    chunks = list(stream)
    assert [chunk.choices[0].delta.role for chunk in chunks[:3]] == ["assistant"] * 3
    for choice in plain.choices:
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        deltas = [call for one in mine for call in one.delta.tool_calls or ()]
        names, arguments = deltas[::2], deltas[1::2]
        expected = choice.message.tool_calls or []
        assert expected
        assert [one.index for one in names] == list(range(len(expected)))
        assert [one.index for one in arguments] == list(range(len(expected)))
        assert all(one.id is None for one in arguments)
        for call, name, argument in zip(expected, names, arguments, strict=True):
            check_call(call)
            assert call.type == "function"
            assert name.function is not None
            assert argument.function is not None
            assert (name.type, name.function.name) == ("function", call.function.name)
            assert (name.function.arguments, argument.function.name) == ("", None)
            assert argument.function.arguments == call.function.arguments
        text = "".join(one.delta.content or "" for one in mine)
        assert text == (choice.message.content or "")
        assert mine[-1].finish_reason == choice.finish_reason


def test_a_free_answer_is_text_where_nothing_is_called(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "demo", "messages": ASK, "max_tokens": 12, "seed": 1}
    free = client.chat.completions.create(tools=TOOLS, **settings)
    assert free.choices[0].message.tool_calls is None
    assert free.choices[0].message.content
    assert free.choices[0].finish_reason in ("stop", "length")
    # A model that may not call is not told about tools.
    none = client.chat.completions.create(tools=TOOLS, tool_choice="none", **settings)
    untold = client.chat.completions.create(**settings)
    assert none.choices[0].message == untold.choices[0].message
    assert none.usage is not None
    assert free.usage is not None
    assert none.usage.prompt_tokens < free.usage.prompt_tokens


def test_what_a_tool_answered_goes_on(client: openai.OpenAI, tool_server: RunningServer) -> None:
    messages: list[Any] = [
        *ASK,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "no_op", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "a", "content": "17 degrees"},
    ]
    answer = client.chat.completions.create(
        model="demo", messages=messages, tools=TOOLS, max_tokens=5
    )
    tokens = tool_server.post("/tokenize", messages=messages, tools=TOOLS).json()
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == tokens["count"]
    text = tool_server.post("/detokenize", tokens=tokens["tokens"]).json()["prompt"]
    assert "17 degrees" in text
    assert '{"name": "no_op", ' in text


def test_a_strict_tool_is_kept_to_its_schema_where_the_model_may_choose(
    client: openai.OpenAI, tool_server: RunningServer
) -> None:
    strict: Any = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}]
    answer = client.chat.completions.create(
        model="demo", messages=ASK, tools=strict, max_tokens=12, seed=2
    ).choices[0]
    assert answer.message.content  # it is as free as before
    if tool_server.state.text.chat_template == TAGGED:
        return  # nothing makes this model begin as a call does
    (brace,) = tool_server.post("/tokenize", prompt="{", add_special_tokens=False).json()["tokens"]
    answer = client.chat.completions.create(
        model="demo", messages=ASK, tools=strict, max_tokens=200, logit_bias={str(brace): 100}
    ).choices[0]
    (call,) = answer.message.tool_calls or ()
    check_call(call)
    assert answer.finish_reason == "tool_calls"


@pytest.fixture(scope="module")
def compiler() -> StructuredOutputCompiler:
    tokenizer = AutoTokenizer.from_pretrained(
        str(Path(engine_package.__file__).parent / "demo_model")
    )
    return StructuredOutputCompiler(tokenizer, len(tokenizer), [tokenizer.eos_token_id])


def make_plan(template: str, choice: Any = None, *, strict: bool = False, **more: Any) -> ToolPlan:
    functions = [
        FunctionDefinition(name=name, parameters=schema, strict=strict)
        for name, schema in SCHEMAS.items()
    ]
    plan = plan_tools(functions, choice, read_template(template), **more)
    assert plan is not None
    return plan


GOOD = '{"name": "get_weather", "%s": {"city": "Rome", "when": {"day": 7}}}'
BAD = GOOD.replace("Rome", "Paris")
OTHER = '{"name": "no_op", "%s": {}}'


def tagged(call: str) -> str:
    return f"<tool_call>\n{call % 'arguments'}\n</tool_call>"


WHOLE, OPEN, WRONG = "whole", "open", "wrong"
ONE: Any = NamedTool(type="function", function={"name": "get_weather"})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "choice", "more", "text", "fate"),
    [
        (TAGGED, "required", {}, tagged(GOOD), WHOLE),
        (TAGGED, "required", {}, tagged(GOOD) + "\n" + tagged(OTHER), WHOLE),
        (TAGGED, "required", {}, tagged(GOOD)[:-3], OPEN),
        (TAGGED, "required", {}, tagged(BAD), WRONG),
        (TAGGED, "required", {}, "I " + tagged(GOOD), WRONG),
        (TAGGED, "required", {"has_parallel_calls": False}, tagged(GOOD) + "\n<", WRONG),
        (TAGGED, ONE, {}, tagged(GOOD), WHOLE),
        (TAGGED, ONE, {}, tagged(OTHER), WRONG),
        (TAGGED, ONE, {}, tagged(GOOD) + "\n" + tagged(GOOD), WRONG),
        (TAGGED, "auto", {"strict": True}, "free < text", WHOLE),
        (TAGGED, "auto", {"strict": True}, "I see. " + tagged(GOOD), WHOLE),
        (TAGGED, None, {"strict": True}, tagged(GOOD) + "and" + tagged(OTHER) + ".", WHOLE),
        (TAGGED, "auto", {"strict": True}, "I see. " + tagged(BAD), WRONG),
        (TAGGED, "auto", {"strict": True}, tagged(GOOD) + " " + tagged(BAD), WRONG),
        (BARE, "required", {}, GOOD % "parameters", WHOLE),
        (BARE, "required", {}, OTHER % "parameters", WHOLE),
        (BARE, "required", {}, GOOD % "arguments", WRONG),
        (BARE, "required", {}, BAD % "parameters", WRONG),
        (BARE, ONE, {}, OTHER % "parameters", WRONG),
        (BARE, "auto", {"strict": True}, "free {text}", WHOLE),
        (BARE, "auto", {"strict": True}, "", WHOLE),
        (BARE, "auto", {"strict": True}, GOOD % "parameters", WHOLE),
        (BARE, "auto", {"strict": True}, BAD % "parameters", WRONG),
        (BARE, "auto", {"strict": True}, '{"answer": 1}', WRONG),
    ],
)
def test_forms_allow_calls_by_the_schemas_and_nothing_else(
    compiler: StructuredOutputCompiler,
    template: str,
    choice: Any,
    more: dict[str, Any],
    text: str,
    fate: str,
) -> None:
    form = make_plan(template, choice, **more).form
    assert form is not None
    matcher = compiler.matcher(form)
    token_ids = compiler._tokenizer.encode(text, add_special_tokens=False)
    is_right = all(matcher.accept(token_id) for token_id in token_ids)
    assert fate == (WRONG if not is_right else WHOLE if matcher.may_end else OPEN)


def test_free_answers_have_no_form() -> None:
    assert make_plan(TAGGED).form is None
    assert make_plan(BARE, "auto").form is None


SIMPLE: dict[str, Any] = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("tool_choice", {"tool_choice": "auto"}),
        ("tool_choice", {"tools": TOOLS, "tool_choice": "any"}),
        ("tool_choice", {"tools": TOOLS, "tool_choice": {"type": "function", "name": "other"}}),
        ("tool_choice", {"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}),
        ("tools.0.function.name", {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
        ("tools.0.function.name", {"tools": [{"type": "function", "function": {"name": ""}}]}),
        ("tools.0.function.name", {"tools": [{"type": "function", "function": {}}]}),
        ("tools.0.type", {"tools": [{"type": "custom", "custom": {"name": "a"}}]}),
        (
            "tools.0.function.what",
            {"tools": [{"type": "function", "function": {"name": "f", "what": 1}}]},
        ),
        ("tools.1.function.name", {"tools": [SIMPLE, SIMPLE]}),
        (
            "tools",
            {
                "tools": [
                    {"type": "function", "function": {"name": f"f{idx}"}} for idx in range(129)
                ]
            },
        ),
        (
            "tools.0.function.parameters",
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
        ),
        (
            "tools",
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"type": "object", "not": {}}},
                    }
                ],
                "tool_choice": "required",
            },
        ),
        ("response_format", {"tools": TOOLS, "response_format": {"type": "json_object"}}),
        (
            "response_format",
            {"tools": TOOLS, "tool_choice": NAMED, "response_format": {"type": "json_object"}},
        ),
        ("functions", {"functions": [{"name": "f"}]}),
        ("function_call", {"function_call": "auto"}),
    ],
)
def test_tools_that_cannot_be_are_refused(
    tool_server: RunningServer, param: str, body: dict[str, Any]
) -> None:
    response = tool_server.post("/v1/chat/completions", messages=ASK, **body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert "start:" not in error["message"]  # our grammar is none of the client's business


def deep(levels: int) -> dict[str, Any]:
    return {"a": deep(levels - 1)} if levels else {}


@pytest.mark.parametrize("parameters", [deep(70), {"enum": ["\ud800"]}])
def test_schemas_that_are_no_json_are_refused(
    tool_server: RunningServer, parameters: dict[str, Any]
) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    body = json.dumps({"messages": ASK, "tools": [tool]})
    response = tool_server.http.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == "tools.0.function.parameters"


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("tools", {"tools": TOOLS}),
        (
            "messages.1.tool_calls",
            {
                "messages": [
                    *ASK,
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"id": "a", "function": {"name": "no_op", "arguments": "{}"}}
                        ],
                    },
                ]
            },
        ),
        (
            "messages.1.role",
            {"messages": [*ASK, {"role": "tool", "tool_call_id": "a", "content": "x"}]},
        ),
    ],
)
def test_a_template_without_tools_refuses_them(
    plain_server: RunningServer, param: str, body: dict[str, Any]
) -> None:
    response = plain_server.post("/v1/chat/completions", **{"messages": ASK, **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"]) == (param, "unsupported_parameter")
    # Tools that take no part need no template.
    body = {"messages": ASK, "tools": TOOLS, "tool_choice": "none", "max_tokens": 1}
    assert plain_server.post("/v1/chat/completions", **body).status_code == 200


def parse(template: str, text: str, cuts: int = 0, **plan: Any) -> list[Any]:
    """Text and calls of an answer that comes in pieces; text that follows text is joined."""
    functions = [FunctionDefinition(name=name) for name in ("f", "g")]
    tool_plan = plan_tools(functions, None, read_template(template), **plan)
    assert tool_plan is not None
    parser = ToolParser(tool_plan)
    places = sorted(random.Random(cuts).choices(range(len(text) + 1), k=cuts))
    found: list[Any] = []
    for start, end in zip([0, *places], [*places, len(text)], strict=True):
        found += parser.add(text[start:end])
    found += parser.finish()
    joined: list[Any] = []
    for piece in found:
        if isinstance(piece, ParsedCall):
            joined.append((piece.name, json.loads(piece.arguments)))
        elif joined and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


F = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
G = '<tool_call>{"arguments": {}, "name": "g"}</tool_call>'
UNKNOWN = '<tool_call>{"name": "h", "arguments": {}}</tool_call>'
CALL_F, CALL_G = ("f", {"x": 1}), ("g", {})


@pytest.mark.parametrize("cuts", [0, 1, 3, 10, 40, 200])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  \n", ["  \n"]),
        ("just text", ["just text"]),
        (F, [CALL_F]),
        (f"\n{F}\n{G}\n", [CALL_F, CALL_G]),
        (f"Let me see. {F}", ["Let me see. ", CALL_F]),
        (f"{F} and then {G}!", [CALL_F, " and then ", CALL_G, "!"]),
        (UNKNOWN, [UNKNOWN]),
        (f"{UNKNOWN}{F}", [UNKNOWN, CALL_F]),
        (F.removesuffix("</tool_call>"), [CALL_F]),  # it ended with the object
        (F[:-20], [F[:-20]]),
        ("<tool_call>{nonsense}</tool_call>", ["<tool_call>{nonsense}</tool_call>"]),
        ("a <tool_cal", ["a <tool_cal"]),
        ("1 < 2 <tool", ["1 < 2 <tool"]),
        (
            '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
            ['<tool_call>{"name": "f", "arguments": "{}"}</tool_call>'],
        ),
        ('{"name": "f", "arguments": {}}', ['{"name": "f", "arguments": {}}']),
    ],
)
def test_tagged_calls_are_found_however_they_come(
    text: str, expected: list[Any], cuts: int
) -> None:
    assert parse(TAGGED, text, cuts) == expected


@pytest.mark.parametrize("cuts", [0, 1, 3, 10, 40])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("just {text}", ["just {text}"]),
        ('{"name": "f", "parameters": {"x": 1}}', [CALL_F]),
        (' \n{"name": "g", "arguments": {}} ', [CALL_G]),
        ('{"name": "h", "parameters": {}}', ['{"name": "h", "parameters": {}}']),
        ('{"name": "f"}', ['{"name": "f"}']),
        ('{"name": "f", "parameters": {}, "id": 1}', ['{"name": "f", "parameters": {}, "id": 1}']),
        ('{"answer": 4}', ['{"answer": 4}']),
        ('{"name": "f", "param', ['{"name": "f", "param']),
        ('It is {"name": "f", "parameters": {}}', ['It is {"name": "f", "parameters": {}}']),
    ],
)
def test_a_bare_call_is_the_whole_answer(text: str, expected: list[Any], cuts: int) -> None:
    assert parse(BARE, text, cuts) == expected


@pytest.mark.parametrize("cuts", [0, 2, 30])
def test_one_call_is_kept_where_there_may_be_only_one(cuts: int) -> None:
    assert parse(TAGGED, f"{F}\n{G}", cuts, has_parallel_calls=False) == [CALL_F]
