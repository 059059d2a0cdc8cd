"""What one may do with a DynamicCache and so with a VirtualCache, beyond a plain generate()."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.cache_utils import DynamicCache, DynamicLayer

from tests.integrations.hf_models import (
    assert_same_run,
    generate,
    model,
    num_page_mappings,
    one,
    padded,
)
from vmalloc import ConfigError
from vmalloc.integrations.transformers import (
    CacheFullError,
    VirtualCache,
    register,
    use_virtual_cache,
)
from vmalloc.integrations.transformers.layer import VirtualLayer

PAGE = 4096


def states(batch: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (batch, 2, num_tokens, 8)
    return torch.randn(shape), torch.randn(shape)


def small_config(num_layers: int = 2, **settings: Any) -> Any:
    return hf.LlamaConfig(num_hidden_layers=num_layers, **settings)


class TestProperties:
    @pytest.mark.parametrize("name", ["llama", "gemma2", "+jamba", "+gemma3n", "+deepseek-v3.2"])
    def test_before_and_after_a_run(self, name: str) -> None:
        """Models ask them: ``is_initialized`` tells PaliGemma whether this is the prompt."""
        made = model(name)
        theirs, ours = DynamicCache(config=made.config), VirtualCache(made, page_bytes=PAGE)
        for _ in range(2):
            for name in (
                *("is_initialized", "is_compileable", "is_croppable", "is_sliding"),
                *("is_linear", "is_dummy", "batch_size"),
            ):
                assert getattr(ours, name, None) == getattr(theirs, name, None), name
            assert ours.get_seq_length() == theirs.get_seq_length()
            assert ours.get_max_length() == theirs.get_max_length()
            for cache in (ours, theirs):
                generate(made, one(), past_key_values=cache)
        ours.close()

    def test_a_cache_of_other_layers_is_not_compiled_either(self) -> None:
        """generate() would compile a model for it, as for no DynamicCache."""
        assert not VirtualCache(model("+mamba")).is_compileable

    def test_early_initialization(self) -> None:
        with VirtualCache(small_config(), page_bytes=PAGE) as cache:
            cache.early_initialization(4, 2, 8, torch.float32, torch.device("cpu"))
            assert cache.is_initialized
            assert cache.get_seq_length() == 0
            assert cache.layers[0].keys is None
            given = states(1, 5)
            for layer in range(2):
                keys, values = cache.update(*given, layer)
                assert torch.equal(keys, given[0])
                assert torch.equal(values, given[1])

    def test_a_limit_is_told_where_one_was_given(self) -> None:
        assert VirtualCache(small_config(), max_len=77).get_max_length() == 77
        cache = VirtualCache(small_config())
        cache.reserve(2, 55)
        assert cache.get_max_length() == 55


class TestMoreThanWasReserved:
    @pytest.mark.parametrize("name", ["llama", "gemma2"])
    def test_beyond_the_models_maximum(self, name: str) -> None:
        """transformers warns and goes on, and so do we: the rows move to where there is room."""
        made = copy.deepcopy(model(name))
        made.config.max_position_embeddings = 25  # as if: the weights do not care
        theirs = generate(made, padded(), num_beams=3, max_new_tokens=40)
        with VirtualCache(made, page_bytes=PAGE) as cache:
            ours = generate(made, padded(), num_beams=3, max_new_tokens=40, past_key_values=cache)
            assert_same_run(ours, theirs)
            assert cache.get_seq_length() == 59
            cache.check_invariants()

    def test_a_prompt_beyond_it(self) -> None:
        made = copy.deepcopy(model("llama"))
        made.config.max_position_embeddings = 10
        with VirtualCache(made, page_bytes=PAGE) as cache:
            ours = generate(made, padded(), past_key_values=cache)
            assert_same_run(ours, generate(made, padded()))

    def test_a_limit_that_was_given_is_kept(self) -> None:
        with (
            VirtualCache(model("llama"), max_len=25, page_bytes=PAGE) as cache,
            pytest.raises(CacheFullError, match="no room for 26 tokens: max_len is 25"),
        ):
            generate(model("llama"), padded(), max_new_tokens=40, past_key_values=cache)
        with VirtualCache(model("llama"), page_bytes=PAGE) as cache:
            cache.reserve(3, 25)
            with pytest.raises(CacheFullError, match="no room for 26 tokens: max_len is 25"):
                cache.update(*states(1, 26), 0)

    def test_moving_ends_sharing_and_may_not_fit(self) -> None:
        config = small_config(max_position_embeddings=64)
        with VirtualCache(config, page_bytes=PAGE, capacity_bytes=8 * PAGE) as cache:
            given = states(1, 64)  # two pages in each layer
            for layer in range(2):
                cache.update(*given, layer)
            cache.batch_repeat_interleave(4)
            num_mappings = num_page_mappings()
            with pytest.raises(CacheFullError, match="a second time, to move them"):
                cache.update(*states(4, 1), 0)
            assert num_page_mappings() == num_mappings
            assert cache.stats().committed_bytes == 4 * PAGE
            assert torch.equal(cache.layers[0].keys, given[0].expand(4, -1, -1, -1))
            cache.check_invariants()

    def test_more_rows_than_there_is_room_for(self) -> None:
        theirs = DynamicCache(config=small_config())
        with VirtualCache(small_config(), page_bytes=PAGE) as ours:
            given = states(2, 9)
            for cache in (ours, theirs):
                for layer in range(2):
                    cache.update(*given, layer)
                cache.batch_repeat_interleave(50)
                cache.batch_select_indices(torch.arange(99, -1, -1))
                cache.batch_select_indices(torch.arange(200) % 100)
            ours.check_invariants()
            assert ours.stats().batch_size == 200
            assert torch.equal(ours.layers[1].values, theirs.layers[1].values)
            more = states(200, 1)
            assert torch.equal(ours.update(*more, 0)[0], theirs.update(*more, 0)[0])
        with VirtualCache(small_config(), max_batch=4) as cache:
            cache.update(*states(2, 9), 0)
            with pytest.raises(ConfigError, match="6 rows are asked for; max_batch is 4"):
                cache.batch_repeat_interleave(3)

    def test_hundreds_of_prompts_side_by_side(self) -> None:
        """A cache a prompt, to go on from: all of them fit into the address space of a process."""
        config = small_config(32, max_position_embeddings=131072)
        shape = (1, 8, 1, 128)
        keys = torch.ones(shape, dtype=torch.bfloat16)
        caches = []
        for _ in range(300):
            caches.append(VirtualCache(config))
            caches[-1].update(keys, keys, 0)
        for cache in caches:
            cache.close()


class TestViews:
    def test_they_outlive_a_cache_that_nobody_closed(self) -> None:
        """As tensors do: ``outputs.past_key_values`` may go, what was taken from it may stay."""
        before = num_page_mappings()
        theirs = generate(model("llama"), padded()).past_key_values
        with use_virtual_cache(page_bytes=PAGE):
            cache = generate(model("llama"), padded()).past_key_values
        taken = [layer.values[1:] for layer in cache.layers]
        del cache
        for mine, layer in zip(taken, theirs.layers, strict=True):
            torch.testing.assert_close(mine, layer.values[1:], atol=1e-4, rtol=1e-4)
        del taken, mine
        assert num_page_mappings() == before

    def test_they_outlive_moving(self) -> None:
        before = num_page_mappings()
        with VirtualCache(small_config(max_position_embeddings=8), page_bytes=PAGE) as cache:
            given = states(1, 8)
            keys, _ = cache.update(*given, 0)
            cache.update(*states(1, 1), 0)
            assert torch.equal(keys, given[0])
            assert torch.equal(cache.layers[0].keys[:, :, :8], given[0])
        assert num_page_mappings() > before
        del keys, _
        assert num_page_mappings() == before

    def test_one_that_goes_in_the_middle_of_a_run(self) -> None:
        """Who only keeps what a step returned keeps the cache by it."""
        made, ids = model("llama"), one()["input_ids"]
        with torch.no_grad():
            expected = made(ids).logits[:, -1]
            out = made(ids[:, :5], past_key_values=VirtualCache(made, page_bytes=PAGE))
            for column in ids[:, 5:].split(1, dim=1):
                out = made(column, past_key_values=out.past_key_values)
        torch.testing.assert_close(out.logits[:, -1], expected, atol=1e-4, rtol=0)

    def test_after_an_exception_in_the_middle_of_a_pass(self) -> None:
        """Some layers have the token then: ``crop(-1)`` takes it from them, and only from them."""
        made, ids = copy.deepcopy(model("llama")), one()["input_ids"]

        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        with torch.no_grad(), VirtualCache(made, page_bytes=PAGE) as cache:
            expected = made(ids).logits[:, -1]
            made(ids[:, :-1], past_key_values=cache)
            hook = made.model.layers[1].mlp.register_forward_pre_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                made(ids[:, -1:], past_key_values=cache)
            hook.remove()
            assert [layer.get_seq_length() for layer in cache.layers] == [12, 12, 11]
            cache.crop(-1)
            assert [layer.get_seq_length() for layer in cache.layers] == [11, 11, 11]
            out = made(ids[:, -1:], past_key_values=cache)
            torch.testing.assert_close(out.logits[:, -1], expected, atol=1e-4, rtol=0)


class TestCopying:
    def test_after_reserve(self) -> None:
        """What ``reserve()`` said counts, not what the constructor said before it."""
        made = model("llama")
        with VirtualCache(made, max_batch=1, max_len=16, page_bytes=PAGE) as cache:
            cache.reserve(4, 64)
            generate(made, padded(), past_key_values=cache)
            with copy.deepcopy(cache) as twin:
                assert twin.get_seq_length() == 31
                assert twin.get_max_length() == 64
                assert torch.equal(twin.layers[2].keys, cache.layers[2].keys)


class TestStartingOver:
    @pytest.mark.parametrize(
        "name", ["gemma2", "gpt-oss", "+jamba", "+lfm2", "+falcon-h1", "+deepseek-v3.2"]
    )
    def test_reset_of_a_mixed_model(self, name: str) -> None:
        """The other layers forget as well, also in versions whose own reset() does not."""
        made = model(name)
        with VirtualCache(made, page_bytes=PAGE) as cache:
            generate(made, padded(), past_key_values=cache)
            for inputs in (one(), padded()):  # another batch, each time
                cache.reset()
                ours = generate(made, inputs, past_key_values=cache)
                assert_same_run(ours, generate(made, inputs))

    def test_a_crop_that_is_refused_changes_nothing(self) -> None:
        """A window that has slid cannot go back; nor may the other layers, then."""
        config = copy.deepcopy(model("gemma2").config)
        config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
        made = hf.Gemma2ForCausalLM(config).eval()
        expected = generate(made, padded(), max_new_tokens=16).sequences[:, 20:].tolist()
        with VirtualCache(made, page_bytes=PAGE) as cache:
            first = generate(made, padded(), past_key_values=cache).sequences
            with pytest.raises(RuntimeError, match="sliding window"):
                cache.crop(-2)
            assert {layer.get_seq_length() for layer in cache.layers} == {31}
            mask = torch.cat([padded()["attention_mask"], torch.ones(3, 12, dtype=torch.long)], 1)
            rest = generate(
                made,
                {"input_ids": first, "attention_mask": mask},
                past_key_values=cache,
                max_new_tokens=4,
            )
            assert rest.sequences[:, 20:].tolist() == expected


def test_a_compiled_model() -> None:
    """What is ours is left out of the graphs as a whole, not traced into."""
    config = small_config(1, hidden_size=32, intermediate_size=32, vocab_size=99)
    made, ids = hf.LlamaForCausalLM(config).eval(), one()["input_ids"]
    register(num_threads=1)
    made.set_attn_implementation("vmalloc")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    with torch.no_grad(), VirtualCache(made, page_bytes=PAGE) as cache:
        expected = made(ids).logits[:, -1]
        compiled = torch.compile(made, backend="eager")
        compiled(ids[:, :-1], past_key_values=cache)
        out = compiled(ids[:, -1:], past_key_values=cache)
    torch.testing.assert_close(out.logits[:, -1], expected, atol=1e-4, rtol=0)
    assert counters["stats"]["unique_graphs"] > 0
    breaks = " ".join(counters["graph_break"])
    assert "VirtualCache.update" in breaks
    assert "_core" not in breaks
    torch._dynamo.reset()


class Elsewhere(torch.Tensor):
    """Says that it is on another device: a CPU has one only."""

    device = property(lambda self: torch.device("cpu", 0))  # type: ignore[assignment]


class TestSeveralDevices:
    def fill(self, cache: Any, kinds: Any, batch: int, num_tokens: int) -> list[Any]:
        given = [
            tuple(state.as_subclass(kind) for state in states(batch, num_tokens)) for kind in kinds
        ]
        for layer, state in enumerate(given):
            keys, values = cache.update(*state, layer)
            assert torch.equal(keys, state[0])
            assert torch.equal(values, state[1])
        return given

    def test_layers_on_two(self) -> None:
        with VirtualCache(small_config(), page_bytes=PAGE) as cache:
            given = self.fill(cache, (torch.Tensor, Elsewhere), 2, 20)
            assert set(cache.stats().devices) == {"cpu", "cpu:0"}
            cache.reorder_cache(torch.tensor([1, 1]))
            cache.crop(-3)
            for layer, (keys, _) in zip(cache.layers, given, strict=True):
                assert torch.equal(layer.keys, keys[[1, 1], :, :17])
            cache.check_invariants()

    def test_one_runs_out_while_rows_are_picked(self) -> None:
        """What the other one did cannot be undone: the cache is empty then, and usable."""
        kinds = (torch.Tensor, Elsewhere, Elsewhere)  # the second device has more to hold
        with VirtualCache(small_config(3), page_bytes=PAGE, capacity_bytes=6 * PAGE) as cache:
            self.fill(cache, kinds, 2, 20)
            with pytest.raises(CacheFullError, match="the cache was emptied"):
                cache.reorder_cache(torch.tensor([1, 0]))
            assert {layer.get_seq_length() for layer in cache.layers} == {0}
            self.fill(cache, kinds, 3, 4)
            cache.check_invariants()


def mllama() -> tuple[Any, dict[str, torch.Tensor]]:
    """Text layers hold the text's tokens, cross-attention layers an image's, in one cache."""
    torch.manual_seed(1)
    config = hf.MllamaConfig(
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4,
            "intermediate_size": 64, "image_size": 28, "patch_size": 14, "vision_output_dim": 64,
            "max_num_tiles": 4, "intermediate_layers_indices": [1],
            "supported_aspect_ratios": [[1, 1]],
        },
        text_config={
            "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 512,
            "num_hidden_layers": 4, "cross_attention_layers": [1, 3], "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        image_token_index=98,
    )  # fmt: skip
    made = hf.MllamaForConditionalGeneration(config).eval()
    made.generation_config.eos_token_id = None
    for name, parameter in made.named_parameters():
        if "gate" in name:  # they start closed
            parameter.data.fill_(1.0)
    ids = torch.tensor([[98, 1, 5, 6, 7, 8], [98, 1, 9, 3, 2, 8]])
    return made, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 1, 4, 3, 28, 28),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 4, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, 6, 1, 4, dtype=torch.long),
    }


@pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")
@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_model_whose_layers_hold_an_image(num_beams: int) -> None:
    made, inputs = mllama()
    theirs = generate(made, inputs, num_beams=num_beams)
    with use_virtual_cache(page_bytes=PAGE):
        ours = generate(made, inputs, num_beams=num_beams)
    assert_same_run(ours, theirs)
    kinds = [type(layer) for layer in ours.past_key_values.layers]
    assert kinds == [VirtualLayer, DynamicLayer, VirtualLayer, DynamicLayer]
    assert ours.past_key_values.stats().num_tokens == 6 + 12 - 1
