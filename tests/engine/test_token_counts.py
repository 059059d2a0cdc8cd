"""The engine's token counters agree with what it was given and what it wrote."""

from __future__ import annotations

from typing import Any

from tests.engine.running import PAGE, run_out
from vmalloc.engine import STEP_TOKEN_BOUNDS, SamplingParams


def written(outputs: dict[str, Any]) -> int:
    return sum(len(one.token_ids) for output in outputs.values() for one in output.outputs)


def test_prompts_count_once_and_every_written_token_counts(make_engine: Any, prompts: Any) -> None:
    engine = make_engine()
    for idx, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=1 + idx % 5, n=1 + idx % 3, temperature=1.0, seed=idx)
        engine.add_request(str(idx), prompt, params)
    outputs = run_out(engine)
    stats = engine.token_stats()
    assert stats.prompt_tokens == sum(map(len, prompts))
    assert stats.generation_tokens == written(outputs)
    assert sum(stats.steps_by_tokens) > 0
    # Each token but the last of a sequence goes through the model, and cached prompts do not.
    assert stats.computed_tokens < stats.prompt_tokens + stats.generation_tokens


def test_what_preemption_computes_again_counts_as_computed_only(
    make_engine: Any, prompts: Any
) -> None:
    engine = make_engine(
        "llama-4x2x16",
        preemption_mode="recompute",
        enable_prefix_caching=False,
        max_num_seqs=8,
        kv_cache_memory_bytes=40 * PAGE,
    )
    for idx, prompt in enumerate(prompts[:8]):
        engine.add_request(
            str(idx), prompt, SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
        )
    outputs = run_out(engine)
    scheduler, stats = engine.stats(), engine.token_stats()
    assert scheduler.preempt_recompute > 0
    assert stats.prompt_tokens == sum(map(len, prompts[:8]))
    assert stats.generation_tokens == written(outputs) == 8 * 30
    needed = stats.prompt_tokens + stats.generation_tokens - 8
    assert stats.computed_tokens == needed + scheduler.preempted_tokens


def test_a_prompt_that_is_only_scored_counts(make_engine: Any, prompts: Any) -> None:
    engine = make_engine()
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    engine.add_request("a", prompts[1], params)
    run_out(engine)
    stats = engine.token_stats()
    assert (stats.prompt_tokens, stats.generation_tokens) == (len(prompts[1]), 0)


def test_beams_count_one_token_a_beam_and_step(make_engine: Any, prompts: Any) -> None:
    engine = make_engine()
    params = SamplingParams(n=2, best_of=3, use_beam_search=True, max_tokens=4, temperature=0.0)
    engine.add_request("a", prompts[1], params)
    run_out(engine)
    assert engine.token_stats().generation_tokens == 3 * 4


def test_steps_are_counted_by_their_tokens(make_engine: Any, prompts: Any) -> None:
    engine = make_engine()
    prompt = prompts[1]
    engine.add_request("a", prompt, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
    output = run_out(engine)["a"]
    steps = engine.token_stats().steps_by_tokens
    assert len(steps) == len(STEP_TOKEN_BOUNDS) + 1
    assert steps[0] == 3  # decodes of one token
    assert steps[STEP_TOKEN_BOUNDS.index(64)] == 1  # the prompt of 60
    assert sum(steps) == 4
    times = output.metrics
    assert times.first_token_time < times.last_token_time <= times.finished_time
