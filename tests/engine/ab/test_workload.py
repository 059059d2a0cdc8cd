"""Workloads are the same for the same seed, fit the model, and are what they say they are."""

import re

import pytest

from vmalloc.engine import ConfigError
from vmalloc.engine.ab.workload import KINDS, make_workload

VOCAB = 512


def make(kind, **settings):
    return make_workload(kind, **{"vocab_size": VOCAB, "context_tokens": 2048, **settings})


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_makes_one_workload_and_another_seed_another(kind):
    assert make(kind, seed=3) == make(kind, seed=3)
    assert make(kind, seed=3).requests != make(kind, seed=4).requests


def test_kinds_of_one_seed_have_no_prompt_in_common():
    prompts = [one.prompt_token_ids for kind in KINDS for one in make(kind).requests]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.01])
@pytest.mark.parametrize("context", [16, 100, 1024, 5000, 100_000])
@pytest.mark.parametrize("kind", KINDS)
def test_requests_fit_the_model(kind, context, scale):
    workload = make(kind, context_tokens=context, scale=scale, num_requests=40)
    assert len(workload.requests) == 40
    for one in workload.requests:
        assert len(one.prompt_token_ids) >= 1
        assert one.num_output_tokens >= 1
        assert one.num_tokens <= context
        assert all(0 < token_id < VOCAB for token_id in one.prompt_token_ids)


def test_offline_lengths_are_those_of_chats():
    requests = make("offline", num_requests=20_000).requests
    prompts = [len(one.prompt_token_ids) for one in requests]
    outputs = [one.num_output_tokens for one in requests]
    assert sum(prompts) / len(prompts) == pytest.approx(160, rel=0.03)
    assert sum(outputs) / len(outputs) == pytest.approx(120, rel=0.03)
    assert max(one.num_tokens for one in requests) <= 1024
    assert sorted(prompts)[len(prompts) // 2] < 120  # most are short, few are long
    assert max(prompts) == 768
    assert {one.arrival_s for one in requests} == {0.0}


def test_prefix_requests_share_512_tokens_and_no_more():
    requests = make("prefix").requests
    assert {len(one.prompt_token_ids) for one in requests} == {544}
    assert {one.num_output_tokens for one in requests} == {64}
    assert len({one.prompt_token_ids[:512] for one in requests}) == 1
    assert len({one.prompt_token_ids[512:516] for one in requests}) == len(requests)


@pytest.mark.parametrize(("kind", "method"), [("parallel", "sample"), ("beam", "beam")])
def test_four_completions_of_64_tokens(kind, method):
    workload = make(kind)
    for one in workload.requests:
        assert (one.num_completions, one.num_output_tokens, one.method) == (4, 64, method)
    assert workload.num_output_tokens == 256 * len(workload.requests)
    seeds = {one.seed for one in workload.requests}
    assert len(seeds) == (len(workload.requests) if method == "sample" else 1)


def test_long_prompts_grow_with_the_context_up_to_a_limit():
    for context, limit in ((512, 512), (4096, 4096), (100_000, 8192)):
        for one in make("long", context_tokens=context).requests:
            assert limit / 2 - 1 <= len(one.prompt_token_ids) <= 3 * limit / 4


def test_bursts_come_a_second_apart():
    times = [one.arrival_s for one in make("bursty", num_requests=32).requests]
    assert times == sorted(times)
    assert {int(time_s) for time_s in times} == {0, 1, 2, 3}
    assert max(time_s % 1 for time_s in times) < 0.5
    assert make("bursty").is_realtime


def test_a_small_mixed_workload_has_every_method():
    requests = make("mixed", num_requests=8).requests
    assert {one.method for one in requests} == {"greedy", "sample", "beam"}
    assert {one.num_completions for one in requests} == {1, 4}
    assert len({one.prompt_token_ids[:512] for one in requests}) == 7  # two share a beginning
    assert requests[-1].arrival_s > requests[0].arrival_s == 0.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "chat"}, "workload is 'chat'"),
        ({"kind": "long", "num_requests": 0}, "num_requests is 0"),
        ({"kind": "long", "seed": -1}, "seed is -1"),
        ({"kind": "long", "context_tokens": 15}, "the context is 15 tokens"),
        ({"kind": "long", "vocab_size": 1}, "the vocabulary is 1"),
        ({"kind": "long", "scale": 1.5}, "scale is 1.5"),
    ],
)
def test_a_value_that_cannot_work_is_named(settings, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        make(**settings)
