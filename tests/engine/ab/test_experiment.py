"""A real comparison of three sides: in turns, over the same requests, with equal outputs."""

import itertools

import pytest

from vmalloc.engine import ConfigError
from vmalloc.engine.ab import experiment
from vmalloc.engine.ab.experiment import ABSettings, Turn, run_experiment
from vmalloc.engine.ab.metrics import METRICS

from .conftest import CONFIG

ARMS = ("virtual", "paged", "max_length")


def test_every_side_served_every_workload_as_often(result):
    assert [one.workload.name for one in result.workloads] == [
        "parallel", "mixed", "two & three.csv",
    ]  # fmt: skip
    for one in result.workloads:
        assert set(one.checked) == set(one.runs) == set(ARMS)
        assert {len(runs) for runs in one.runs.values()} == {2}
        assert one.max_model_len == max(asked.num_tokens for asked in one.workload.requests)


def test_outputs_are_equal_and_were_compared(result):
    equality = result.equality
    assert equality.is_equal, [str(one) for one in equality.differences]
    num_completions = sum(
        asked.num_completions for one in result.workloads for asked in one.workload.requests
    )
    assert equality.num_sequences == num_completions
    # Three sides, three runs each, against the first of them.
    assert equality.num_compared + equality.num_unserved == 8 * num_completions
    assert equality.num_logprobs > 0


def test_every_run_has_every_figure(result):
    for one in result.workloads:
        for run in itertools.chain(*one.runs.values(), one.checked.values()):
            assert {metric.name for metric in METRICS} <= set(run.values)
            assert run.values["output_tokens_per_s"] > 0
            assert run.values["allocator_ms"] > 0
            assert 0 <= run.values["waste"] <= run.values["waste_all"] < 1
            assert run.values["peak_held_bytes"] <= one.cap.num_bytes
            assert run.values["peak_live_bytes"] <= run.values["peak_committed_bytes"]
            assert run.memory[0][0] >= 0
            assert all(len(point) == 5 for point in run.memory)


def test_each_side_has_its_own_cache(result):
    for one in result.workloads:
        kernels = {arm: run.kernel for arm, run in one.checked.items()}
        assert "contiguous" in kernels["virtual"]
        assert "block_table" in kernels["paged"]
        assert kernels["max_length"] == kernels["virtual"]
        # What reserves ahead of need leaves more of it empty.
        waste = {arm: run.values["waste"] for arm, run in one.checked.items()}
        assert waste["max_length"] > waste["virtual"]
        assert one.checked["paged"].values["background_pages"] == 0


def test_memory_limits_batches_but_lets_every_request_run(result):
    parallel = result.workloads[0]
    for arm in ("virtual", "paged"):
        (values,) = {run.values["failed_requests"] for run in parallel.runs[arm]}
        assert values == 0


def test_sides_take_turns_and_the_order_turns_round(model, trace):
    turns = []
    settings = ABSettings(workloads=(), traces=(trace,), repeats=2, config=CONFIG)
    run_experiment(settings, model, before_run=turns.append)
    name = "two & three.csv"
    assert turns == [
        Turn(name, "paged", 0),
        Turn(name, "virtual", 0),
        Turn(name, "virtual", 1),
        Turn(name, "paged", 1),
        Turn(name, "paged", 2),
        Turn(name, "virtual", 2),
    ]
    assert settings.num_runs == len(turns)


def test_a_side_that_goes_wrong_is_found(model, trace, monkeypatch):
    real, count = experiment.run_once, itertools.count()

    def plant(*args, **kwargs):
        run = real(*args, **kwargs)
        if next(count) == 3:
            run.requests[1].completions[0].token_ids[2] ^= 1
        return run

    monkeypatch.setattr(experiment, "run_once", plant)
    settings = ABSettings(workloads=(), traces=(trace,), repeats=2, config=CONFIG)
    equality = run_experiment(settings, model).equality
    assert not equality.is_equal
    assert [str(one).split(";")[0] for one in equality.differences] == [
        "two & three.csv, paged, run 1: request 1, completion 0 differs at token 2"
    ]


def test_what_one_side_cannot_hold_is_compared_between_the_others(model, trace, monkeypatch):
    """The first run to be made is that of a side that fails everything."""
    real, count = experiment.run_once, itertools.count()

    def plant(*args, **kwargs):
        run, number = real(*args, **kwargs), next(count)
        for one in run.requests:
            if number == 0:
                one.error = "does not fit"
            if number == 2:
                one.completions[0].token_ids[0] ^= 1
        return run

    monkeypatch.setattr(experiment, "run_once", plant)
    settings = ABSettings(
        backends=("virtual", "paged", "max_length"),
        workloads=(),
        traces=(trace,),
        repeats=1,
        config=CONFIG,
    )
    equality = run_experiment(settings, model).equality
    assert equality.num_unserved == 3
    assert equality.num_compared == 4 * 3
    assert {one.run for one in equality.differences} == {"virtual, untimed run"}
    assert not equality.is_equal


def test_the_model_is_given_back(model, result):
    import torch

    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backends": ("virtual", "vrtual")}, "backends has 'vrtual'"),
        ({"workloads": ("chat",)}, "workload is 'chat'"),
        ({"workloads": ("beam", "beam")}, "workload is beam, beam; each can be named once"),
        ({"workloads": ()}, "workload is empty"),
        ({"repeats": 0}, "repeats is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_a_setting_that_cannot_work_is_named(settings, words):
    with pytest.raises(ConfigError, match=words):
        ABSettings(**settings)
