"""Random numbers by the published vectors; tokens by distribution and by filter."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from vmalloc.engine.philox import philox4x32, uniforms
from vmalloc.engine.sampler import sample
from vmalloc.engine.sampling_params import SamplingParams
from vmalloc.engine.sequence import Sequence

# kat_vectors of Random123, "philox 4x32 10".
KNOWN_ANSWERS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> tuple[Any, ...]:
    return tuple(np.array([int(word, 16)], dtype=np.uint64) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter: str, key: str, expected: str) -> None:
    out = philox4x32(words(counter), words(key))  # type: ignore[arg-type]
    assert [f"{int(word[0]):08x}" for word in out] == expected.split()


def test_uniforms_depend_on_their_own_key_alone_and_fill_the_unit_interval() -> None:
    seeds, positions = [2**64 - 1, 5, 5, 5] * 2000, list(range(8000))
    numbers = uniforms(seeds, [0] * 8000, positions)
    assert numbers[4321] == uniforms([seeds[4321]], [0], [4321])[0]
    assert 0.0 <= numbers.min() < 0.01
    assert 0.99 < numbers.max() < 1.0
    assert abs(numbers.mean() - 0.5) < 0.02
    assert uniforms([5], [0], [1])[0] != uniforms([5], [1], [1])[0]


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
