"""Comparing outputs finds what differs, and excuses only what the model itself leaves open."""

import copy

import pytest
import torch

from vmalloc.engine import LLMEngine
from vmalloc.engine.ab.equality import Equality, compare_outputs
from vmalloc.engine.ab.replay import ServedCompletion, ServedRequest, replay
from vmalloc.engine.ab.workload import Workload, WorkloadRequest

from .conftest import CONFIG

WORKLOAD = Workload(
    "made by hand",
    "",
    (
        WorkloadRequest(0.0, (5, 6, 7, 8), 6),
        WorkloadRequest(0.0, (9, 10, 11), 6, "sample", 2, seed=3),
        WorkloadRequest(0.0, (12, 13), 6, "beam", 2),
    ),
)
GREEDY, SAMPLED, BEAM = range(3)


@pytest.fixture(scope="module")
def served(model):
    with LLMEngine(model, None, CONFIG) as engine:
        return replay(engine, WORKLOAD, has_logprobs=True).requests


def compare(model, served, changed):
    equality = Equality(num_sequences=5)
    compare_outputs(equality, model, WORKLOAD, served, changed, "a run")
    return equality


def test_equal_outputs_are_equal(model, served):
    equality = compare(model, served, copy.deepcopy(served))
    assert equality.is_equal
    assert equality.num_compared == 5
    assert equality.num_logprobs == 18
    assert equality.words == (
        "Outputs equal, token for token (5 completions compared; 18 log-probabilities equal to "
        "the bit)"
    )


@pytest.mark.parametrize("request_idx", [GREEDY, SAMPLED])
def test_a_changed_token_is_found_where_it_is(model, served, request_idx):
    changed = copy.deepcopy(served)
    tokens = changed[request_idx].completions[0].token_ids
    tokens[3] = (tokens[3] + 1) % 97
    equality = compare(model, served, changed)
    assert not equality.is_equal
    (difference,) = equality.differences
    assert (difference.request_idx, difference.choice_idx, difference.token_idx) == (
        request_idx, 0, 3,
    )  # fmt: skip
    assert difference.gap > 1e-4
    assert equality.words.startswith("Outputs DIFFER: 1 sequences")
    assert f"request {request_idx}, completion 0 differs at token 3" in str(difference)


def test_a_missing_token_is_no_tie(model, served):
    changed = copy.deepcopy(served)
    changed[GREEDY].completions[0].token_ids.pop()
    assert not compare(model, served, changed).is_equal


def test_beams_with_other_tokens_tie_if_they_are_as_likely(model, served):
    changed = copy.deepcopy(served)
    beam = changed[BEAM].completions[1]
    beam.token_ids[2] = (beam.token_ids[2] + 1) % 97
    equality = compare(model, served, changed)
    assert equality.is_equal
    assert equality.differences[0].token_idx is None
    beam.cumulative_logprob -= 0.01
    assert not compare(model, served, changed).is_equal


def test_logprobs_that_differ_are_found_though_tokens_do_not(model, served):
    changed = copy.deepcopy(served)
    changed[SAMPLED].completions[1].logprobs[4] += 2e-4
    equality = compare(model, served, changed)
    assert equality.max_logprob_difference == pytest.approx(2e-4, rel=1e-3)
    assert not equality.is_equal


def test_a_request_that_one_side_did_not_fit_is_told_apart(model, served):
    changed = copy.deepcopy(served)
    changed[SAMPLED].error = "does not fit"
    equality = compare(model, served, changed)
    assert equality.is_equal
    assert equality.num_unserved == 2
    assert "2 did not fit" in equality.words


def test_where_nothing_was_compared_nothing_is_equal(model, served):
    changed = copy.deepcopy(served)
    for request in changed:
        request.error = "does not fit"
    for reference in (served, changed):
        equality = compare(model, reference, changed)
        assert not equality.is_equal
        assert equality.num_unserved == 5
        assert equality.words.startswith("Outputs NOT COMPARED")


def test_what_is_no_number_is_no_tie(model, served):
    changed = copy.deepcopy(served)
    changed[SAMPLED].completions[1].logprobs[4] = float("nan")
    assert not compare(model, served, changed).is_equal
    changed = copy.deepcopy(served)
    beam = changed[BEAM].completions[1]
    beam.token_ids[2] = (beam.token_ids[2] + 1) % 97
    for value in (None, float("nan")):
        beam.cumulative_logprob = value
        assert not compare(model, served, changed).is_equal


@pytest.mark.parametrize("method", ["greedy", "sample"])
def test_a_model_that_gives_no_numbers_is_not_undecided(model, method):
    model = copy.deepcopy(model)
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.full_like(head.weight, float("nan")))
    assert not compare_one(model, method, 40, 41).is_equal


@pytest.fixture(scope="module")
def undecided(model):
    """A model that finds tokens 40 and 41 equally likely, and likelier than any other."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight * 0.01)
        logits = model.model(torch.tensor([[1, 2, 3]])).last_hidden_state[0, -1]
        head.weight[40] = head.weight[41] = logits / logits.norm()
    return model


def one_token(token_id, num_requests=1):
    return [
        ServedRequest(0.0, False, [ServedCompletion(token_ids=[token_id])])
        for _ in range(num_requests)
    ]


def compare_one(model, method, ours, theirs, num_requests=1, num_sequences=1):
    request = WorkloadRequest(0.0, (1, 2, 3), 1, method, seed=11)
    workload = Workload("one token", "", (request,) * num_requests)
    equality = Equality(num_sequences=num_sequences)
    compare_outputs(
        equality,
        model,
        workload,
        one_token(ours, num_requests),
        one_token(theirs, num_requests),
        "a run",
    )
    return equality


def test_a_real_tie_of_the_model_is_excused_once_in_a_thousand(undecided):
    equality = compare_one(undecided, "greedy", 40, 41)
    assert equality.differences[0].gap < 1e-4
    assert equality.is_equal
    assert equality.words.startswith("Outputs equal but for 1 ties")
    assert not compare_one(undecided, "greedy", 40, 42).is_equal
    assert not compare_one(undecided, "greedy", 40, 41, 2, num_sequences=1999).is_equal
    assert compare_one(undecided, "greedy", 40, 41, 2, num_sequences=2000).is_equal


def test_a_sampled_tie_needs_a_random_number_at_the_border(model, served):
    from vmalloc.kernels.draw_cpu import RandomKeys

    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]])).logits[0, -1]
    cumulative = logits.softmax(-1).double().cumsum(-1)
    number = float(RandomKeys([11], [0], [3]).uniforms()[0])
    drawn = int(torch.searchsorted(cumulative, number))
    below = float(cumulative[drawn - 1])
    rival = drawn - 1
    equality = compare_one(model, "sample", drawn, rival)
    assert equality.differences[0].gap == pytest.approx(number - below, abs=1e-6)
    assert equality.is_equal == (number - below < 1e-4)
