"""``/v1/completions`` over a socket, compared with ``LLM.generate`` on the same model and seed."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import openai
import pytest

from tests.server.running import DEADLINE_SECONDS, RunningServer
from vmalloc.engine import LLM, RequestOutput, SamplingParams
from vmalloc.server.protocol.completions import CompletionResponse

PROMPT = "def read(path):\n"
LONG = {"max_tokens": 1900, "ignore_eos": True}
BROKEN = {"allowed_token_ids": [166, 122, 250, 249, 240, 77], "temperature": 1.0, "seed": 3}
"""Text of bytes that are characters now and then, and of the letter h."""


def offline(llm: LLM, prompt: Any, **params: Any) -> RequestOutput:
    return llm.generate([prompt], SamplingParams(**params), use_tqdm=False)[0]


def texts(output: RequestOutput) -> list[str]:
    return [completion.text for completion in output.outputs]


def join(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The chunks of a stream, put together by choice."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        CompletionResponse.model_validate(event)
        for chunk in event["choices"]:
            choice = choices.setdefault(
                chunk["index"], {"text": "", "finish_reason": None, "logprobs": None}
            )
            assert choice["finish_reason"] is None, "a choice goes on after its end"
            choice["text"] += chunk["text"]
            choice["finish_reason"] = chunk["finish_reason"]
            choice["stop_reason"] = chunk["stop_reason"]
            if chunk["logprobs"] is not None:
                choice["logprobs"] = choice["logprobs"] or {}
                for name, values in chunk["logprobs"].items():
                    choice["logprobs"].setdefault(name, []).extend(values)
    return choices


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"seed": 7},
        {"seed": 7, "n": 3, "top_p": 0.8, "top_k": 20},
        {"seed": -1, "min_p": 0.05, "presence_penalty": 1.0, "frequency_penalty": -0.5},
        {"seed": 7, "best_of": 4, "n": 2},
        {"use_beam_search": True, "best_of": 4, "n": 3, "length_penalty": 0.5},
        {"temperature": 0, "stop": [" ", "("], "include_stop_str_in_output": True},
        {"temperature": 0, "stop_token_ids": [222], "min_tokens": 3, "max_tokens": 40},
        {"seed": 7, "bad_words": ["self"], "repetition_penalty": 1.3, "typical_p": 0.9},
        BROKEN,
    ],
    ids=str,
)
def test_answers_are_those_of_the_engine(
    demo_server: RunningServer,
    demo_llm: LLM,
    params: dict[str, Any],
) -> None:
    answer = demo_server.complete(prompt=PROMPT, **params)
    if "seed" in params:
        params = {**params, "seed": params["seed"] % 2**64}
    expected = offline(demo_llm, PROMPT, **{"max_tokens": 16, **params})
    choices = answer["choices"]
    assert [choice["text"] for choice in choices] == texts(expected)
    assert [choice["index"] for choice in choices] == list(range(params.get("n", 1)))
    assert [choice["finish_reason"] for choice in choices] == [
        completion.finish_reason for completion in expected.outputs
    ]
    assert answer["usage"]["completion_tokens"] == sum(
        len(completion.token_ids) for completion in expected.outputs
    )


def test_vllms_names_of_beam_search(demo_server: RunningServer) -> None:
    search = {"prompt": PROMPT, "use_beam_search": True, "n": 2, "max_tokens": 8}
    by_width = demo_server.complete(beam_width=3, **search)
    by_best_of = demo_server.complete(best_of=3, **search)
    assert by_width["choices"] == by_best_of["choices"]
    assert len(by_width["choices"]) == 2


def test_prompts_come_in_four_shapes(demo_server: RunningServer, demo_llm: LLM) -> None:
    tokenizer = demo_llm.get_tokenizer()
    prompts = [PROMPT, "import os", "class Thing"]
    token_ids = [tokenizer.encode(prompt) for prompt in prompts]
    expected = [texts(offline(demo_llm, prompt, temperature=0))[0] for prompt in prompts]

    def answers(prompt: Any) -> list[str]:
        choices = demo_server.complete(prompt=prompt, temperature=0)["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        return [choice["text"] for choice in choices]

    assert answers(prompts[0]) == expected[:1]
    assert answers(prompts) == expected
    assert answers(token_ids[0]) == expected[:1]
    assert answers(token_ids) == expected


def test_choices_are_numbered_by_prompt(demo_server: RunningServer, demo_llm: LLM) -> None:
    prompts = [PROMPT, "import os"]
    answer = demo_server.complete(prompt=prompts, n=2, seed=5)
    expected = [offline(demo_llm, prompt, n=2, seed=5) for prompt in prompts]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    got = [choice["text"] for choice in answer["choices"]]
    assert got == [text for output in expected for text in texts(output)]
    usage = answer["usage"]
    assert usage["prompt_tokens"] == sum(len(output.prompt_token_ids) for output in expected)
    assert usage["completion_tokens"] == 4 * 16
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_cached_tokens_are_told_and_can_be_refused(demo_server: RunningServer) -> None:
    prompt = "def cached(path):\n" * 40

    def num_cached(**fields: Any) -> int:
        usage = demo_server.complete(prompt=prompt, max_tokens=1, **fields)["usage"]
        num: int = usage["prompt_tokens_details"]["cached_tokens"]
        return num

    assert num_cached() < 4  # other tests' prompts begin alike
    assert num_cached() > 100
    assert num_cached(use_prefix_cache=False) == 0
    assert num_cached(cache_salt="mine") == 0
    assert num_cached(cache_salt="mine") > 100


def test_the_answer_has_openais_fields(demo_server: RunningServer) -> None:
    before = int(time.time())
    response = demo_server.http.post(
        "/v1/completions",
        json={"prompt": PROMPT, "max_tokens": 1},
        headers={"X-Request-Id": "a-name"},
    )
    answer = response.json()
    assert response.headers["x-request-id"] == "a-name"
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert before <= answer["created"] <= time.time()
    assert answer["model"] == "demo"
    assert answer["system_fingerprint"].startswith("vmalloc-")
    assert set(answer["choices"][0]) == {
        "index",
        "text",
        "logprobs",
        "finish_reason",
        "stop_reason",
    }
    CompletionResponse.model_validate(answer)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_echo_starts_with_the_prompt(
    demo_server: RunningServer,
    demo_llm: LLM,
    max_tokens: int,
    logprobs: int | None,
    stream: bool,
) -> None:
    tokenizer = demo_llm.get_tokenizer()
    prompts = ["def né(x): # 世界", "import os"]
    body: dict[str, Any] = {
        "prompt": prompts,
        "echo": True,
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "temperature": 0,
    }
    if stream:
        choices = list(join(demo_server.stream(**body)).values())
    else:
        choices = demo_server.complete(**body)["choices"]
    assert len(choices) == 2
    for prompt, choice in zip(prompts, choices, strict=True):
        token_ids = tokenizer.encode(prompt)
        expected = offline(
            demo_llm,
            prompt,
            temperature=0,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=3,
        )
        completion = expected.outputs[0]
        assert choice["text"] == prompt + completion.text
        assert choice["finish_reason"] == "length"
        if logprobs is None:
            assert choice["logprobs"] is None
            continue
        assert expected.prompt_logprobs is not None
        scores = [None] + [
            place[token_id].logprob
            for token_id, place in zip(token_ids[1:], expected.prompt_logprobs[1:], strict=True)
            if place is not None
        ]
        scores += [
            place[token_id].logprob
            for token_id, place in zip(completion.token_ids, completion.logprobs or [], strict=True)
        ]
        assert choice["logprobs"]["token_logprobs"] == scores
        assert choice["logprobs"]["top_logprobs"][0] is None
        assert all(
            max(1, logprobs) <= len(top) <= logprobs + 1
            for top in choice["logprobs"]["top_logprobs"][1:]
        )


def test_echo_of_token_ids_is_their_text(demo_server: RunningServer, demo_llm: LLM) -> None:
    token_ids = demo_llm.get_tokenizer().encode("import os")
    answer = demo_server.complete(prompt=token_ids, echo=True, max_tokens=0)
    assert answer["choices"][0]["text"] == "import os"
    answer = demo_server.complete(
        prompt=token_ids, echo=True, max_tokens=0, skip_special_tokens=False
    )
    assert answer["choices"][0]["text"] == "<|bos|>import os"


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 0, "logprobs": 2},
        {"seed": 7, "n": 3},
        {"prompt": [PROMPT, "import os"], "seed": 7, "n": 2, "logprobs": 1},
        {"temperature": 0, "stop": [' """', "("]},
        {"temperature": 0, "echo": True, "logprobs": 1},
        {**BROKEN, "logprobs": 3, "max_tokens": 60},
        {**BROKEN, "max_tokens": 60, "stop": "hh"},
        {"n": 2, "best_of": 2, "seed": 1},
    ],
    ids=str,
)
def test_chunks_make_up_the_plain_answer(
    demo_server: RunningServer,
    params: dict[str, Any],
) -> None:
    body = {"prompt": PROMPT, **params}
    plain = demo_server.complete(**body)
    events = demo_server.stream(stream_options={"include_usage": True}, **body)
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    cached = {"prompt_tokens_details"}
    assert {**events[-1]["usage"], "prompt_tokens_details": cached} == {
        **plain["usage"],
        "prompt_tokens_details": cached,
    }
    assert len({event["id"] for event in events}) == 1
    choices = join(events)
    assert sorted(choices) == [choice["index"] for choice in plain["choices"]]
    for choice in plain["choices"]:
        assert choices[choice["index"]] == {
            name: value for name, value in choice.items() if name != "index"
        }


def test_a_stream_tells_its_usage_only_if_asked(demo_server: RunningServer) -> None:
    events = demo_server.stream(prompt=PROMPT, max_tokens=4)
    assert all("usage" not in event and event["choices"] for event in events)
    events = demo_server.stream(
        prompt=PROMPT, max_tokens=4, n=2, stream_options={"continuous_usage_stats": True}
    )
    counts: dict[int, list[int]] = {0: [], 1: []}
    for event in events:
        counts[event["choices"][0]["index"]].append(event["usage"]["completion_tokens"])
        usage = event["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert counts == {0: [1, 2, 3, 4], 1: [1, 2, 3, 4]}


def test_token_ids_can_be_had(demo_server: RunningServer, demo_llm: LLM) -> None:
    expected = offline(demo_llm, PROMPT, temperature=0)
    choice = demo_server.complete(prompt=PROMPT, temperature=0, return_token_ids=True)["choices"][0]
    assert choice["prompt_token_ids"] == expected.prompt_token_ids
    assert choice["token_ids"] == expected.outputs[0].token_ids
    events = demo_server.stream(prompt=PROMPT, temperature=0, return_token_ids=True)
    chunks = [event["choices"][0] for event in events]
    assert chunks[0]["prompt_token_ids"] == expected.prompt_token_ids
    assert [token_id for chunk in chunks for token_id in chunk["token_ids"]] == (
        expected.outputs[0].token_ids
    )


def test_structured_output_by_each_name(demo_server: RunningServer) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}}
    for fields in (
        {"response_format": form},
        {"structured_outputs": {"json": schema}},
        {"guided_json": json.dumps(schema)},
    ):
        answer = demo_server.complete(prompt=PROMPT, seed=1, max_tokens=100, **fields)
        assert json.loads(answer["choices"][0]["text"])["a"] in (1, 2)
    for fields in (
        {"structured_outputs": {"choice": ["yes", "no"]}},
        {"guided_choice": ["yes", "no"]},
        {"guided_regex": "yes|no"},
        {"guided_grammar": 'start: "yes" | "no"'},
    ):
        choice = demo_server.complete(prompt=PROMPT, seed=1, **fields)["choices"][0]
        assert (choice["text"] in ("yes", "no"), choice["finish_reason"]) == (True, "stop")
    plain = demo_server.complete(prompt=PROMPT, seed=1, response_format={"type": "text"})
    assert plain["choices"] == demo_server.complete(prompt=PROMPT, seed=1)["choices"]


def test_openais_client(demo_server: RunningServer, demo_llm: LLM) -> None:
    client = openai.OpenAI(base_url=f"{demo_server.url}/v1", api_key="none", max_retries=0)
    expected = offline(demo_llm, PROMPT, temperature=0, logprobs=2)
    answer = client.completions.create(model="demo", prompt=PROMPT, temperature=0, logprobs=2)
    assert answer.choices[0].text == expected.outputs[0].text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == expected.outputs[0].text
    chunks = list(
        client.completions.create(
            model="demo",
            prompt=PROMPT,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected.outputs[0].text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 16
    beams = client.completions.create(
        model="demo", prompt=PROMPT, n=2, extra_body={"use_beam_search": True, "beam_width": 4}
    )
    assert len(beams.choices) == 2
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt=PROMPT)
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="demo", prompt=PROMPT, temperature=9)
    assert (wrong.value.param, wrong.value.code) == ("temperature", "invalid_value")
    client.close()


def test_errors_before_a_stream_have_a_status(demo_server: RunningServer) -> None:
    for body, param in (
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": PROMPT, "logit_bias": {"99999": 1}}, "logit_bias"),
        ({"prompt": PROMPT, "guided_regex": "("}, "guided_regex"),
    ):
        response = demo_server.post("/v1/completions", stream=True, **body)
        assert response.status_code == 400
        assert response.headers["content-type"] == "application/json"
        assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("given", [None, "not a name"])
def test_the_request_id_that_a_response_bears_names_it(
    given: str | None, demo_server: RunningServer
) -> None:
    """Also where the server made it, as the client sent none, or one that cannot be a name."""
    body = {"prompt": PROMPT, "stream": True, **LONG}
    headers = {} if given is None else {"x-request-id": given}
    with demo_server.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        name = response.headers["x-request-id"]
        assert name != given
        if given is not None:
            assert demo_server.post("/abort", request_id=given).status_code == 404
        assert demo_server.post("/abort", request_id=name).json() == {"num_aborted": 1}
        assert "request_aborted" in response.read().decode()


def test_an_error_in_a_stream_is_an_event(demo_server: RunningServer) -> None:
    body = {"prompt": PROMPT, "stream": True, **LONG}
    with demo_server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        name = json.loads(next(lines))["id"]
        assert demo_server.post("/abort", request_id=name).json() == {"num_aborted": 1}
        *_, error, done = lines
    assert json.loads(error)["error"]["code"] == "request_aborted"
    assert done == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request(demo_server: RunningServer, stream: bool) -> None:
    demo_server.wait_idle()
    before = demo_server.state.engine.snapshot
    assert before is not None
    body = json.dumps({"prompt": [PROMPT] * 3, "n": 2, "stream": stream, **LONG}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    host, port = demo_server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), DEADLINE_SECONDS) as client:
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        if stream:
            assert client.recv(100).startswith(b"HTTP/1.1 200")
        while not demo_server.on_engine(lambda engine: engine.scheduler.running):
            time.sleep(0.005)
    demo_server.wait_idle()
    after = demo_server.state.engine.snapshot
    assert after is not None
    assert after.num_steps - before.num_steps < LONG["max_tokens"] - 100
    assert demo_server.on_engine(lambda engine: engine.kv_stats().num_live_seqs) == 0
    assert demo_server.state.engine.num_live == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_form_without_a_text_is_the_requests_fault(
    demo_server: RunningServer, stream: bool
) -> None:
    response = demo_server.post(
        "/v1/completions", prompt=PROMPT, guided_json={"$ref": "#"}, stream=stream
    )
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "cannot_generate"


def test_tokens_are_sent_at_once(demo_server: RunningServer) -> None:
    """Not collected until the client acknowledged those before: Nagle's algorithm is off."""
    demo_server.complete(prompt=PROMPT, max_tokens=1)
    connections = demo_server.connections()
    assert connections
    for connection in connections:
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
