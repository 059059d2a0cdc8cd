"""Log-probabilities in both formats: bytes, names, offsets."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.server.running import RunningServer
from vmalloc.engine import LLM, Logprob, SamplingParams
from vmalloc.server.logprobs import (
    CompletionLogprobsWriter,
    LogprobFormat,
    chat_logprobs,
    prompt_logprobs,
)
from vmalloc.server.protocol.generation import TokenLogprob
from vmalloc.server.vocabulary import Vocabulary

PROMPT = "def né(path): # 世\n"


@pytest.fixture(scope="module")
def vocabulary(demo_llm: LLM) -> Vocabulary:
    return Vocabulary(demo_llm.get_tokenizer())


def byte_fallback_tokenizer() -> Any:
    """As Llama 2 has it: words start with U+2581, unknown characters are bytes."""
    pieces = [
        "<unk>",
        "<s>",
        "\u2581he",
        "llo",
        "\u2581",
        *(f"<0x{byte:02X}>" for byte in range(256)),
    ]
    pieces += ["h", "e", "l", "o", "\u2581h"]
    merges = [("\u2581", "h"), ("\u2581h", "e")]
    model = models.BPE(
        {piece: idx for idx, piece in enumerate(pieces)},
        merges,
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


def metaspace_tokenizer() -> Any:
    model = models.WordLevel({"<unk>": 0, "\u2581hi": 1, "\u2581you": 2}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_tokens([AddedToken("<pic ture>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_bytes_of_tokens_are_the_bytes_of_the_text(
    vocabulary: Vocabulary, demo_llm: LLM, text: str
) -> None:
    token_ids = demo_llm.get_tokenizer().encode(text, add_special_tokens=False)
    joined = b"".join(vocabulary.token_bytes(token_id) for token_id in token_ids)
    assert joined == text.encode()


@pytest.mark.parametrize("text", ["hello 世 hello", "🙂", "he  llo"])
def test_bytes_with_byte_fallback(text: str) -> None:
    tokenizer = byte_fallback_tokenizer()
    words = Vocabulary(tokenizer)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(words.token_bytes(token_id) for token_id in token_ids)
    assert joined == b" " + text.encode()
    assert words.token_text(tokenizer.convert_tokens_to_ids("<0xE4>")) == "bytes:\\xe4"
    assert words.token_text(tokenizer.convert_tokens_to_ids("<0x41>")) == "A"
    assert words.token_text(tokenizer.convert_tokens_to_ids("\u2581he")) == " he"


def test_bytes_with_metaspace() -> None:
    tokenizer = metaspace_tokenizer()
    words = Vocabulary(tokenizer)
    token_ids = tokenizer.encode("hi you<pic ture>")
    assert [words.token_text(token_id) for token_id in token_ids] == [" hi", " you", "<pic ture>"]


def test_ids_without_a_token_have_a_name(vocabulary: Vocabulary) -> None:
    assert vocabulary.token_text(5000) == "token_id:5000"
    assert vocabulary.token_bytes(5000) == b""
    assert Vocabulary(None).token_text(3) == "token_id:3"
    assert len(Vocabulary(None)) == 0


def entries(token_ids: list[int]) -> list[dict[int, Logprob]]:
    return [{token_id: Logprob(-1.0, 1)} for token_id in token_ids]


@given(
    prompt=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    seed=st.integers(0, 99),
)
def test_offsets_go_on_over_chunks(
    vocabulary: Vocabulary, demo_llm: LLM, prompt: str, text: str, seed: int
) -> None:
    tokenizer = demo_llm.get_tokenizer()
    prompt_ids = tokenizer.encode(prompt)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    form = LogprobFormat(vocabulary, 0)
    writer = CompletionLogprobsWriter(form)
    writer.add_prompt(prompt, prompt_ids, [None, *entries(prompt_ids[1:])])
    offsets = writer.take()["text_offset"]
    rng = random.Random(seed)
    rest = list(token_ids)
    while rest:
        chunk, rest = rest[: (cut := rng.randint(1, 4))], rest[cut:]
        writer.add(chunk, entries(chunk))
        offsets += writer.take()["text_offset"]
    # A token starts where the characters that are whole before it end.
    at_bytes = [0]
    for token_id in [*prompt_ids[1:], *token_ids]:
        at_bytes.append(at_bytes[-1] + len(vocabulary.token_bytes(token_id)))
    whole = (prompt + text).encode()
    expected = [len(whole[:at].decode("utf-8", "ignore")) for at in at_bytes[:-1]]
    assert offsets == [0, *expected]


def test_special_tokens_have_a_place_and_no_length(vocabulary: Vocabulary, demo_llm: LLM) -> None:
    token_ids = demo_llm.get_tokenizer().encode("a<|user|>b", add_special_tokens=False)
    for skips, expected in ((True, [0, 1, 1]), (False, [0, 1, 9])):
        writer = CompletionLogprobsWriter(LogprobFormat(vocabulary, 0, skips_special=skips))
        writer.add(token_ids, entries(token_ids))
        assert writer.take()["text_offset"] == expected
    writer = CompletionLogprobsWriter(LogprobFormat(vocabulary, 0))
    writer.add_prompt("a<|user|>b", token_ids, [None, *entries(token_ids[1:])])
    assert writer.take()["text_offset"] == [0, 1, 9]


def test_tokens_that_look_alike_count_once() -> None:
    """Two tokens with one text: the likelier one's log-probability stands."""
    words = Vocabulary(byte_fallback_tokenizer())
    char, byte = 5 + 256, 5 + ord("h")
    assert words.token_text(char) == words.token_text(byte) == "h"
    writer = CompletionLogprobsWriter(LogprobFormat(words, 2))
    writer.add([byte], [{byte: Logprob(-3.0, 2), char: Logprob(-1.0, 1)}])
    written = writer.take()
    assert written["token_logprobs"] == [-3.0]
    assert written["top_logprobs"] == [{"h": -1.0}]


def test_impossible_tokens_have_openais_number(vocabulary: Vocabulary) -> None:
    writer = CompletionLogprobsWriter(LogprobFormat(vocabulary, 0))
    writer.add([50], [{50: Logprob(float("-inf"), 9)}])
    assert writer.take()["token_logprobs"] == [-9999.0]


def test_chat_format(demo_llm: LLM, vocabulary: Vocabulary) -> None:
    params = SamplingParams(
        seed=1, logprobs=3, allowed_token_ids=[166, 122, 250, 77], max_tokens=20
    )
    completion = demo_llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0]
    assert completion.logprobs is not None
    form = LogprobFormat(vocabulary, 3)
    written = chat_logprobs(form, completion.token_ids, completion.logprobs)
    joined = b"".join(bytes(entry["bytes"]) for entry in written)
    assert joined.decode("utf-8", "replace") == completion.text
    for token_id, place, entry in zip(
        completion.token_ids, completion.logprobs, written, strict=True
    ):
        TokenLogprob.model_validate(entry)
        assert entry["logprob"] == place[token_id].logprob
        tops = [top["logprob"] for top in entry["top_logprobs"]]
        assert tops == sorted((one.logprob for one in place.values()), reverse=True)[:3]
    assert all(
        entry["top_logprobs"] == []
        for entry in chat_logprobs(
            LogprobFormat(vocabulary, 0), completion.token_ids, completion.logprobs
        )
    )


def test_prompt_format(demo_llm: LLM, vocabulary: Vocabulary) -> None:
    params = SamplingParams(max_tokens=1, prompt_logprobs=2)
    output = demo_llm.generate([PROMPT], params, use_tqdm=False)[0]
    assert output.prompt_logprobs is not None
    written = prompt_logprobs(LogprobFormat(vocabulary, 2), output.prompt_logprobs)
    assert written[0] is None
    for token_id, place in zip(output.prompt_token_ids[1:], written[1:], strict=True):
        assert place is not None
        assert str(token_id) in place
        assert {entry.rank for entry in place.values()} >= {1, 2}


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_logprobs_over_http_are_the_engines(
    demo_server: RunningServer, demo_llm: LLM, num_top: int
) -> None:
    body = {"prompt": PROMPT, "seed": 3, "logprobs": num_top}
    written = demo_server.complete(**body)["choices"][0]["logprobs"]
    params = SamplingParams(seed=3, logprobs=num_top)
    completion = demo_llm.generate([PROMPT], params, use_tqdm=False)[0].outputs[0]
    assert completion.logprobs is not None
    words = Vocabulary(demo_llm.get_tokenizer())
    assert written["tokens"] == [words.token_text(token_id) for token_id in completion.token_ids]
    for token_id, place, logprob, top in zip(
        completion.token_ids,
        completion.logprobs,
        written["token_logprobs"],
        written["top_logprobs"],
        strict=True,
    ):
        assert logprob == place[token_id].logprob
        assert top == {words.token_text(one): place[one].logprob for one in place}
    by_id = demo_server.complete(**body, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]
    assert by_id["tokens"] == [f"token_id:{token_id}" for token_id in completion.token_ids]


def test_prompt_logprobs_over_http(demo_server: RunningServer, demo_llm: LLM) -> None:
    choice = demo_server.complete(prompt=PROMPT, prompt_logprobs=1, echo=True, logprobs=3)
    places = choice["choices"][0]["prompt_logprobs"]
    token_ids = demo_llm.get_tokenizer().encode(PROMPT)
    assert places[0] is None
    for token_id, place in zip(token_ids[1:], places[1:], strict=True):
        assert 1 <= len(place) <= 2
        assert place[str(token_id)]["logprob"] == min(one["logprob"] for one in place.values())
