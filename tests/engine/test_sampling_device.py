"""Sampling where the logits are: on a pretended GPU no tensor of the host may meet one of its own.

torch's fake tensors carry a device and no values, so they run without a GPU; what mixes devices
raises.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vmalloc.engine import transfer
from vmalloc.engine.beam_search import BeamSearch
from vmalloc.engine.logits_filters import SequenceFilters, apply_filters
from vmalloc.engine.sampler import _pick
from vmalloc.engine.sampling_params import SamplingParams
from vmalloc.engine.sequence import Sequence

VOCAB_SIZE = 40
SETTINGS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.01, logprobs=2),
    SamplingParams(repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.2),
    SamplingParams(logit_bias={3: 1.0}, allowed_token_ids=[1, 2, 3, 4]),
    SamplingParams(min_tokens=3, stop_token_ids=[7, 9]),
]


def sequences() -> list[Sequence]:
    seqs = [
        Sequence(
            idx,
            str(idx),
            [1, 2, 3],
            params,
            max_tokens=9,
            seed=1,
            stop_token_ids=frozenset(params.stop_token_ids or ()),
        )
        for idx, params in enumerate(SETTINGS)
    ]
    for seq in seqs[2:4]:
        seq.filters = SequenceFilters(seq.params, ((1, 5), (8,)))
    return seqs


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    monkeypatch.setattr(transfer, "pinned", lambda tensor: tensor)
    return FakeTensorMode()


def choose(device: str) -> tuple[torch.Tensor, ...]:
    seqs = sequences()
    logits = torch.randn(len(seqs), VOCAB_SIZE, device=device)
    allowed, failed = apply_filters(seqs, logits)
    assert failed == {}
    return _pick(seqs, logits, allowed, [(1, 2)])


def test_a_choice_stays_on_its_device_until_it_is_made(fake_gpu: FakeTensorMode) -> None:
    with fake_gpu:
        picked = choose("cuda")
    assert {tensor.device.type for tensor in picked} == {"cuda"}
    assert [tuple(tensor.shape) for tensor in picked] == [(5,), (5,), (1,), (1,), (1, 2), (1, 2)]


def test_a_tensor_left_on_the_host_would_be_found(
    fake_gpu: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmalloc.engine.sampler.to_device", lambda values, _: torch.tensor(values))
    with fake_gpu, pytest.raises(Exception, match="device"):
        choose("cuda")


def test_one_copy_brings_ids_and_floats_to_the_host_unchanged() -> None:
    ids = torch.tensor([0, 2**31 + 1, 2**52 + 1])
    values = torch.tensor([[0.1, -torch.inf], [torch.nan, 1e-38]])
    truth = torch.tensor([True, False])
    found_ids, found_values, found_truth = transfer.to_host(ids, values, truth)
    assert found_ids.astype(np.int64).tolist() == ids.tolist()
    assert np.array_equal(found_values.astype(np.float32), values.numpy(), equal_nan=True)
    assert found_truth.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1]])
def test_rows_are_those_of_indexing(rows: list[int]) -> None:
    matrix = torch.randn(3, 4)
    taken = transfer.take_rows(matrix, rows)
    assert torch.equal(taken, matrix[rows])
    assert (taken is matrix) == (rows == [0, 1, 2])


def test_beams_keep_float32_sums_through_the_copy_to_the_host() -> None:
    torch.manual_seed(0)
    beams = BeamSearch(2, 2, 4)
    first = torch.randn(1, VOCAB_SIZE).log_softmax(-1)
    step = beams.advance(first)
    best = first[0].topk(2)
    assert step.token_ids == best.indices.tolist()
    assert beams._running_scores.dtype == torch.float32
    assert torch.equal(beams._running_scores[0], best.values)
