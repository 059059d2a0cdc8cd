"""Random numbers by the published vectors; tokens by distribution and by filter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import MinPLogitsWarper, TypicalLogitsWarper

from vmalloc.engine.logits_filters import apply_filters, make_filters
from vmalloc.engine.logprobs import prompt_logprobs
from vmalloc.engine.sampler import sample
from vmalloc.engine.sampling_params import SamplingParams
from vmalloc.engine.sequence import Sequence
from vmalloc.engine.truncation import keep_min_p, keep_typical


def seqs_for(params: SamplingParams | list[SamplingParams], count: int) -> list[Sequence]:
    each = params if isinstance(params, list) else [params] * count
    return [
        Sequence(idx, str(idx), [1] * (idx + 1), one, max_tokens=9, seed=11)
        for idx, one in enumerate(each)
    ]


def allowed_tokens(logits: torch.Tensor, params: SamplingParams) -> set[int]:
    """The plain definition: sort, cut at k, renormalise, cut where the sum reaches p."""
    probs = (logits.double() / params.temperature).softmax(-1)
    ranked = probs.argsort(descending=True).tolist()
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    total = float(probs[ranked].sum())
    kept, reached = set(), 0.0
    for token_id in ranked:
        kept.add(token_id)
        reached += float(probs[token_id]) / total
        if reached >= params.top_p:
            break
    return kept


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.7},
        {"top_k": 12, "top_p": 0.8, "temperature": 1.3},
        {"top_k": 1},
        {"top_p": 1e-6},
        {"temperature": 1e-30},
    ],
)
def test_sampling_follows_the_filtered_distribution(settings: dict[str, Any]) -> None:
    torch.manual_seed(3)
    logits, count = torch.randn(40) * 2, 4000
    params = SamplingParams(**settings)
    drawn = sample(seqs_for(params, count), logits.expand(count, -1).contiguous()).token_ids
    allowed = sorted(allowed_tokens(logits, params))
    assert set(drawn) <= set(allowed)
    probs = (logits.double() / params.temperature)[allowed].softmax(-1).tolist()
    for token_id, prob in zip(allowed, probs, strict=True):
        error = 5 * math.sqrt(prob * (1 - prob) / count) + 1e-9
        assert abs(drawn.count(token_id) / count - prob) < error


def test_a_row_does_not_depend_on_the_rest_of_the_batch() -> None:
    torch.manual_seed(4)
    logits = torch.randn(6, 50).round(decimals=1)  # with ties
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(top_k=4),
        SamplingParams(top_p=0.5, logprobs=2),
        SamplingParams(top_k=9, top_p=0.9, temperature=2.0),
        SamplingParams(temperature=0.0, logprobs=1),
    ]
    seqs = seqs_for(params, 6)
    together = sample(seqs, logits)
    for row, seq in enumerate(seqs):
        alone = sample([seq], logits[row : row + 1])
        assert alone.token_ids == together.token_ids[row : row + 1]
        assert alone.logprobs == together.logprobs[row : row + 1]


def test_logprobs_are_of_the_raw_logits_and_hold_the_chosen_token() -> None:
    torch.manual_seed(5)
    logits = torch.randn(2, 30)
    params = [SamplingParams(temperature=3.0, logprobs=3), SamplingParams(logprobs=0, top_k=2)]
    sampled = sample(seqs_for(params, 2), logits)
    expected = logits.log_softmax(-1)
    for row, entries in enumerate(sampled.logprobs):
        assert entries is not None
        chosen = sampled.token_ids[row]
        assert next(iter(entries)) == chosen
        best = expected[row].topk(3).indices.tolist() if row == 0 else []
        assert set(entries) == {chosen, *best}
        for token_id, entry in entries.items():
            assert entry.logprob == pytest.approx(float(expected[row, token_id]), abs=1e-6)
            assert entry.rank == int((expected[row] > expected[row, token_id]).sum()) + 1


def test_stop_tokens_are_out_of_reach_before_min_tokens() -> None:
    logits = torch.tensor([[0.0, 9.0, 1.0]])
    params = SamplingParams(temperature=0.0, min_tokens=1, logprobs=0)
    seq = Sequence(0, "0", [0], params, max_tokens=2, stop_token_ids=frozenset([1]))
    sampled = sample([seq], logits)
    assert sampled.token_ids == [2]
    assert logits[0, 1] == 9.0
    seq.token_ids.append(2)
    assert sample([seq], logits).token_ids == [1]


PLAIN = {
    "greedy": SamplingParams(temperature=0.0),
    "drawn": SamplingParams(temperature=0.8),
    "drawn hot": SamplingParams(temperature=2.0),
}


@pytest.mark.parametrize("kinds", [["greedy"], ["drawn"], ["greedy", "drawn", "drawn hot"]])
def test_plain_batches_choose_what_they_choose_beside_others(kinds: list[str]) -> None:
    torch.manual_seed(12)
    logits = torch.randn(6, 50)
    logits[2, 7] = logits[2, 31] = 99.0  # a tie goes to the first
    params = [PLAIN[kind] for kind in kinds * (6 // len(kinds))]
    plain = seqs_for(params, 6)
    others = [
        SamplingParams(temperature=0.0, logprobs=0),
        SamplingParams(top_k=3),
        SamplingParams(min_tokens=1, stop_token_ids=[1]),
    ]
    assert all(seq.is_plain for seq in plain)
    alone = sample(plain, logits)
    assert (alone.errors, alone.logprobs) == ([None] * 6, [None] * 6)
    for other in others:
        asked = seqs_for([*params[:5], other], 6)
        assert not asked[5].is_plain
        assert sample(asked, logits).token_ids[:5] == alone.token_ids[:5]
    if kinds == ["greedy"]:
        assert alone.token_ids[2] == 7
    for value in (math.nan, math.inf):
        broken = logits.clone()
        broken[4, 3] = value
        sampled = sample(plain, broken)
        assert sampled.token_ids == [*alone.token_ids[:4], None, alone.token_ids[5]]
        assert sampled.errors[4] == "the model's logits are not finite"


def one(params: SamplingParams, output: list[int] | None = None, prompt: Any = (1,)) -> Sequence:
    seq = Sequence(0, "0", list(prompt), params, max_tokens=99, seed=11)
    seq.token_ids.extend(output or [])
    return seq


class Letters:
    """A tokenizer whose tokens are the letters from a, and the space."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [26 if letter == " " else ord(letter) - ord("a") for letter in text]


@pytest.mark.parametrize("min_p", [0.05, 0.3, 1.0])
def test_min_p_keeps_what_hugging_face_keeps(min_p: float) -> None:
    torch.manual_seed(8)
    logits = torch.randn(20, 60) * 3
    expected = MinPLogitsWarper(min_p)(None, logits) > -torch.inf
    scores = logits - logits.amax(dim=-1, keepdim=True)
    kept = keep_min_p([SamplingParams(min_p=min_p)] * 20, scores) > -torch.inf
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("mass", [0.1, 0.5, 0.95])
def test_typical_p_keeps_what_hugging_face_keeps(mass: float) -> None:
    torch.manual_seed(9)
    logits = torch.randn(20, 60) * 3
    logits[:, 7] = -torch.inf
    expected = TypicalLogitsWarper(mass)(None, logits) > -torch.inf
    kept = keep_typical([SamplingParams(typical_p=mass)] * 20, logits) > -torch.inf
    assert torch.equal(kept, expected)


def test_draws_stay_within_min_p_and_typical_p() -> None:
    torch.manual_seed(10)
    logits = torch.randn(40) * 2
    for params, warper in (
        (SamplingParams(min_p=0.2), MinPLogitsWarper(0.2)),
        (SamplingParams(typical_p=0.3), TypicalLogitsWarper(0.3)),
    ):
        drawn = sample(seqs_for(params, 2000), logits.expand(2000, -1).contiguous()).token_ids
        kept = (warper(None, logits.unsqueeze(0))[0] > -torch.inf).nonzero()[:, 0].tolist()
        assert set(drawn) == set(kept)


def test_rows_without_a_finite_maximum_say_so() -> None:
    logits = torch.zeros(3, 4)
    logits[0, 1], logits[1, 2] = math.nan, math.inf
    seq = one(SamplingParams(allowed_token_ids=[1], min_tokens=1))
    seq.stop_token_ids = frozenset([1])
    cut = SamplingParams(typical_p=0.5, min_p=0.1, top_k=2, top_p=0.9, logprobs=1)
    sampled = sample([*seqs_for([SamplingParams(), cut], 2), seq], logits)
    assert sampled.token_ids == [None] * 3
    assert sampled.errors[:2] == ["the model's logits are not finite"] * 2
    assert "allowed_token_ids, min_tokens let none through" in str(sampled.errors[2])


def every_kind() -> list[SamplingParams]:
    def double(output_ids: list[int], row: torch.Tensor) -> torch.Tensor:
        return row * 2

    return [
        SamplingParams(temperature=0.0),
        SamplingParams(repetition_penalty=1.4, typical_p=0.8),
        SamplingParams(presence_penalty=1.0, min_p=0.02, top_p=0.9, logprobs=2),
        SamplingParams(frequency_penalty=-0.5, top_k=30, typical_p=0.5),
        SamplingParams(logit_bias={3: 2.0, 50: -9.0}, n=2),
        SamplingParams(allowed_token_ids=list(range(0, 5000, 7)), temperature=1.7),
        SamplingParams(bad_words=["ab", "c"]),
        SamplingParams(logits_processors=[double], temperature=0.0, logprobs=0),
        SamplingParams(n=1, best_of=2, min_tokens=90, max_tokens=99),
    ]


def test_no_setting_lets_batch_mates_reach_a_row() -> None:
    """Bit for bit, in a vocabulary wide enough for threads to share a row's sums."""
    vocab_size = 40_000
    torch.manual_seed(11)
    params = every_kind()
    logits = torch.randn(len(params), vocab_size).round(decimals=2) * 3
    seqs = seqs_for(params, len(params))
    for idx, seq in enumerate(seqs):
        seq.token_ids.extend(torch.randint(50, (20,)).tolist())
        seq.choice_idx = idx % 2
        seq.filters = make_filters(seq.params, vocab_size, Letters())
    together = sample(seqs, logits)
    shifted = sample(seqs[::-1], logits.flip(0))
    assert shifted.token_ids == together.token_ids[::-1]
    assert shifted.logprobs == together.logprobs[::-1]
    for row, seq in enumerate(seqs):
        alone = sample([seq], logits[row : row + 1])
        assert alone.token_ids == together.token_ids[row : row + 1]
        assert alone.logprobs == together.logprobs[row : row + 1]
    both = apply_filters(seqs, logits)[0]
    for row, seq in enumerate(seqs):
        assert torch.equal(apply_filters([seq], logits[row : row + 1])[0][0], both[row])


def test_choices_of_one_seed_differ_and_repeat() -> None:
    logits = torch.zeros(8, 1000)

    def draw() -> list[int | None]:
        seqs = [one(SamplingParams(n=8)) for _ in range(8)]
        for idx, seq in enumerate(seqs):
            seq.choice_idx = idx
        return sample(seqs, logits).token_ids

    assert len(set(draw())) > 5
    assert draw() == draw()


def test_draws_at_other_positions_differ() -> None:
    seqs = [one(SamplingParams()) for _ in range(8)]
    for idx, seq in enumerate(seqs):
        seq.token_ids += [0] * idx
    assert len(set(sample(seqs, torch.zeros(8, 1000)).token_ids)) > 5


def test_prompt_logprobs_score_the_token_behind_each_position() -> None:
    torch.manual_seed(12)
    logits, token_ids = torch.randn(300, 50), torch.randint(50, (300,)).tolist()
    whole = prompt_logprobs(logits, token_ids, 2)
    chunks = [
        *prompt_logprobs(logits[:7], token_ids[:7], 2),
        *prompt_logprobs(logits[7:200], token_ids[7:200], 2),
        *prompt_logprobs(logits[200:], token_ids[200:], 2),
    ]
    assert chunks == whole
    expected = logits.log_softmax(-1)
    for row, entries in enumerate(whole):
        assert next(iter(entries)) == token_ids[row]
        assert set(entries) == {token_ids[row], *expected[row].topk(2).indices.tolist()}
        for token_id, entry in entries.items():
            assert entry.logprob == pytest.approx(float(expected[row, token_id]), abs=1e-6)
            assert entry.rank == int((expected[row] > expected[row, token_id]).sum()) + 1
    assert prompt_logprobs(logits[:0], [], 2) == []
