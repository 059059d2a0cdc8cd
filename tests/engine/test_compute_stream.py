"""The stream and clock of an engine, as far as they are the same without a GPU."""

from __future__ import annotations

import copy
from typing import Any

import torch

from vmalloc.engine import LLMEngine, SamplingParams
from vmalloc.engine.compute_stream import ComputeStream, StepTimer, current_stream_handle

CPU = torch.device("cpu")


def test_the_cpu_has_no_streams() -> None:
    stream = ComputeStream(CPU)
    with stream.use(), stream.use():
        assert current_stream_handle(CPU) is None
    stream.synchronize()


def test_each_stretch_is_told_once_and_in_order() -> None:
    timer = StepTimer(CPU)
    assert timer.take_finished() == []
    for num_tokens in (7, 5):
        timer.start()
        timer.stop(num_tokens)
    timer.start()  # a step that is not measured
    finished = timer.take_finished()
    assert [num_tokens for num_tokens, _ in finished] == [7, 5]
    assert all(seconds >= 0.0 for _, seconds in finished)
    assert timer.take_finished() == []


def test_prefills_are_measured_and_times_come_in_order(tiny_model: Any) -> None:
    with LLMEngine(copy.deepcopy(tiny_model("llama"))) as engine:
        guess = engine.scheduler.cost.prefill_seconds
        engine.add_request("0", [1] * 30, SamplingParams(temperature=0.0, max_tokens=3))
        outputs = []
        while engine.has_unfinished_requests():
            outputs.extend(engine.step())
        assert engine.scheduler.cost.prefill_seconds != guess
        times = outputs[-1].metrics
        assert times.first_scheduled_time is not None
        assert times.arrival_time <= times.first_scheduled_time <= times.first_token_time
        assert times.first_token_time <= times.finished_time
