"""What changes logits before a choice: penalties against Hugging Face's, masks, own processors."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from vmalloc.engine import ConfigError
from vmalloc.engine.logits_filters import apply_filters, make_filters
from vmalloc.engine.sampler import sample, score_beams
from vmalloc.engine.sampling_params import SamplingParams
from vmalloc.engine.sequence import Sequence


def one(params: SamplingParams, output: list[int] | None = None, prompt: Any = (1,)) -> Sequence:
    seq = Sequence(0, "0", list(prompt), params, max_tokens=99, seed=11)
    seq.token_ids.extend(output or [])
    return seq


def filtered(seq: Sequence, logits: torch.Tensor) -> torch.Tensor:
    seq.filters = seq.filters or make_filters(seq.params, logits.shape[0], Letters())
    rows, errors = apply_filters([seq], logits.unsqueeze(0))
    assert not errors
    return rows[0]


class Letters:
    """A tokenizer whose tokens are the letters from a, and the space."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [26 if letter == " " else ord(letter) - ord("a") for letter in text]


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_repetition_penalty_is_that_of_hugging_face(penalty: float) -> None:
    torch.manual_seed(6)
    logits = torch.randn(30)
    seq = one(SamplingParams(repetition_penalty=penalty), [4, 4, 9], prompt=[2, 7, 2])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([seq.token_ids]), logits.unsqueeze(0)
    )[0]
    assert torch.equal(filtered(seq, logits), expected)


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    logits = torch.zeros(6)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    seq = one(params, [3, 4, 3], prompt=[2, 3])
    assert filtered(seq, logits).tolist() == [0, 0, 0, -1.0, -0.75, 0]


def test_tokens_that_a_model_never_writes_are_passed_over() -> None:
    seq = one(SamplingParams(repetition_penalty=2.0), [1], prompt=[7, 0])
    assert filtered(seq, torch.ones(4)).tolist() == [0.5, 0.5, 1.0, 1.0]


def test_all_penalties_together_go_in_order() -> None:
    logits = torch.tensor([2.0, -2.0, 2.0, 1.0])
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=0.5)
    seq = one(params, [1, 2, 2], prompt=[0])
    assert filtered(seq, logits).tolist() == [1.0, -4.0 - 1.5, 1.0 - 2.0, 1.0]


def test_the_history_follows_growth_forks_and_cuts() -> None:
    torch.manual_seed(7)
    params = SamplingParams(repetition_penalty=1.2, frequency_penalty=0.3)
    logits = torch.randn(200)
    seq = one(params, prompt=list(range(0, 150, 2)))

    def fresh(token_ids: list[int]) -> torch.Tensor:
        twin = one(params, prompt=seq.prompt_token_ids)
        twin.token_ids = list(token_ids)
        return filtered(twin, logits)

    for token_id in torch.randint(200, (120,)).tolist():
        assert torch.equal(filtered(seq, logits), fresh(seq.token_ids))
        seq.token_ids.append(token_id)
    twin = one(params, prompt=seq.prompt_token_ids)
    twin.token_ids = [*seq.token_ids, 5]
    assert seq.filters is not None
    twin.filters = seq.filters.fork()
    seq.token_ids.append(6)
    for either in (seq, twin):
        assert torch.equal(filtered(either, logits), fresh(either.token_ids))
    del seq.token_ids[-3:]
    assert torch.equal(filtered(seq, logits), fresh(seq.token_ids))


def test_biases_move_logits_and_allowed_tokens_exclude_the_others() -> None:
    logits = torch.arange(5.0)
    assert filtered(one(SamplingParams(logit_bias={1: 3.5, 4: -1})), logits).tolist() == [
        0.0,
        4.5,
        2.0,
        3.0,
        3.0,
    ]
    allowed = filtered(one(SamplingParams(allowed_token_ids=[3, 1, 1])), logits)
    assert allowed.tolist() == [-math.inf, 1.0, -math.inf, 3.0, -math.inf]
    assert logits.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_bad_words_ban_their_last_token_where_they_would_be_whole() -> None:
    params = SamplingParams(bad_words=["cab", " d"])
    logits = torch.zeros(27)

    def banned(output: list[int], prompt: list[int]) -> list[int]:
        seq = one(params, output, prompt)
        row: list[float] = filtered(seq, logits).tolist()
        return [idx for idx, value in enumerate(row) if value == -math.inf]

    assert banned([], [0]) == [3]
    assert banned([2, 0], [0]) == [1, 3]
    assert banned([0], [2]) == [3]  # the prompt is no part of it
    assert banned([2, 0, 0], [0]) == [3]


def test_own_processors_see_tokens_and_may_change_their_row() -> None:
    seen: list[Any] = []

    def with_output(output_ids: list[int], row: torch.Tensor) -> torch.Tensor:
        seen.append(list(output_ids))
        output_ids.clear()
        row[0] = 50.0
        return row

    def with_prompt(
        prompt_ids: list[int], output_ids: list[int], row: torch.Tensor
    ) -> torch.Tensor:
        seen.append((prompt_ids, output_ids))
        return row.double().roll(1)

    params = SamplingParams(temperature=0.0, logits_processors=[with_output, with_prompt])
    logits = torch.randn(1, 6)
    before = logits.clone()
    assert sample([one(params, [3, 4], prompt=[2])], logits).token_ids == [1]
    assert seen == [[3, 4], ([2], [3, 4])]
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("processor", "text"),
    [
        (lambda ids, row: 1 / 0, r"logits_processors\[0\] raised ZeroDivisionError"),
        (lambda ids, row: row[:3], r"shape \(3,\).*\(6,\)"),
        (lambda ids, row: None, "returned a NoneType"),
        (lambda ids, row: row * math.nan, "not numbers"),
        (lambda ids, row: row - math.inf, "logits_processors let none through"),
    ],
)
def test_a_failing_processor_ends_its_own_request_alone(processor: Any, text: str) -> None:
    bad, good = SamplingParams(logits_processors=[processor], logprobs=1), SamplingParams()
    logits = torch.randn(2, 6)
    sampled = sample([one(bad), one(good)], logits)
    alone = sample([one(good)], logits[1:])
    assert sampled.token_ids == [None, *alone.token_ids]
    assert sampled.errors[1] is None
    assert re.search(text, str(sampled.errors[0]))


def test_filters_that_need_a_tokenizer_say_so() -> None:
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        make_filters(SamplingParams(bad_words=["ab"]), 30)
    with pytest.raises(ConfigError, match="logit_bias holds 30; it must be below 30"):
        make_filters(SamplingParams(logit_bias={30: 1.0}), 30)
    with pytest.raises(ConfigError, match="the model has no tokens for it"):
        make_filters(SamplingParams(bad_words=["xyz"]), 10, Letters())
    assert make_filters(SamplingParams(top_k=5, min_p=0.1, seed=4), 30) is None


def test_beams_are_scored_by_filtered_log_probabilities() -> None:
    params = SamplingParams(use_beam_search=True, n=2, temperature=0.0, repetition_penalty=2.0)
    logits = torch.randn(2, 9)
    scores, error = score_beams([one(params, [4]), one(params, [5])], logits)
    assert error is None
    expected = logits.log_softmax(-1)
    for row, token_id in enumerate((4, 5)):
        for seen in (1, token_id):
            expected[row, seen] *= 2.0
    assert torch.equal(scores, expected)
    logits[1, 3] = math.nan
    assert score_beams([one(params, [4]), one(params, [5])], logits)[1] is not None
