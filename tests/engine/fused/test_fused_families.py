"""Every known module graph writes what the model itself writes, whatever the batch is."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.engine.fused.models import CONFIGS, VOCAB_SIZE, make_model
from vmalloc.engine import LLM, SamplingParams

LENGTHS = (1, 2, 60, 17, 33, 8, 41, 25)
PARAMS = SamplingParams(temperature=0.0, max_tokens=12, logprobs=3)
SETTINGS: dict[str, Any] = {
    "max_num_seqs": 6,  # fewer than prompts: decodes and chunks of prompts share batches
    "max_num_batched_tokens": 24,
    "page_size": 4096,
    "block_size": 4,
}


def ragged_prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


def generate(llm: LLM, prompts: list[list[int]]) -> list[Any]:
    requests: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [output.outputs[0] for output in llm.generate(requests, PARAMS, use_tqdm=False)]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_and_logprobs_are_the_models_own(name: str) -> None:
    model, prompts = make_model(name), ragged_prompts()
    with LLM(model, fused="off", **SETTINGS) as llm:
        assert llm.engine.forward_name == "model"
        expected = generate(llm, prompts)
    for kv_backend in ("virtual", "paged"):
        with LLM(model, fused="on", kv_backend=kv_backend, **SETTINGS) as llm:
            assert llm.engine.forward_name.startswith("fused_")
            written = generate(llm, prompts)
        for ours, theirs in zip(written, expected, strict=True):
            assert ours.token_ids == theirs.token_ids
            for mine, other in zip(ours.logprobs, theirs.logprobs, strict=True):
                for token_id in mine.keys() & other.keys():
                    assert mine[token_id].logprob == pytest.approx(
                        other[token_id].logprob, abs=1e-4
                    )


def test_a_context_below_what_the_checks_at_load_take() -> None:
    settings: dict[str, Any] = {"max_model_len": 6, "batch_invariant": True}
    written = []
    for fused in ("off", "on"):
        with LLM(make_model("llama"), fused=fused, **settings) as llm:  # type: ignore[arg-type]
            written.append(generate(llm, [[1, 2, 3], [4]])[0].token_ids)
    assert written[0] == written[1]
    assert len(written[0]) == 3


@pytest.mark.parametrize("name", ["llama-5x3x40", "qwen3", "gemma2", "olmo2"])
@pytest.mark.parametrize("kv_backend", ["virtual", "paged"])
def test_a_request_alone_gives_the_bits_of_a_batch(name: str, kv_backend: Any) -> None:
    prompts = ragged_prompts()
    with LLM(
        make_model(name), fused="on", batch_invariant=True, kv_backend=kv_backend, **SETTINGS
    ) as llm:
        together = generate(llm, prompts)
        alone = [generate(llm, [prompt])[0] for prompt in prompts]
    for batched, single in zip(together, alone, strict=True):
        assert batched.token_ids == single.token_ids
        assert batched.logprobs == single.logprobs  # floats, bit for bit
