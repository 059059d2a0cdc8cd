"""``use_virtual_cache()``: whole generation runs with our cache as the default, and its undoing."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.cache_utils import DynamicCache, StaticCache
from transformers.generation.utils import GenerationMixin

from tests.integrations.hf_models import (
    WINDOWS_ASSIST,
    assert_same_run,
    generate,
    model,
    one,
    padded,
)
from vmalloc import ConfigError
from vmalloc.integrations.transformers import CacheFullError, VirtualCache, use_virtual_cache

PAGE = 4096

# Everything that generate() does with its default cache.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": ("padded", {}),
    "sampled": ("padded", {"do_sample": True, "temperature": 1.3, "top_p": 0.9}),
    "several samples": ("padded", {"do_sample": True, "num_return_sequences": 3}),
    "beams": ("padded", {"num_beams": 4}),
    "several beams": ("padded", {"num_beams": 4, "num_return_sequences": 3}),
    "sampled beams": ("padded", {"num_beams": 3, "do_sample": True}),
    "length penalty": ("padded", {"num_beams": 3, "length_penalty": 2.0, "eos_token_id": 5}),
    "penalties": ("padded", {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2}),
    "stop early": ("padded", {"eos_token_id": [3, 40, 41, 42], "max_new_tokens": 30}),
    "chunked prefill": ("padded", {"prefill_chunk_size": 4}),
    "prompt lookup": ("one", {"prompt_lookup_num_tokens": 3, "max_new_tokens": 30}),
    "assisted": ("one", {"max_new_tokens": 20}),
    "sampled and assisted": ("one", {"max_new_tokens": 20, "do_sample": True, "top_k": 5}),
    "early exit": ("one", {"assistant_early_exit": 1, "output_scores": False}),
    "guidance": ("padded", {"guidance_scale": 1.5}),
    "embeddings": ("embeddings", {}),
    "hidden states": ("padded", {"output_hidden_states": True, "output_logits": True}),
    "attentions": ("padded", {"output_attentions": True}),
    "attentions of beams": ("padded", {"output_attentions": True, "num_beams": 3}),
}  # fmt: skip
ASSISTED = ("assisted", "sampled and assisted", "early exit")


def run(made: Any, name: str) -> Any:
    inputs, settings = RUNS[name]
    settings = dict(settings)
    if "assisted" in name:
        assistant = copy.deepcopy(made)
        torch.manual_seed(5)
        for parameter in assistant.parameters():
            parameter.data += 0.03 * torch.randn_like(parameter)
        settings["assistant_model"] = assistant
    if "attentions" in name:  # which the model's own attention gives only
        made = copy.deepcopy(made)
        made.set_attn_implementation("eager")
    given = padded() if inputs != "one" else one()
    if inputs == "embeddings":
        given["inputs_embeds"] = made.get_input_embeddings()(given.pop("input_ids"))
    return generate(made, given, **settings)


@pytest.mark.parametrize("run_name", RUNS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_whole_runs_are_what_they_were(name: str, run_name: str) -> None:
    if name == "gemma2" and run_name in ASSISTED and not WINDOWS_ASSIST:
        pytest.skip("transformers' own cache cannot do it in this version")
    made = model(name)
    theirs = run(made, run_name)
    with use_virtual_cache(page_bytes=PAGE):
        ours = run(made, run_name)
    if run_name in (*ASSISTED, "prompt lookup"):
        assert ours.sequences.tolist() == theirs.sequences.tolist()
    else:
        assert_same_run(ours, theirs)
    check_cache(ours.past_key_values, theirs.past_key_values)
    for name in ("hidden_states", "attentions"):
        assert (getattr(ours, name) is not None) == (name.split("_")[0] in run_name)
        pairs = zip(getattr(ours, name) or (), getattr(theirs, name) or (), strict=True)
        for steps, expected in pairs:
            torch.testing.assert_close(steps, expected, atol=1e-4, rtol=1e-4)


def check_cache(ours: Any, theirs: Any) -> None:
    """What transformers' own tests ask of the cache that a run returns."""
    assert type(ours) is VirtualCache
    assert isinstance(ours, DynamicCache)
    assert type(theirs) is DynamicCache
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert len(ours) == len(theirs)
    assert ours.is_sliding == theirs.is_sliding
    assert ours.is_compileable == theirs.is_compileable
    assert ours.is_initialized == theirs.is_initialized
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        assert mine.keys.shape == other.keys.shape
        assert mine.values.shape == other.values.shape
        torch.testing.assert_close(mine.keys, other.keys, atol=1e-4, rtol=1e-4)
    ours.check_invariants()


def test_a_run_goes_on_from_what_another_returned() -> None:
    """As transformers' own tests continue: ``past_key_values`` of one call into the next."""
    made = model("llama")
    whole = generate(made, one(), max_new_tokens=10).sequences.tolist()
    with use_virtual_cache(page_bytes=PAGE):
        first = generate(made, one(), max_new_tokens=4)
        rest = generate(
            made,
            {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)},
            max_new_tokens=6,
            past_key_values=first.past_key_values,
        )
    assert rest.sequences.tolist() == whole
    assert rest.past_key_values is first.past_key_values


def test_an_encoder_decoder_model_gets_it_for_self_attention() -> None:
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=97, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    made = hf.T5ForConditionalGeneration(config).eval()
    theirs = generate(made, padded("right"), num_beams=3)
    with use_virtual_cache(page_bytes=PAGE):
        ours = generate(made, padded("right"), num_beams=3)
    assert_same_run(ours, theirs)
    assert type(ours.past_key_values.self_attention_cache) is VirtualCache
    assert type(ours.past_key_values.cross_attention_cache) is DynamicCache


def test_a_model_that_takes_its_cache_apart() -> None:
    """Whisper's own generate() slices keys and values, and builds the cache that it returns."""
    torch.manual_seed(0)
    config = hf.WhisperConfig(
        vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8,
        max_source_positions=30, max_target_positions=60, pad_token_id=0, bos_token_id=1,
        eos_token_id=None, decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=[],
    )  # fmt: skip
    made = hf.WhisperForConditionalGeneration(config).eval()
    inputs = {"input_features": torch.randn(2, 8, 60)}
    theirs = generate(made, inputs)
    with use_virtual_cache(page_bytes=PAGE):
        ours = generate(made, inputs)
    assert_same_run(ours, theirs)
    pairs = zip(
        ours.past_key_values.self_attention_cache.layers,
        theirs.past_key_values.self_attention_cache.layers,
        strict=True,
    )
    for mine, other in pairs:
        torch.testing.assert_close(mine.keys, other.keys, atol=1e-4, rtol=1e-4)


class TestWhatIsLeftAlone:
    def test_everything_after_the_block(self) -> None:
        made, before = model("llama"), GenerationMixin._prepare_cache_for_generation
        with use_virtual_cache():
            assert GenerationMixin._prepare_cache_for_generation is not before
        with pytest.raises(ZeroDivisionError), use_virtual_cache():
            raise ZeroDivisionError
        assert GenerationMixin._prepare_cache_for_generation is before
        assert type(generate(made, one()).past_key_values) is DynamicCache

    def test_nested_blocks_have_settings_of_their_own(self) -> None:
        made, before = model("llama"), GenerationMixin._prepare_cache_for_generation
        with use_virtual_cache(page_bytes=PAGE):
            with (
                use_virtual_cache(page_bytes=PAGE, capacity_bytes=4 * PAGE),
                pytest.raises(CacheFullError),
            ):
                generate(made, padded(), max_new_tokens=60)
            assert type(generate(made, padded()).past_key_values) is VirtualCache
        assert GenerationMixin._prepare_cache_for_generation is before

    def test_a_cache_of_the_callers(self) -> None:
        made = model("llama")
        cache = DynamicCache(config=made.config)
        with use_virtual_cache():
            assert generate(made, one(), past_key_values=cache).past_key_values is cache

    def test_other_kinds_of_cache(self) -> None:
        made = model("llama")
        with use_virtual_cache():
            static = generate(made, one(), cache_implementation="static")
            assert type(static.past_key_values) is StaticCache
            assert generate(made, one(), use_cache=False).past_key_values is None

    def test_other_threads(self) -> None:
        made, kinds = model("llama"), {}
        inside, done = threading.Event(), threading.Event()

        def outside_of_any_block() -> None:
            inside.wait(60)
            kinds["theirs"] = type(generate(made, one()).past_key_values)
            done.set()

        thread = threading.Thread(target=outside_of_any_block)
        thread.start()
        with use_virtual_cache():
            inside.set()
            assert done.wait(60)
            kinds["ours"] = type(generate(made, one()).past_key_values)
        thread.join(60)
        assert kinds == {"theirs": DynamicCache, "ours": VirtualCache}

    def test_a_model_without_full_attention(self) -> None:
        with use_virtual_cache():
            cache = generate(model("mistral"), one()).past_key_values
        assert type(cache) is DynamicCache
        assert all(cache.is_sliding)

    def test_who_wraps_generate_within_a_block_stays(self) -> None:
        before = GenerationMixin._prepare_cache_for_generation
        calls = []
        try:
            with use_virtual_cache(page_bytes=PAGE):
                ours = GenerationMixin._prepare_cache_for_generation

                def theirs(*args: Any, **settings: Any) -> Any:
                    calls.append(args)
                    return ours(*args, **settings)

                GenerationMixin._prepare_cache_for_generation = theirs
                assert type(generate(model("llama"), one()).past_key_values) is VirtualCache
            assert GenerationMixin._prepare_cache_for_generation is theirs
            assert type(generate(model("llama"), one()).past_key_values) is DynamicCache
            with use_virtual_cache(page_bytes=PAGE):
                assert type(generate(model("llama"), one()).past_key_values) is VirtualCache
            assert len(calls) == 3
        finally:
            GenerationMixin._prepare_cache_for_generation = before

    def test_threads_that_open_and_close_blocks(self) -> None:
        """Whichever ends last puts the original back; nobody gets another's settings."""
        made, before = model("llama"), GenerationMixin._prepare_cache_for_generation
        wrong: list[Any] = []

        def work(number: int) -> None:
            for round_ in range(6):
                inside = (number + round_) % 2 == 0
                block = use_virtual_cache(max_len=100 + number) if inside else nullcontext()
                with block:
                    cache = generate(made, one(), max_new_tokens=3).past_key_values
                if type(cache) is not (VirtualCache if inside else DynamicCache) or (
                    inside and cache.get_max_length() != 100 + number
                ):
                    wrong.append((number, round_, cache))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert wrong == []
        assert GenerationMixin._prepare_cache_for_generation is before

    def test_bad_settings_are_refused_by_the_call(self) -> None:
        with use_virtual_cache(max_batch=0), pytest.raises(ConfigError, match="max_batch is 0"):
            generate(model("llama"), one())


def python(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300
    )
    return run.stdout + run.stderr


def test_importing_changes_nothing_in_transformers() -> None:
    out = python(
        "from transformers.generation.utils import GenerationMixin as G\n"
        "from transformers import AttentionInterface as A, DynamicCache as D\n"
        "from transformers.masking_utils import AttentionMaskInterface as I\n"
        "from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING as M\n"
        "def now():\n"
        "    return dict(vars(G)), dict(vars(D)), dict(M), list(A()), list(I())\n"
        "before = now()\n"
        "import vmalloc.integrations.transformers\n"
        "assert before == now()\n"
        "print('unchanged')"
    )
    assert out.strip() == "unchanged"


def test_without_transformers_there_is_one_clear_line() -> None:
    out = python(
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        "import vmalloc, vmalloc.integrations\n"
        "try:\n"
        "    import vmalloc.integrations.transformers\n"
        "except ImportError as error:\n"
        "    print(error)"
    )
    assert out == (
        "vmalloc.integrations.transformers needs transformers: "
        "pip install 'transformers>=5.17,<6'\n"
    )


@pytest.mark.parametrize("version", ["4.57.6", "5.16.1", "6.0.0.dev0"])
def test_another_transformers_is_named(version: str) -> None:
    out = python(
        "import transformers\n"
        f"transformers.__version__ = {version!r}\n"
        "try:\n"
        "    import vmalloc.integrations.transformers\n"
        "except ImportError as error:\n"
        "    print(error)"
    )
    assert f"needs transformers>=5.17,<6; {version} is installed" in out
    assert len(out.splitlines()) == 1
