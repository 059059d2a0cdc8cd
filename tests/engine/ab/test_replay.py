"""A workload is served whole, in its own time, and what came when is noted."""

import dataclasses

import pytest

from vmalloc.engine import LLMEngine, SamplingParams
from vmalloc.engine.ab.replay import replay, sampling_params
from vmalloc.engine.ab.workload import Workload, WorkloadRequest, make_workload

from .conftest import CONFIG


@pytest.fixture
def engine(model):
    with LLMEngine(model, None, CONFIG) as engine:
        yield engine


def make(*requests, is_realtime=False):
    return Workload("made by hand", "", requests, is_realtime)


def test_requests_get_the_tokens_that_the_engine_gives_them_alone(engine):
    workload = make_workload("mixed", vocab_size=97, context_tokens=640, num_requests=8, scale=0.2)
    served = replay(engine, workload, has_logprobs=True)
    for asked, got in zip(workload.requests, served.requests, strict=True):
        params = dataclasses.replace(sampling_params(asked), output_kind=FINAL)
        engine.flush_prefix_cache()
        engine.add_request("alone", list(asked.prompt_token_ids), params)
        outputs = [output for _ in range(500) for output in step(engine)]
        assert [one.token_ids for one in got.completions] == [
            completion.token_ids for completion in outputs[-1].outputs
        ]
        assert got.error is None
        for one in got.completions:
            assert len(one.token_ids) == asked.num_output_tokens
            is_beam = asked.method == "beam"
            assert len(one.logprobs) == len(one.times_s) == len(one.token_ids) * (not is_beam)
            assert (one.cumulative_logprob is not None) == is_beam or one.logprobs


FINAL = SamplingParams().output_kind


def step(engine):
    return engine.step() if engine.has_unfinished_requests() else []


def test_tokens_come_after_their_requests_and_in_order(engine):
    workload = make_workload("mixed", vocab_size=97, context_tokens=640, num_requests=8, scale=0.2)
    served = replay(engine, workload)
    assert served.started_s < served.ended_s
    assert served.num_steps > 0
    for asked, got in zip(workload.requests, served.requests, strict=True):
        assert got.arrival_s == served.started_s + asked.arrival_s
        assert got.arrival_s < got.first_token_s <= got.last_token_s <= served.ended_s
        for one in got.completions:
            assert one.times_s == sorted(one.times_s)


def test_arrivals_are_kept_where_they_are_to_be(engine):
    requests = [WorkloadRequest(at_s, (1, 2, 3), 2) for at_s in (0.0, 0.3)]
    observed = []
    served = replay(
        engine, make(*requests, is_realtime=True), observe=lambda: observed.append(None)
    )
    assert served.requests[1].first_token_s - served.started_s >= 0.3
    assert observed  # there was a pause
    served = replay(engine, make(*requests), observe=observed.clear)
    assert observed
    assert served.requests[1].arrival_s == served.started_s


def test_what_cannot_fit_ends_alone_with_its_error(model):
    config = dataclasses.replace(CONFIG, kv_cache_memory_bytes=64 << 10)
    requests = [WorkloadRequest(0.0, (1,) * length, 2) for length in (5, 200, 6)]
    with LLMEngine(model, None, config) as engine:
        served = replay(engine, make(*requests))
    assert [one.error is None for one in served.requests] == [True, False, True]
    assert "does not fit" in served.requests[1].error
    assert served.requests[1].first_token_s is None
