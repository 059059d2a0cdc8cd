"""Beam search against ``generate(num_beams=...)`` of transformers, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from vmalloc.engine import ConfigError, SamplingParams
from vmalloc.engine.beam_search import BeamHypothesis, BeamSearch
from vmalloc.engine.sampler import score_beams
from vmalloc.engine.sequence import Sequence

VOCAB = 23
PROMPT = [5, 9, 2, 14]
MAX_TOKENS = 9


def make_model(kind: str, seed: int) -> Any:
    """Random weights, large enough for distributions that are far from flat."""
    torch.manual_seed(seed)
    common = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": None}
    if kind == "llama":
        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.6,
            max_position_embeddings=64,
            **common,
        )
        return LlamaForCausalLM(config).eval()
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4, **common
    )
    return GPT2LMHeadModel(config).eval()


def generate(model: Any, width: int, ends: list[int], **settings: Any) -> list[Any]:
    """Generated tokens and scores of all beams as Hugging Face finds them, best first."""
    output = model.generate(
        torch.tensor([PROMPT]),
        num_beams=width,
        num_return_sequences=width,
        do_sample=False,
        max_new_tokens=MAX_TOKENS,
        eos_token_id=ends or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **settings,
    )
    found = []
    for row, score in zip(output.sequences.tolist(), output.sequences_scores.tolist(), strict=True):
        token_ids = row[len(PROMPT) :]
        at_end = next((at for at, token_id in enumerate(token_ids) if token_id in ends), None)
        found.append((token_ids if at_end is None else token_ids[: at_end + 1], score))
    return found


def search(model: Any, params: SamplingParams, ends: list[int]) -> list[BeamHypothesis]:
    """The same by plain forward passes over whole sequences."""
    beams = BeamSearch(
        params.width,
        params.n,
        MAX_TOKENS,
        ends,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
    )

    def sequence(token_ids: list[int]) -> Sequence:
        seq = Sequence(0, "", PROMPT, params, max_tokens=MAX_TOKENS, stop_token_ids=frozenset(ends))
        seq.token_ids.extend(token_ids)
        return seq

    running: list[list[int]] = [[]]
    is_done = False
    while not is_done:
        with torch.inference_mode():
            # Hugging Face runs `width` equal rows from the start; so must whoever compares bits.
            rows = running * (params.width if len(running) == 1 else 1)
            logits = model(torch.tensor([[*PROMPT, *row] for row in rows])).logits[:, -1].float()
        scores, error = score_beams([sequence(row) for row in rows], logits)
        assert error is None
        step = beams.advance(scores)
        expected = [
            [*running[parent], token_id]
            for parent, token_id in zip(step.parent_idx, step.token_ids, strict=True)
        ]
        for hypothesis in step.finished:
            assert hypothesis.token_ids[:-1] == running[hypothesis.parent_idx]
        running, is_done = expected, step.is_done
        assert running == beams.running
    return beams.results()


def assert_equal(model: Any, width: int, ends: list[int], **settings: Any) -> list[BeamHypothesis]:
    processors = {"repetition_penalty", "min_new_tokens"}
    expected = generate(model, width, ends, use_cache=False, **settings)
    ours = {name: value for name, value in settings.items() if name not in processors}
    if "repetition_penalty" in settings:
        ours["repetition_penalty"] = settings["repetition_penalty"]
    ours["min_tokens"] = settings.get("min_new_tokens", 0)
    params = SamplingParams(
        use_beam_search=True, n=width, temperature=0.0, max_tokens=MAX_TOKENS, **ours
    )
    found = search(model, params, ends)
    assert [hypothesis.token_ids for hypothesis in found] == [tokens for tokens, _ in expected]
    for hypothesis, (tokens, score) in zip(found, expected, strict=True):
        assert hypothesis.score == pytest.approx(score, rel=1e-6)
        length = len(tokens) ** params.length_penalty
        assert hypothesis.cumulative_logprob / length == pytest.approx(score, rel=1e-6)
        assert hypothesis.finish_reason == ("stop" if tokens[-1] in ends else "length")
    return found


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -0.5, 2.0])
@pytest.mark.parametrize("width", [2, 4, 6])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_finds_what_hugging_face_finds(
    kind: str, width: int, length_penalty: float, early_stopping: Any
) -> None:
    for seed, ends in enumerate(([], [3], [3, 7, 11])):
        assert_equal(
            make_model(kind, seed),
            width,
            ends,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
        )


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.7}, {"min_new_tokens": 5}])
def test_filters_apply_to_log_probabilities_as_there(settings: dict[str, Any]) -> None:
    for seed in range(4):
        assert_equal(make_model("llama", seed), 3, [3, 7], **settings)


def test_ends_and_lengths_both_occur_in_these_searches() -> None:
    reasons = set()
    for seed in range(4):
        found = assert_equal(make_model("llama", seed), 4, [3, 7, 11, 13])
        reasons |= {(hypothesis.finish_reason, len(hypothesis.token_ids)) for hypothesis in found}
    assert {reason for reason, _ in reasons} == {"stop", "length"}
    assert len(reasons) > 4


def test_equal_scores_fall_as_there() -> None:
    model = make_model("llama", 1)
    torch.nn.init.zeros_(model.lm_head.weight)
    for width in (2, 5):
        assert_equal(model, width, [4], early_stopping=True)


def test_fewer_ways_than_beams_give_fewer_results() -> None:
    """Two tokens, then the end: what is masked out is no result."""
    rows = torch.full((4, 6), -torch.inf)
    rows[:, :2] = torch.tensor([0.6, 0.4]).log()
    end = torch.full((4, 6), -torch.inf)
    end[:, 5] = 0.0
    beams = BeamSearch(4, 4, 10, [5])
    assert not beams.advance(rows[:1]).is_done
    for idx in range(4):
        if beams.running[idx][-1] > 1:
            end[idx] = -torch.inf
    step = beams.advance(end)
    assert step.is_done
    assert [one.token_ids for one in beams.results()] == [[0, 5], [1, 5]]
    with pytest.raises(ValueError, match="is over"):
        beams.advance(end)


@pytest.mark.parametrize(
    ("settings", "text"),
    [((2, 3, 5), "num_returned is 3"), ((2, 0, 5), "num_returned is 0"), ((2, 1, 0), "max_tokens")],
)
def test_counts_that_cannot_work_are_refused(settings: tuple[int, int, int], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        BeamSearch(*settings)
