"""``generate()`` over a VirtualCache writes what it writes over transformers' own cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from tests.integrations.hf_models import (
    ENGINE_MODELS,
    WINDOWS_ASSIST,
    assert_same_run,
    generate,
    model,
    num_page_mappings,
    one,
    padded,
)
from vmalloc.integrations.transformers import VirtualCache
from vmalloc.integrations.transformers.layer import VirtualLayer

PAGE = 4096
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "beam 4": {"num_beams": 4},
}
# What the engine's list has not: recurrent states, chunked windows, shared or unequal layers,
# attention that does not go through transformers' interface.
OTHER_MODELS = (
    "+gemma3", "+gemma3n", "+gemma4", "+cohere2", "+llama4", "+jamba", "+lfm2", "+qwen3-next",
    "+nemotron-h", "+kimi-linear", "+falcon-h1", "+mamba", "+mimo-v2-flash",
    "+deepseek-v3.2", "+diffllama", "+jetmoe", "+bloom", "+falcon", "+gptj", "+gpt-neo", "+xglm",
)  # fmt: skip


def run_both(name: str, inputs: Any, **settings: Any) -> tuple[Any, Any, VirtualCache]:
    made = model(name)
    theirs = generate(made, inputs, **settings)
    cache = VirtualCache(made, page_bytes=PAGE)
    ours = generate(made, inputs, past_key_values=cache, **settings)
    cache.check_invariants()
    return ours, theirs, cache


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ENGINE_MODELS)
def test_padded_batches_are_token_exact(name: str, mode: str) -> None:
    ours, theirs, cache = run_both(name, padded("left"), **MODES[mode])
    assert_same_run(ours, theirs)
    stats = cache.stats()
    kinds = [isinstance(layer, VirtualLayer) for layer in cache.layers]
    assert stats.num_virtual_layers == sum(kinds)
    assert [isinstance(layer, DynamicSlidingWindowLayer) for layer in cache.layers] == [
        not kind for kind in kinds
    ]
    if any(kinds):
        num_rows = len(padded()["input_ids"]) * MODES[mode].get("num_beams", 1)
        assert (stats.batch_size, stats.num_tokens) == (num_rows, 20 + 12 - 1)
        assert stats.committed_bytes > 0
    cache.close()


@pytest.mark.parametrize("mode", ["greedy", "beam 4"])
@pytest.mark.parametrize("name", ["llama", "llama-5x3x40", "gemma2", "gpt2", "deepseek-v3"])
def test_right_padding(name: str, mode: str) -> None:
    ours, theirs, cache = run_both(name, padded("right"), **MODES[mode])
    assert_same_run(ours, theirs)
    cache.close()


@pytest.mark.parametrize("name", ENGINE_MODELS)
def test_prompt_lookup_crops(name: str) -> None:
    ours, theirs, cache = run_both(
        name, one(), prompt_lookup_num_tokens=3, max_new_tokens=20, output_scores=False
    )
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    cache.close()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt-oss", "deepseek-v3"])
def test_assisted_decoding(name: str) -> None:
    if name in ("gemma2", "gpt-oss") and not WINDOWS_ASSIST:
        pytest.skip("transformers' own cache cannot do it in this version")
    assistant = copy.deepcopy(model(name))
    torch.manual_seed(5)
    for parameter in assistant.parameters():  # close enough to be right now and then
        parameter.data += 0.03 * torch.randn_like(parameter)
    ours, theirs, cache = run_both(name, one(), assistant_model=assistant, max_new_tokens=20)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    cache.close()


@pytest.mark.parametrize("mode", ["greedy", "beam 4"])
@pytest.mark.parametrize("name", OTHER_MODELS)
def test_hybrid_and_odd_models(name: str, mode: str) -> None:
    made = model(name)
    theirs = generate(made, padded("left"), **MODES[mode])
    cache = VirtualCache(made, page_bytes=PAGE)
    argument = {"cache_params" if "mamba" in type(made).__name__.lower() else "past_key_values"}
    ours = generate(made, padded("left"), **dict.fromkeys(argument, cache), **MODES[mode])
    assert_same_run(ours, theirs)
    cache.check_invariants()
    cache.close()


@pytest.mark.parametrize("layers_per_group", [1, 2, 5])
@pytest.mark.parametrize("page_bytes", [4096, 65536])
def test_every_layout(layers_per_group: int, page_bytes: int) -> None:
    made = model("llama-5x3x40")
    theirs = generate(made, padded(), num_beams=4)
    with VirtualCache(made, layers_per_group=layers_per_group, page_bytes=page_bytes) as cache:
        assert_same_run(generate(made, padded(), num_beams=4, past_key_values=cache), theirs)
        cache.check_invariants()


@pytest.mark.parametrize("commit_ahead_tokens", [0, 16])
def test_a_worker_changes_nothing(commit_ahead_tokens: int) -> None:
    made = model("llama")
    theirs = generate(made, padded(), num_beams=3, max_new_tokens=40)
    with VirtualCache(made, commit_ahead_tokens=commit_ahead_tokens, page_bytes=PAGE) as cache:
        ours = generate(made, padded(), num_beams=3, max_new_tokens=40, past_key_values=cache)
        assert_same_run(ours, theirs)
        cache.check_invariants()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    made = copy.deepcopy(model("llama")).to(dtype)
    theirs = generate(made, padded())
    with VirtualCache(made) as cache:
        ours = generate(made, padded(), past_key_values=cache)
        assert cache.layers[0].keys.dtype == dtype
        assert ours.sequences.tolist() == theirs.sequences.tolist()


class TestContinuing:
    def test_from_a_cache(self) -> None:
        made = model("llama")
        caches = {"theirs": DynamicCache(config=made.config), "ours": VirtualCache(made)}
        written = {}
        for name, cache in caches.items():
            first = generate(made, padded(), past_key_values=cache).sequences
            more = torch.cat([first, torch.full((3, 4), 17)], dim=1)
            mask = torch.cat([padded()["attention_mask"], torch.ones(3, 16, dtype=torch.long)], 1)
            inputs = {"input_ids": more, "attention_mask": mask}
            written[name] = generate(made, inputs, past_key_values=cache).sequences.tolist()
        assert written["ours"] == written["theirs"]
        caches["ours"].close()

    def test_plain_forward_in_chunks(self) -> None:
        made, ids = model("qwen3"), torch.arange(1, 41)[None]
        with torch.no_grad(), VirtualCache(made) as cache:
            expected = made(ids).logits
            pieces = [
                made(piece, past_key_values=cache, use_cache=True).logits
                for piece in ids.split([7, 1, 20, 12], dim=1)
            ]
            torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-4, rtol=0)

    def test_in_inference_mode_and_out_of_it(self) -> None:
        made, ids = model("llama"), torch.arange(1, 9)[None]
        with VirtualCache(made) as cache:
            with torch.inference_mode():
                made(ids, past_key_values=cache)
            with torch.no_grad():
                made(ids, past_key_values=cache)
            with torch.inference_mode():
                made(ids, past_key_values=cache)
            assert cache.get_seq_length() == 24

    def test_one_prompt_more_than_once(self) -> None:
        """The documented way to reuse a prompt: a deep copy for each continuation."""
        made = model("gemma2")  # sliding layers too
        prompt, question = torch.arange(1, 31)[None], torch.tensor([[40, 41, 42]])
        inputs = {"input_ids": torch.cat([prompt, question], 1)}
        expected = generate(made, inputs).sequences.tolist()
        with torch.no_grad(), VirtualCache(made, page_bytes=PAGE) as cache:
            made(prompt, past_key_values=cache)
            for _ in range(2):
                twin = copy.deepcopy(cache)
                ours = generate(made, inputs, past_key_values=twin).sequences.tolist()
                assert ours == expected
                twin.close()
            assert cache.get_seq_length() == 30

    def test_after_reset_with_another_batch_and_dtype(self) -> None:
        made = model("llama")
        half = copy.deepcopy(made).to(torch.bfloat16)
        with VirtualCache(made) as cache:
            generate(made, padded(), past_key_values=cache)
            cache.reset()
            assert cache.get_seq_length() == 0
            assert cache.stats().committed_bytes == 0
            assert_same_run(generate(made, one(), past_key_values=cache), generate(made, one()))
            cache.reset()
            ours = generate(half, padded(), past_key_values=cache).sequences.tolist()
            assert ours == generate(half, padded()).sequences.tolist()


class TestMemory:
    def test_beams_share_pages_and_stay_below_copies(self) -> None:
        made = model("llama-4x2x16")
        prompt = one(range(1, 97))
        theirs = DynamicCache(config=made.config)
        generate(made, prompt, num_beams=4, max_new_tokens=150, past_key_values=theirs)
        copied = sum(layer.keys.nbytes + layer.values.nbytes for layer in theirs.layers)
        with VirtualCache(made, page_bytes=PAGE, layers_per_group=4) as cache:
            generate(made, prompt, num_beams=4, max_new_tokens=150, past_key_values=cache)
            stats = cache.stats()
        assert stats.logical_bytes == copied
        assert stats.aliased_pages > 0
        assert stats.cow_copies > 0
        assert stats.shared_bytes > 0
        assert stats.peak_committed_bytes < 0.75 * copied

    def test_memory_follows_the_tokens_not_the_reservation(self) -> None:
        made = model("llama-4x2x16")  # 1,024 bytes a token
        with VirtualCache(made, page_bytes=PAGE, layers_per_group=4) as cache:
            cache.reserve(max_batch=1000, max_len=1 << 20)
            generate(made, one(), max_new_tokens=30, past_key_values=cache)
            stats = cache.stats()
            assert stats.reserved_bytes >= 1000 << 30
            assert stats.committed_bytes == 11 * PAGE  # 41 tokens, 4 to a page
            cache.reset()
            assert cache.stats().committed_bytes == 0
            assert cache.trim() > 0
            assert cache.stats().resident_bytes == 0

    def test_what_attention_gets_is_never_copied(self) -> None:
        made = model("llama")
        with VirtualCache(made) as cache:
            generate(made, padded(), past_key_values=cache)
            keys = cache.layers[1].keys
            assert keys.shape == (3, 3, 31, 8)
            assert not keys.is_contiguous()
            address = keys.data_ptr()
            cache.crop(-4)
            ids = torch.ones(3, 9, dtype=torch.long)
            with torch.no_grad():
                made(ids, past_key_values=cache)
            assert cache.layers[1].keys.data_ptr() == address
            assert cache.layers[1].keys.shape[2] == 36

    @pytest.mark.parametrize("how", ["close", "forget"])
    def test_nothing_is_left_behind(self, how: str) -> None:
        made = model("llama")
        before = num_page_mappings()
        cache: Any = VirtualCache(made, page_bytes=PAGE)
        generate(made, padded(), num_beams=4, past_key_values=cache)
        assert num_page_mappings() > before
        if how == "close":
            cache.close()
            cache.close()
        else:
            del cache
        assert num_page_mappings() == before


def test_an_encoder_decoder_model() -> None:
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=97, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    made = hf.T5ForConditionalGeneration(config).eval()
    for num_beams in (1, 3):
        cache = hf.EncoderDecoderCache(VirtualCache(made), DynamicCache(config=config))
        ours = generate(made, padded("right"), num_beams=num_beams, past_key_values=cache)
        assert_same_run(ours, generate(made, padded("right"), num_beams=num_beams))
        cache.self_attention_cache.check_invariants()
        cache.self_attention_cache.close()
