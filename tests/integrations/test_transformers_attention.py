"""``attn_implementation="vmalloc"``: our kernels are called, and what they give is what it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from tests.integrations.hf_models import assert_same_run, generate, model, one, padded
from vmalloc import ConfigError, VmallocError
from vmalloc.engine import LLM, SamplingParams
from vmalloc.integrations.transformers import VirtualCache, register
from vmalloc.integrations.transformers.attention import vmalloc_attention
from vmalloc.kernels.cpu import CpuKernels

register(num_threads=1)


class Calls:
    """Counts what goes to our kernel, by queries a row."""

    def __init__(self) -> None:
        self.num_prefill = self.num_decode = self.num_masked = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counted, kernel = Calls(), CpuKernels.varlen_attention

    def counting(query: Any, k_cache: Any, v_cache: Any, view: Any, **settings: Any) -> Any:
        if view.max_seqlen_q > 1:
            counted.num_prefill += 1
        else:
            counted.num_decode += 1
            counted.num_masked += len(set(view.seqused_k.tolist())) > 1
        return kernel(query, k_cache, v_cache, view, **settings)

    monkeypatch.setattr(CpuKernels, "varlen_attention", staticmethod(counting))
    return counted


@pytest.fixture
def ours() -> Any:
    """``ours("llama")``: a model of its own under our attention."""

    def make(name: str, dtype: torch.dtype | None = None) -> Any:
        made = copy.deepcopy(model(name))
        made.set_attn_implementation("vmalloc")
        return made if dtype is None else made.to(dtype)

    return make


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "name", ["llama", "llama-5x3x40", "qwen3", "gpt2", "opt", "deepseek-v3", "gemma2", "gpt-oss"]
)
def test_padded_batches(name: str, side: str, ours: Any, calls: Calls) -> None:
    theirs = generate(model(name), padded(side))  # gemma2 and gpt-oss: the model's own attention
    with VirtualCache(model(name)) as cache:
        assert_same_run(generate(ours(name), padded(side), past_key_values=cache), theirs)
    if side == "left" and name != "deepseek-v3":  # which unpacks what it cached for each call
        assert calls.num_masked > 0  # each row from its own first token on
    assert calls.num_prefill == 0  # a padded prompt is torch's


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt-oss", "deepseek-v3", "+jamba"])
def test_one_prompt(name: str, ours: Any, calls: Calls) -> None:
    theirs = generate(model(name), one())
    assert_same_run(generate(ours(name), one()), theirs)
    assert calls.num_prefill > 0
    assert calls.num_decode > 0


@pytest.mark.parametrize("make_cache", [VirtualCache, lambda config: DynamicCache(config=config)])
def test_beams_on_any_cache(make_cache: Any, ours: Any, calls: Calls) -> None:
    made = ours("llama")
    theirs = generate(model("llama"), padded(), num_beams=4)
    cache = make_cache(made.config)
    assert_same_run(generate(made, padded(), num_beams=4, past_key_values=cache), theirs)
    assert calls.num_decode > 0


def test_prompt_lookup_goes_through_torch_where_masks_are_needed(ours: Any, calls: Calls) -> None:
    settings = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 30, "output_scores": False}
    theirs = generate(model("llama"), one(), **settings).sequences.tolist()
    with VirtualCache(model("llama")) as cache:
        mine = generate(ours("llama"), one(), past_key_values=cache, **settings)
    assert mine.sequences.tolist() == theirs
    assert calls.num_prefill > 0


def test_bfloat16(ours: Any, calls: Calls) -> None:
    made = ours("llama-5x3x40", torch.bfloat16)
    reference = copy.deepcopy(model("llama-5x3x40")).to(torch.bfloat16)
    with torch.no_grad(), VirtualCache(made) as cache:
        mine = made(padded()["input_ids"], past_key_values=cache).logits.float()
        theirs = reference(padded()["input_ids"]).logits.float()
    assert calls.num_prefill > 0
    assert (mine - theirs).abs().max() < 0.03 * theirs.abs().max()


def test_float16_and_gradients_are_torchs(ours: Any, calls: Calls) -> None:
    made = ours("llama")
    ids = one()["input_ids"]
    made(ids, labels=ids, use_cache=False).loss.backward()
    reference = copy.deepcopy(model("llama"))
    reference(ids, labels=ids, use_cache=False).loss.backward()
    for mine, theirs in zip(made.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    generate(ours("llama", torch.float16), one())
    assert calls.num_prefill == calls.num_decode == 0


def test_a_mask_with_holes_is_torchs(ours: Any, calls: Calls) -> None:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 3:5] = 0
    inputs = {"input_ids": torch.arange(1, 19).view(2, 9), "attention_mask": mask}
    assert_same_run(generate(ours("llama"), inputs), generate(model("llama"), inputs))
    assert calls.num_decode == calls.num_prefill == 0


def test_in_inference_mode(ours: Any, calls: Calls) -> None:
    """Masks have no version there, and may be written to in place all the same."""
    theirs = generate(model("llama"), padded())
    with torch.inference_mode(), VirtualCache(model("llama")) as cache:
        assert_same_run(generate(ours("llama"), padded(), past_key_values=cache), theirs)
        assert calls.num_masked > 0
        torch.manual_seed(0)
        query, key, value = (torch.randn(2, 2, tokens, 16) for tokens in (1, 12, 12))
        mask = torch.ones(2, 1, 1, 12, dtype=torch.bool)
        for first in (3, 5):
            mask[0, ..., :first] = False
            out, _ = vmalloc_attention(torch.nn.Module(), query, key, value, mask)
            expected = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask
            ).transpose(1, 2)
            torch.testing.assert_close(out, expected)


def test_under_another_default_device(ours: Any, calls: Calls) -> None:
    inputs, made = padded(), ours("llama")
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    last = {"input_ids": inputs["input_ids"][:, :1], "position_ids": torch.full((3, 1), 20)}
    logits = []
    for device in ("cpu", "meta"):
        with torch.no_grad(), VirtualCache(made) as cache:
            made(**inputs, past_key_values=cache)
            with torch.device(device):
                out = made(**last, attention_mask=mask, past_key_values=cache)
            logits.append(out.logits)
    assert torch.equal(*logits)
    assert calls.num_masked == 2 * 3


def test_rows_too_far_apart_for_the_kernels(ours: Any, calls: Calls) -> None:
    """They count tokens from the first row on in 32 bits; torch does not."""
    theirs = generate(model("llama"), padded())
    with VirtualCache(model("llama"), max_len=1 << 30, max_batch=4) as cache:
        assert_same_run(generate(ours("llama"), padded(), past_key_values=cache), theirs)
    assert calls.num_masked == 0


def test_what_the_trainer_hands_down(ours: Any) -> None:
    ids = one()["input_ids"]
    losses = [
        made(ids, labels=ids, num_items_in_batch=torch.tensor(11)).loss
        for made in (ours("llama"), model("llama"))
    ]
    torch.testing.assert_close(*losses)


def test_sparse_attention_is_refused_and_not_dropped(ours: Any) -> None:
    with pytest.raises(VmallocError, match="gives attention indices, which 'vmalloc' does not"):
        generate(ours("+deepseek-v3.2"), one())


def test_bad_thread_counts() -> None:
    with pytest.raises(ConfigError, match="0"):
        register(num_threads=0)


def test_an_overlapping_slot_never_reaches_beyond_the_tensor() -> None:
    """The longest row is not the last, in a tensor that ends with the last: torch does it."""
    torch.manual_seed(0)
    query = torch.randn(2, 4, 1, 16)
    key, value = torch.randn(2, 2, 12, 16), torch.randn(2, 2, 12, 16)
    mask = torch.ones(2, 1, 1, 12, dtype=torch.bool)
    mask[1, ..., :5] = False
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    out, _ = vmalloc_attention(module, query, key, value, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    swapped, _ = vmalloc_attention(module, query, key, value, mask.flip(0))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask.flip(0), enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(swapped, expected)


def test_beside_an_engine(ours: Any, calls: Calls) -> None:
    """The engine's attention has another name: both work in one process, in turns."""
    made = ours("llama")
    expected = generate(model("llama"), one(), max_new_tokens=6).sequences[0, 12:].tolist()
    for _ in range(2):
        with LLM(copy.deepcopy(model("llama")), max_num_seqs=2) as llm:
            out = llm.generate(
                [{"prompt_token_ids": one()["input_ids"][0].tolist()}],
                SamplingParams(temperature=0.0, max_tokens=6),
                use_tqdm=False,
            )
            assert list(out[0].outputs[0].token_ids) == expected
            mine = generate(made, one(), max_new_tokens=6).sequences[0, 12:].tolist()
            assert mine == expected
    assert calls.num_decode > 0
