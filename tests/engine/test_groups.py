"""Several completions of one prompt: shared KV, gangs, beams, and what preemption does to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.running import PAGE, all_tokens, run_out, step, token_ids
from vmalloc.engine import (
    ConfigError,
    LLMEngine,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

PAD = 96
PROMPT = [5, 17, 3, 88, 41, 2, 60, 9, 33, 71, 12, 8, 54]


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
            pad_token_id=PAD,
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
    assert output.num_cached_tokens == 0
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


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_a_group_that_was_preempted_shares_again(mode: str, make_engine: Any) -> None:
    engine = make_engine(enable_prefix_caching=False, preemption_mode=mode)
    prompt = PROMPT * 4

    def decode(num_steps: int) -> None:
        for _ in range(num_steps):
            step(engine, {})

    engine.add_request("0", prompt, sampled(max_tokens=40, ignore_eos=True))
    decode(6)
    shared = engine.kv_stats().shared_bytes
    assert shared > 0
    (group,) = engine.scheduler.running
    lengths = {seq.num_tokens for seq in group.active}
    assert lengths == {len(prompt) + 6}
    engine.scheduler.preempt(group)
    assert engine.kv_stats().num_live_seqs == 0
    if mode == "recompute":
        # One sequence computes what they have in common, each of the others what is its own.
        decode(2)
        while not group.is_decoding:
            decode(1)
        assert {seq.num_tokens for seq in group.active} == lengths
        assert len(prompt) + 4 * 4 <= engine.stats().preempted_tokens <= len(prompt) + 4 * 5
    decode(1)
    assert {seq.num_tokens for seq in group.active} == {len(prompt) + 7}
    assert engine.kv_stats().shared_bytes >= shared
    engine.abort_request("0")
    engine.backend.check_invariants()


def test_a_sequence_that_ends_at_once_leaves_its_kv_to_its_siblings(make_engine: Any) -> None:
    engine = make_engine()
    engine.add_request("0", PROMPT, sampled(max_tokens=8))
    free = token_ids(run_out(engine)["0"])
    first = free[0][0]
    assert all(tokens[0] != first for tokens in free[1:])
    engine.add_request("0", PROMPT, sampled(max_tokens=8, stop_token_ids=[first]))
    output = run_out(engine)["0"]
    assert token_ids(output)[0] == [first]
    for tokens, whole in zip(token_ids(output)[1:], free[1:], strict=True):
        end = whole.index(first) + 1 if first in whole else len(whole)
        assert tokens == whole[:end]
    assert output.outputs[0].stop_reason == first


def test_the_best_candidates_come_best_first(make_engine: Any) -> None:
    engine = make_engine()
    engine.add_request("all", PROMPT, sampled(n=5, logprobs=0))
    engine.add_request("best", PROMPT, sampled(n=2, best_of=5))
    engine.add_request("told", PROMPT, sampled(n=2, best_of=5, logprobs=2))
    outputs = run_out(engine)
    ranked = sorted(outputs["all"].outputs, key=lambda one: -one.cumulative_logprob)
    for name in ("best", "told"):
        best = outputs[name].outputs
        assert [one.index for one in best] == [0, 1]
        assert [one.token_ids for one in best] == [one.token_ids for one in ranked[:2]]
        assert best[0].cumulative_logprob == pytest.approx(ranked[0].cumulative_logprob)
    assert outputs["best"].outputs[0].logprobs is None
    assert len(outputs["told"].outputs[0].logprobs[0]) >= 2


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_each_kind_of_output_tells_of_each_completion(
    kind: RequestOutputKind, make_engine: Any
) -> None:
    engine = make_engine()
    engine.add_request("0", PROMPT, sampled(max_tokens=12))
    whole = token_ids(run_out(engine)["0"])
    stops = [tokens[5] for tokens in whole[:2]]
    params = sampled(max_tokens=12, stop_token_ids=stops, output_kind=kind, logprobs=0)
    engine.add_request("0", PROMPT, params)
    seen: list[Any] = []
    while engine.has_unfinished_requests():
        seen += engine.step()
    pieces: list[list[list[int]]] = [[], [], [], []]
    ends = [0, 0, 0, 0]
    for output in seen:
        for completion in output.outputs:
            pieces[completion.index].append(completion.token_ids)
            ends[completion.index] += completion.is_finished
            assert len(completion.logprobs) == len(completion.token_ids)
    assert [output.is_finished for output in seen] == [False] * (len(seen) - 1) + [True]
    last = [tokens[-1] for tokens in pieces]
    lengths = {len(tokens) for tokens in last} if kind is not RequestOutputKind.DELTA else {0, 1}
    assert len(lengths) > 1  # they did not end together
    if kind is RequestOutputKind.DELTA:
        joined = [[token_id for tokens in part for token_id in tokens] for part in pieces]
        assert ends == [1, 1, 1, 1]
        assert all(len(tokens) == 1 for part in pieces for tokens in part)
    else:
        joined = last
        assert len(seen) == (1 if kind is RequestOutputKind.FINAL_ONLY else 12)
        assert all(len(output.outputs) == 4 for output in seen)
    for tokens, free in zip(joined, whole, strict=True):
        assert tokens == free[: len(tokens)]


def test_beams_and_candidates_say_nothing_before_their_end(make_engine: Any) -> None:
    engine = make_engine()
    for kind in RequestOutputKind:
        engine.add_request(f"beams {kind.value}", PROMPT, beams(output_kind=kind))
        engine.add_request(f"best {kind.value}", PROMPT, sampled(n=1, best_of=3, output_kind=kind))
    outputs: list[Any] = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert len(outputs) == 6
    assert all(output.is_finished for output in outputs)


@pytest.mark.parametrize(
    "settings",
    [
        {"length_penalty": 2.0},
        {"length_penalty": 0.0, "early_stopping": True},
        {"early_stopping": "never", "length_penalty": 0.5},
    ],
    ids=str,
)
def test_beams_end_as_hugging_faces_do(
    settings: dict[str, Any], make_engine: Any, tiny_model: Any, prompts: list[list[int]]
) -> None:
    engine = make_engine(max_num_batched_tokens=24)
    ends = [7, 19, 40, 66, 81]
    for idx, prompt in enumerate(prompts[:6]):
        params = beams(4, stop_token_ids=ends, logprobs=0, **settings)
        engine.add_request(str(idx), prompt, params)
    outputs = run_out(engine)
    num_stopped = 0
    for idx, prompt in enumerate(prompts[:6]):
        theirs = hf_beams(tiny_model("llama"), prompt, 4, 16, eos_token_id=ends, **settings)
        completions = outputs[str(idx)].outputs
        for completion, expected in zip(completions, theirs, strict=True):
            num_tokens = len(completion.token_ids)
            assert completion.token_ids == expected[:num_tokens]
            assert set(expected[num_tokens:]) <= {PAD}
            assert completion.finish_reason == ("stop" if completion.stop_reason else "length")
            chosen = [
                entry[token_id].logprob
                for entry, token_id in zip(completion.logprobs, completion.token_ids, strict=True)
            ]
            assert completion.cumulative_logprob == pytest.approx(sum(chosen), abs=1e-4)
            num_stopped += completion.finish_reason == "stop"
    assert num_stopped > 0 or settings["length_penalty"] > 1.0  # which likes long ones
    assert engine.kv_stats().aliased_pages > 0


def test_what_filters_remember_follows_the_beams(make_engine: Any, tiny_model: Any) -> None:
    engine = make_engine()
    engine.add_request("0", PROMPT, beams(4, repetition_penalty=1.8))
    written = token_ids(run_out(engine)["0"])
    assert written == hf_beams(tiny_model("llama"), PROMPT, 4, 16, repetition_penalty=1.8)
    assert written != hf_beams(tiny_model("llama"), PROMPT, 4, 16)


@pytest.mark.parametrize("chunk", [16, 17, 200])
def test_prompt_tokens_are_scored_whatever_the_chunks_and_preemptions(
    chunk: int, make_engine: Any, tiny_model: Any, prompts: list[list[int]]
) -> None:
    engine = make_engine(max_num_batched_tokens=chunk)
    prompt = max(prompts, key=len)
    with torch.inference_mode():
        expected = tiny_model("llama")(torch.tensor([prompt])).logits[0].log_softmax(-1)
    engine.add_request("other", PROMPT, sampled(max_tokens=12))
    engine.add_request("0", prompt, sampled(n=2, max_tokens=3, prompt_logprobs=2))
    engine.add_request("only", prompt, SamplingParams(max_tokens=0, prompt_logprobs=0))
    finished: dict[str, Any] = {}
    for _ in range(2):
        step(engine, finished)
    for group in list(engine.scheduler.running):
        engine.scheduler.preempt(group)
    outputs = run_out(engine, finished)
    assert outputs["other"].prompt_logprobs is None
    for name in ("0", "only"):
        scores = outputs[name].prompt_logprobs
        assert len(scores) == len(prompt)
        assert scores[0] is None
        for at in range(1, len(prompt)):
            ours = scores[at][prompt[at]].logprob
            assert ours == pytest.approx(float(expected[at - 1, prompt[at]]), abs=1e-4)
    assert outputs["only"].outputs[0].token_ids == []
    assert outputs["only"].outputs[0].finish_reason == "length"


def test_a_sequence_without_a_next_token_ends_its_whole_request_alone(
    make_engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    forward, num_steps = engine._runner.forward, 0

    def breaks_once(*args: Any) -> torch.Tensor:
        nonlocal num_steps
        num_steps += 1
        logits: torch.Tensor = forward(*args).clone()
        if num_steps == 4:
            logits[1] = torch.nan
        return logits

    monkeypatch.setattr(engine._runner, "forward", breaks_once)
    engine.add_request("bad", PROMPT, sampled(n=3))
    engine.add_request("good", PROMPT, sampled(n=2))
    outputs = run_out(engine)
    assert "not finite" in outputs["bad"].error
    assert [one.finish_reason for one in outputs["bad"].outputs] == ["error"] * 3
    assert len(outputs["bad"].outputs[0].token_ids) in (3, 4)
    assert [one.finish_reason for one in outputs["good"].outputs] == ["length"] * 2


def test_a_group_waits_for_all_its_seats_and_one_wider_than_the_engine_is_refused(
    make_engine: Any,
) -> None:
    engine = make_engine(max_num_seqs=4)
    for name, width in (("n", {"n": 5}), ("best_of", {"n": 1, "best_of": 5})):
        with pytest.raises(ConfigError, match=f"{name} is 5.*max_num_seqs, 4"):
            engine.add_request("wide", PROMPT, SamplingParams(**width))
    engine.add_request("one", PROMPT, sampled(n=1, max_tokens=5))
    engine.add_request("four", PROMPT, sampled(n=4, max_tokens=5))
    engine.add_request("last", PROMPT, sampled(n=1, max_tokens=5))
    engine.step()
    assert [group.request_id for group in engine.scheduler.running] == ["one"]
    outputs = run_out(engine)
    assert list(outputs) == ["one", "four", "last"]
    assert engine.kv_stats().peak_live_seqs == 4


def test_requests_of_equal_prompts_share_unless_salt_or_settings_forbid(make_engine: Any) -> None:
    engine = make_engine(block_size=4)
    prompt = PROMPT * 5
    cached = {}
    for name, settings in {
        "first": {},
        "again": {},
        "salted": {"cache_salt": "s"},
        "same salt": {"cache_salt": "s"},
        "apart": {"use_prefix_cache": False},
        "scored": {"prompt_logprobs": 0},
    }.items():
        engine.add_request(name, prompt, sampled(n=2, **settings))
        cached[name] = run_out(engine)[name].num_cached_tokens
    assert cached["first"] == cached["salted"] == cached["apart"] == cached["scored"] == 0
    assert cached["again"] == cached["same salt"] > 50
    assert engine.prefix_stats().hit_tokens == 2 * cached["again"]


def test_requests_that_arrive_together_compute_a_common_prefix_once(make_engine: Any) -> None:
    engine = make_engine(block_size=4, max_num_batched_tokens=200)
    common = PROMPT * 6
    for idx in range(8):
        engine.add_request(str(idx), [*common, idx, idx + 1], sampled(n=1, max_tokens=3))
    engine.step()
    # The budget would take two more; they would compute the same again.
    assert [group.request_id for group in engine.scheduler.running] == ["0"]
    outputs = run_out(engine)
    for idx in range(1, 8):
        assert outputs[str(idx)].num_cached_tokens > len(common) - 16
    assert engine.stats().num_waiting == 0


def test_a_common_prefix_is_in_memory_once(make_engine: Any) -> None:
    common = PROMPT * 8
    peaks = {}
    for count in (1, 12):
        engine = make_engine(block_size=4, commit_ahead_tokens=0, max_num_batched_tokens=200)
        for idx in range(count):
            engine.add_request(str(idx), [*common, idx], sampled(n=1, max_tokens=8))
        run_out(engine)
        peaks[count] = engine.kv_stats().peak_committed_bytes
    tail = 9 * engine.backend.config.token_bytes
    page = engine.kv_stats().page_bytes
    assert peaks[12] - peaks[1] <= 11 * (tail + 2 * page)
    assert peaks[12] < 4 * peaks[1]


def test_structured_beams_and_samples_keep_their_form(make_engine: Any) -> None:
    from vmalloc.engine import LLM

    kind = make_engine().backend.name
    form = StructuredOutputsParams(regex="[ab]{3}c")
    with LLM("demo", kv_backend=kind) as llm:
        for params in (
            sampled(n=4, structured_outputs=form),
            beams(3, structured_outputs=form),
        ):
            (output,) = llm.generate("def ", params, use_tqdm=False)
            for completion in output.outputs:
                assert len(completion.text) == 4
                assert set(completion.text[:3]) <= set("ab")
