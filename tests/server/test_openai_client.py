"""The real ``openai`` clients, LangChain, and the documents' own examples against a real server."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from tests.server.process import REPOSITORY, ServerProcess

GREEDY: dict[str, Any] = {"model": "demo", "temperature": 0}
CHAT: list[Any] = [
    {"role": "system", "content": "You write Python."},
    {"role": "user", "content": "def add(a, b):"},
]
SCHEMA = {
    "type": "object",
    "properties": {"is_even": {"type": "boolean"}, "digit": {"enum": [1, 2, 3]}},
    "required": ["is_even", "digit"],
    "additionalProperties": False,
}


@pytest.fixture
def client(shared_server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{shared_server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


class TestCompletions:
    def test_text_tokens_and_usage(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(prompt="def ", max_tokens=12, **GREEDY)
        assert answer.object == "text_completion"
        assert answer.model == "demo"
        (choice,) = answer.choices
        assert choice.finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 12
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
        ids = client.completions.create(prompt=[0, 308, 226], max_tokens=12, **GREEDY)
        assert ids.choices[0].text == choice.text

    def test_lists_of_prompts_and_n(self, client: openai.OpenAI) -> None:
        prompts = ["def ", "import ", "class "]
        answer = client.completions.create(
            model="demo", prompt=prompts, n=2, seed=4, max_tokens=6, temperature=0.9
        )
        assert [choice.index for choice in answer.choices] == list(range(6))
        single = client.completions.create(
            model="demo", prompt=prompts[1], n=2, seed=4, max_tokens=6, temperature=0.9
        )
        assert [choice.text for choice in single.choices] == [
            choice.text for choice in answer.choices[2:4]
        ]
        token_lists = client.completions.create(prompt=[[5, 6], [7]], max_tokens=2, **GREEDY)
        assert len(token_lists.choices) == 2

    def test_echo_and_logprobs(self, client: openai.OpenAI) -> None:
        answer = client.completions.create(
            prompt="def add", echo=True, logprobs=3, max_tokens=4, **GREEDY
        )
        (choice,) = answer.choices
        assert choice.text.startswith("def add")
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        assert logprobs.text_offset is not None
        assert logprobs.token_logprobs[0] is None
        assert all(value <= 0 for value in logprobs.token_logprobs[1:])
        assert all(3 <= len(top) <= 4 for top in logprobs.top_logprobs[1:])
        assert len(logprobs.tokens) == len(logprobs.text_offset)
        assert "".join(logprobs.tokens).endswith(choice.text)

    def test_streams(self, client: openai.OpenAI) -> None:
        body: dict[str, Any] = {**GREEDY, "prompt": ["def ", "import "], "max_tokens": 10}
        whole = client.completions.create(**body)
        texts, last = ["", ""], None
        stream = client.completions.create(
            stream=True, stream_options={"include_usage": True}, **body
        )
        for chunk in stream:
            last = chunk
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == [choice.text for choice in whole.choices]
        assert last is not None
        assert last.choices == []
        assert last.usage == whole.usage or (
            last.usage is not None
            and whole.usage is not None
            and last.usage.total_tokens == whole.usage.total_tokens
        )

    def test_stop_bias_and_seed(self, client: openai.OpenAI) -> None:
        whole = client.completions.create(prompt="def ", max_tokens=12, **GREEDY).choices[0].text
        stop = whole[4:6]
        cut = client.completions.create(prompt="def ", max_tokens=12, stop=[stop], **GREEDY)
        assert cut.choices[0].finish_reason == "stop"
        assert cut.choices[0].text == whole[: whole.index(stop)]
        biased = client.completions.create(
            prompt="def ", max_tokens=3, logit_bias={"10": 100}, **GREEDY
        )
        forced = client.completions.create(
            prompt="def ", max_tokens=3, extra_body={"allowed_token_ids": [10]}, **GREEDY
        )
        assert biased.choices[0].text == forced.choices[0].text

    def test_beams_and_best_of(self, client: openai.OpenAI) -> None:
        beams = client.completions.create(
            prompt="def ",
            n=2,
            max_tokens=8,
            extra_body={"use_beam_search": True, "beam_width": 4, "length_penalty": 0.5},
            **GREEDY,
        )
        assert len(beams.choices) == 2
        assert beams.choices[0].text != beams.choices[1].text
        best = client.completions.create(
            model="demo", prompt="def ", n=1, best_of=4, seed=1, max_tokens=8, logprobs=0
        )
        every = client.completions.create(
            model="demo", prompt="def ", n=4, seed=1, max_tokens=8, logprobs=0
        )

        def total(choice: Any) -> float:
            return math.fsum(choice.logprobs.token_logprobs)

        assert total(best.choices[0]) == pytest.approx(max(map(total, every.choices)))


class TestChat:
    def test_an_answer(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            messages=CHAT, max_completion_tokens=10, logprobs=True, top_logprobs=2, **GREEDY
        )
        assert answer.object == "chat.completion"
        (choice,) = answer.choices
        assert choice.message.role == "assistant"
        assert choice.finish_reason in ("length", "stop")
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        for token in choice.logprobs.content:
            assert 2 <= len(token.top_logprobs) <= 3
            assert token.logprob <= 0
            assert bytes(token.bytes or b"").decode(errors="replace") == token.token
        again = client.chat.completions.create(messages=CHAT, max_tokens=10, n=3, **GREEDY)
        assert {one.message.content for one in again.choices} == {choice.message.content}

    def test_a_stream(self, client: openai.OpenAI) -> None:
        body: dict[str, Any] = {**GREEDY, "messages": CHAT, "max_tokens": 10}
        whole = client.chat.completions.create(**body).choices[0].message.content
        stream = client.chat.completions.create(
            stream=True, stream_options={"include_usage": True}, **body
        )
        chunks = list(stream)
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert text == whole
        assert chunks[-1].usage is not None
        reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
        assert [reason for reason in reasons if reason] in (["length"], ["stop"])

    def test_structured_output(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            messages=CHAT,
            max_tokens=300,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True},
            },
            **GREEDY,
        )
        made = json.loads(answer.choices[0].message.content or "")
        assert set(made) == {"is_even", "digit"}

        class Answer(BaseModel):
            is_even: bool

        parsed = client.chat.completions.parse(
            messages=CHAT, max_tokens=300, response_format=Answer, **GREEDY
        )
        assert isinstance(parsed.choices[0].message.parsed, Answer)

    def test_responses(self, client: openai.OpenAI) -> None:
        answer = client.responses.create(
            input="def add(a, b):", max_output_tokens=10, store=False, **GREEDY
        )
        assert answer.status in ("completed", "incomplete")
        assert answer.usage is not None
        text, kinds = "", []
        stream = client.responses.create(
            input="def add(a, b):", max_output_tokens=10, store=False, stream=True, **GREEDY
        )
        for event in stream:
            kinds.append(event.type)
            if event.type == "response.output_text.delta":
                text += event.delta
        assert text == answer.output_text
        assert kinds[0] == "response.created"
        assert kinds[-1] in ("response.completed", "response.incomplete")


class TestModels:
    def test_list_and_retrieve(self, client: openai.OpenAI) -> None:
        assert [model.id for model in client.models.list()] == ["demo"]
        assert client.models.retrieve("demo").id == "demo"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")

    def test_names_of_ones_own(self, start_server: Callable[..., ServerProcess]) -> None:
        server = start_server("--served-model-name", "org/name", "--served-model-name", "short")
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            assert [model.id for model in client.models.list()] == ["org/name", "short"]
            for name in ("org/name", "short"):
                assert client.models.retrieve(name).id == name
                answer = client.completions.create(model=name, prompt="x", max_tokens=1)
                assert answer.model == name
            with pytest.raises(openai.NotFoundError, match="demo"):
                client.completions.create(model="demo", prompt="x")


class TestErrors:
    """By their class, as programs catch them."""

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"prompt": "x", "temperature": 3.0}, "temperature"),
            ({"prompt": "x", "top_p": 0.0}, "top_p"),
            ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
            ({"prompt": "x", "n": 0}, "n"),
            ({"prompt": "x", "logprobs": 1000}, "logprobs"),
            ({"prompt": "x", "suffix": "y"}, "suffix"),
            ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
            ({"prompt": "x", "extra_body": {"no_such_field": 1}}, "no_such_field"),
            ({"prompt": []}, "prompt"),
            ({"prompt": "x " * 3000}, "prompt"),
            ({"prompt": [10**6]}, "prompt"),
        ],
    )
    def test_bad_requests(self, body: dict[str, Any], param: str, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="demo", **body)
        assert caught.value.type == "invalid_request_error"
        assert (caught.value.param or "").split(".")[0] == param
        assert param in caught.value.message

    def test_unknown_models(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="gpt-4o", messages=CHAT)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")

    def test_keys(self, start_server: Callable[..., ServerProcess]) -> None:
        server = start_server("--api-key", "right")
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="right") as client:
            assert client.models.list().data
            with pytest.raises(openai.AuthenticationError):
                client.with_options(api_key="wrong").models.list()
            admin = openai.OpenAI(base_url=f"{server.url}/admin", api_key="right", max_retries=0)
            admin.post("/sleep", cast_to=object)
            with pytest.raises(openai.InternalServerError) as caught:
                client.completions.create(model="demo", prompt="x")
            assert caught.value.code == "engine_sleeping"
            admin.post("/wake", cast_to=object)
            admin.close()

    def test_a_full_queue(self, start_server: Callable[..., ServerProcess]) -> None:
        server = start_server("--max-num-seqs", "1", "--max-num-queued-reqs", "1")

        async def work() -> None:
            client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
            async with client:
                many = [
                    client.completions.create(
                        model="demo",
                        prompt="x",
                        max_tokens=100,
                        extra_body={"ignore_eos": True},
                    )
                    for _ in range(12)
                ]
                results = await asyncio.gather(*many, return_exceptions=True)
            refused = [result for result in results if isinstance(result, BaseException)]
            assert refused
            assert len(refused) < 12
            for error in refused:
                assert isinstance(error, openai.RateLimitError)
                assert error.code == "queue_full"
                assert int(error.response.headers["retry-after"]) >= 1

        asyncio.run(work())

    def test_nobody_there_and_nobody_patient(
        self, client: openai.OpenAI, shared_server: ServerProcess
    ) -> None:
        with (
            openai.OpenAI(base_url="http://127.0.0.1:9/v1", api_key="x", max_retries=0) as nobody,
            pytest.raises(openai.APIConnectionError),
        ):
            nobody.models.list()
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.05).completions.create(
                model="demo", prompt="x", max_tokens=1900, extra_body={"ignore_eos": True}
            )
        shared_server.wait_idle()


def test_async_clients(shared_server: ServerProcess) -> None:
    async def work() -> None:
        client = openai.AsyncOpenAI(base_url=f"{shared_server.url}/v1", api_key="x")
        async with client:
            answers = await asyncio.gather(
                *(
                    client.completions.create(prompt=[idx + 3], max_tokens=5, **GREEDY)
                    for idx in range(10)
                )
            )
            assert all(answer.choices[0].text for answer in answers)
            stream = await client.chat.completions.create(
                messages=CHAT, max_tokens=5, stream=True, **GREEDY
            )
            assert [chunk async for chunk in stream]
            # Whoever breaks off is not computed any further.
            stream = await client.chat.completions.create(
                messages=CHAT,
                max_tokens=1800,
                stream=True,
                extra_body={"ignore_eos": True},
                **GREEDY,
            )
            async for _ in stream:
                break
            await stream.close()

    asyncio.run(work())
    shared_server.wait_idle()


def test_langchain(shared_server: ServerProcess) -> None:
    model = ChatOpenAI(
        base_url=f"{shared_server.url}/v1",
        api_key=SecretStr("none"),
        model="demo",
        temperature=0,
        max_completion_tokens=12,
    )
    answer = model.invoke("def add(a, b):")
    assert answer.content
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] <= 12
    streamed = "".join(str(chunk.content) for chunk in model.stream("def add(a, b):"))
    assert streamed == answer.content
    assert [one.content for one in model.batch(["def add(a, b):"] * 3)] == [answer.content] * 3

    class Answer(BaseModel):
        """What is asked for."""

        is_even: bool

    structured = ChatOpenAI(
        base_url=f"{shared_server.url}/v1",
        api_key=SecretStr("none"),
        model="demo",
        temperature=0,
        max_completion_tokens=300,
    ).with_structured_output(Answer, method="json_schema")
    assert isinstance(structured.invoke("Is two even?"), Answer)


def _curl_examples() -> list[tuple[str, str]]:
    """Commands with curl in the documents, with the lines they go on in."""
    found = []
    for name in ("README.md", "docs/openai-api.md"):
        path = REPOSITORY / name
        if not path.exists():
            continue
        for block in re.findall(r"```(?:console|sh|bash|shell)\n(.*?)```", path.read_text(), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                command = line.removeprefix("$ ").strip()
                if command.startswith("curl "):
                    found.append((name, command))
    return found


def test_there_are_curl_examples() -> None:
    assert "README.md" in {name for name, _ in _curl_examples()}


@pytest.mark.parametrize(("name", "command"), _curl_examples())
def test_curl_examples(name: str, command: str, shared_server: ServerProcess) -> None:
    command = re.sub(r"http://(?:127\.0\.0\.1|localhost):8000", shared_server.url, command)
    assert shared_server.url in command, command
    command = command.replace("$VMALLOC_ADMIN_API_KEY", "admin-key")
    result = subprocess.run(
        ["bash", "-c", command.replace("curl ", "curl --fail-with-body -sS ", 1)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout
