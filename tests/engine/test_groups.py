"""Several completions of one prompt: shared KV, gangs, beams, and what preemption does to them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from vmalloc.engine import EngineConfig, LLMEngine, SamplingParams

PAGE = 4096
PROMPT = [5, 17, 3, 88, 41, 2, 60, 9, 33, 71, 12, 8, 54]
BACKENDS = ["virtual", "paged"]


def run_out(engine: LLMEngine, max_steps: int = 3000) -> dict[str, Any]:
    """Step until nothing is left, the books checked after each step; finished outputs by name."""
    finished: dict[str, Any] = {}
    for _ in range(max_steps):
        if not engine.has_unfinished_requests():
            assert engine.kv_stats().num_live_seqs == 0
            return finished
        for output in engine.step():
            if output.is_finished:
                assert output.request_id not in finished
                finished[output.request_id] = output
        engine.backend.check_invariants()
    raise AssertionError("the engine never came to an end")


def token_ids(output: Any) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


@pytest.fixture(params=BACKENDS)
def make_engine(request: pytest.FixtureRequest, tiny_model: Any) -> Iterator[Callable[..., Any]]:
    engines: list[LLMEngine] = []

    def make(name: str = "llama", **settings: Any) -> LLMEngine:
        defaults: dict[str, Any] = {
            "kv_backend": request.param,
            "page_size": PAGE,
            "batch_invariant": True,
            "max_num_seqs": 16,
        }
        config = EngineConfig(**{**defaults, **settings})
        engines.append(LLMEngine(copy.deepcopy(tiny_model(name)), None, config))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def sampled(n: int = 4, **settings: Any) -> SamplingParams:
    return SamplingParams(**{"n": n, "seed": 3, "max_tokens": 20, **settings})


def beams(width: int = 4, **settings: Any) -> SamplingParams:
    return SamplingParams(
        **{"n": width, "use_beam_search": True, "temperature": 0.0, "max_tokens": 16, **settings}
    )


def hf_beams(model: Any, prompt: list[int], width: int, num_new: int, **settings: Any) -> Any:
    with torch.inference_mode():
        written = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=width,
            num_return_sequences=width,
            do_sample=False,
            max_new_tokens=num_new,
            pad_token_id=0,
            **settings,
        )
    return [row[len(prompt) :].tolist() for row in written]


def test_completions_share_the_prompt_and_are_those_of_requests_alone(make_engine: Any) -> None:
    engine = make_engine()
    engine.add_request("all", PROMPT, sampled())
    output = run_out(engine)["all"]
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(tokens) for tokens in token_ids(output)}) == 4
    assert engine.kv_stats().cow_copies > 0
    engine.add_request("one", PROMPT, sampled(n=1))
    assert token_ids(run_out(engine)["one"]) == token_ids(output)[:1]


@pytest.mark.parametrize("width", [2, 4])
def test_beams_are_those_of_hugging_face(width: int, make_engine: Any, tiny_model: Any) -> None:
    engine = make_engine()
    engine.add_request("beams", PROMPT, beams(width))
    output = run_out(engine)["beams"]
    assert token_ids(output) == hf_beams(tiny_model("llama"), PROMPT, width, 16)


def add_mixed(engine: LLMEngine, prompts: list[list[int]]) -> None:
    """Greedy, sampled, n=3, best_of and beams in turn."""
    kinds = [
        SamplingParams(temperature=0.0, max_tokens=14),
        sampled(n=3, max_tokens=18, logprobs=1),
        beams(3, max_tokens=12),
        sampled(n=2, best_of=3, max_tokens=10),
        sampled(n=1, top_k=9, max_tokens=22),
    ]
    for idx, prompt in enumerate(prompts):
        engine.add_request(str(idx), prompt, kinds[idx % len(kinds)])


def all_tokens(outputs: dict[str, Any]) -> dict[str, list[list[int]]]:
    assert all(output.error is None for output in outputs.values()), outputs
    return {name: token_ids(output) for name, output in outputs.items()}


@pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
@pytest.mark.parametrize("chunk", [16, 40])
def test_preempted_groups_write_what_they_would_have(
    mode: str, chunk: int, make_engine: Any, prompts: list[list[int]]
) -> None:
    free = make_engine()
    add_mixed(free, prompts)
    expected = all_tokens(run_out(free))
    assert free.stats().preempt_swap == free.stats().preempt_recompute == 0
    tight = make_engine(
        kv_cache_memory_bytes=52 * PAGE,
        swap_space_bytes=64 * PAGE,
        preemption_mode=mode,
        max_num_batched_tokens=chunk,
    )
    add_mixed(tight, prompts)
    assert all_tokens(run_out(tight)) == expected
    stats = tight.stats()
    if mode == "recompute":
        assert stats.preempt_recompute > 0
        assert stats.preempted_tokens > 0
    elif mode == "swap":
        assert stats.preempt_swap > 0
        assert stats.swapped_bytes > 0
    assert stats.preempt_swap + stats.preempt_recompute > 0
