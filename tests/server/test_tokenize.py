"""``/tokenize`` and ``/detokenize`` over a socket, against the tokenizer itself."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.running import RunningServer
from vmalloc.engine import LLM


@pytest.mark.parametrize("text", ["def f(x):\n", "né 世界 🙂", "<|user|>hi<|eos|>", ""])
@pytest.mark.parametrize("adds", [None, True, False])
def test_tokens_are_the_tokenizers(
    demo_server: RunningServer, demo_llm: LLM, text: str, adds: bool | None
) -> None:
    tokenizer = demo_llm.get_tokenizer()
    answer = demo_server.post(
        "/tokenize", prompt=text, add_special_tokens=adds, return_token_strs=True
    ).json()
    expected = tokenizer.encode(text, add_special_tokens=adds is not False)
    assert answer == {
        "count": len(expected),
        "max_model_len": demo_llm.config.max_model_len,
        "tokens": expected,
        "token_strs": tokenizer.convert_ids_to_tokens(expected),
    }
    back = demo_server.post("/detokenize", tokens=expected, model="demo").json()
    assert back == {"prompt": tokenizer.decode(expected)}
    assert back["prompt"].removeprefix("<|bos|>") == text


def test_pieces_come_only_if_asked(demo_server: RunningServer) -> None:
    assert demo_server.post("/tokenize", prompt="a").json()["token_strs"] is None


def test_completions_see_the_same_tokens(demo_server: RunningServer) -> None:
    count = demo_server.post("/tokenize", prompt="def f(x):\n").json()["count"]
    answer = demo_server.complete(prompt="def f(x):\n", max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == count


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "x": 1}, 400, "x"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/tokenize", {"prompt": "\ud800"}, 400, "prompt"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {"tokens": [2048]}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "other"}, 404, "model"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    demo_server: RunningServer, path: str, body: dict[str, Any], status: int, param: str
) -> None:
    response = demo_server.post(path, **body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
