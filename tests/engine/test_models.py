"""Supported architectures write what ``model.generate()`` writes; others are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from vmalloc.engine import LLM, ConfigError, SamplingParams, UnsupportedModelError
from vmalloc.engine.kv_attention import ATTENTION_NAME

NUM_NEW_TOKENS = 12
MODELS = [
    "llama",
    "llama-5x3x40",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt2",
    "opt",
    "gpt-neox",
    "gpt-oss",
    "starcoder2",
    "olmo2",
    "granite",
    "phi",
    "stablelm",
    "cohere",
    "cohere2",
    "deepseek-v3",
    "mixtral",
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, logprobs=0)


def generate(llm: LLM, prompts: list[list[int]], params: Any = GREEDY) -> list[Any]:
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [output.outputs[0] for output in llm.generate(requests, params, use_tqdm=False)]


@pytest.mark.parametrize("layers_per_group", [1, None], ids=["per-layer", "interleaved"])
@pytest.mark.parametrize("page_size", [4096, 65536])
@pytest.mark.parametrize("name", MODELS)
def test_batched_greedy_output_is_token_exact(
    name: str,
    page_size: int,
    layers_per_group: int | None,
    tiny_model: Any,
    reference: Any,
    prompts: list[list[int]],
    assert_token_exact: Any,
    assert_logprobs_agree: Any,
) -> None:
    model, expected = tiny_model(name), reference(name)
    with LLM(
        model,
        max_num_seqs=16,
        max_num_batched_tokens=128,
        page_size=page_size,
        layers_per_group=layers_per_group,
    ) as llm:
        outputs = generate(llm, prompts)
        llm.engine.backend.check_invariants()
        assert llm.kv_stats().num_live_seqs == 0
        assert llm.kv_stats().peak_live_seqs == len(prompts)
    assert_token_exact(model, prompts, [output.token_ids for output in outputs], expected)
    longest = max(range(len(prompts)), key=lambda idx: len(prompts[idx]))
    assert_logprobs_agree(model, prompts[longest], outputs[longest])


@pytest.mark.parametrize("name", ["llama", "llama-5x3x40", "gemma2", "gpt2", "opt"])
def test_a_request_alone_gives_the_same_bits_as_in_a_batch(
    name: str, tiny_model: Any, prompts: list[list[int]]
) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=NUM_NEW_TOKENS, logprobs=5)
    model = tiny_model(name)
    settings = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "batch_invariant": True}
    with LLM(model, **settings) as llm:
        together = generate(llm, prompts, params)
        alone = [generate(llm, [prompt], params)[0] for prompt in prompts]
    for batched, single in zip(together, alone, strict=True):
        assert batched.token_ids == single.token_ids
        assert batched.logprobs == single.logprobs  # floats, bit for bit


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_chunked_prefill_changes_nothing(
    name: str,
    tiny_model: Any,
    reference: Any,
    prompts: list[list[int]],
    assert_token_exact: Any,
) -> None:
    model = tiny_model(name)
    with LLM(model, max_num_seqs=4, max_num_batched_tokens=7) as llm:
        engine = llm.engine
        most_chunks = 0
        chunks: dict[str, int] = {}
        schedule = engine.scheduler.schedule

        def counting() -> Any:
            batch = schedule()
            for seq, num_new in zip(batch.seqs, batch.num_new_tokens, strict=True):
                if seq.num_computed_tokens + num_new <= seq.num_prompt_tokens:
                    chunks[seq.request_id] = chunks.get(seq.request_id, 0) + 1
            return batch

        engine.scheduler.schedule = counting  # type: ignore[method-assign]
        outputs = generate(llm, prompts)
        most_chunks = max(chunks.values())
    assert most_chunks > 5
    assert_token_exact(model, prompts, [output.token_ids for output in outputs], reference(name))


def test_bfloat16_follows_the_models_own_attention(
    tiny_model: Any, prompts: list[list[int]]
) -> None:
    model = hf.AutoModelForCausalLM.from_config(tiny_model("llama").config, dtype=torch.bfloat16)
    model.load_state_dict(tiny_model("llama").state_dict())
    with LLM(model.eval(), dtype="auto", max_num_seqs=16) as llm:
        assert llm.engine.backend.config.layers[0].dtype == "bfloat16"
        outputs = generate(llm, prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt])).logits[0, -1].float()
        chosen = float(logits[output.token_ids[0]])
        assert chosen >= float(logits.max()) - 0.06 * float(logits.abs().max())


def test_the_model_has_its_own_attention_back_after_close(tiny_model: Any) -> None:
    model = tiny_model("llama")
    before = model.config._attn_implementation
    llm = LLM(model, max_num_seqs=2)
    assert model.config._attn_implementation == ATTENTION_NAME
    llm.close()
    llm.close()
    assert model.config._attn_implementation == before


REFUSED = {
    "encoder-decoder": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=97, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
        ),
        "encoder-decoder",
    ),
    "bloom": (
        lambda: hf.BloomForCausalLM(
            hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2)
        ),
        "AttentionInterface",
    ),
    "falcon": (
        lambda: hf.FalconForCausalLM(
            hf.FalconConfig(
                vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
            )
        ),
        "AttentionInterface",
    ),
    "mpt": (
        lambda: hf.MptForCausalLM(hf.MptConfig(vocab_size=97, d_model=32, n_layers=1, n_heads=2)),
        "AttentionInterface",
    ),
    "gpt-j": (
        lambda: hf.GPTJForCausalLM(
            hf.GPTJConfig(vocab_size=97, n_embd=32, n_layer=1, n_head=2, rotary_dim=8)
        ),
        "AttentionInterface",
    ),
    "mamba": (
        lambda: hf.MambaForCausalLM(
            hf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1)
        ),
        "recurrent state",
    ),
    "no language-model head": (
        lambda: hf.LlamaModel(
            hf.LlamaConfig(
                vocab_size=97,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
            )
        ),
        "language-model head",
    ),
    "head_dim of 12": (
        lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(
                vocab_size=97,
                hidden_size=24,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
            )
        ),
        "head_dim 12",
    ),
    "chunked attention": (
        lambda: hf.Llama4ForCausalLM(
            hf.Llama4TextConfig(
                vocab_size=97,
                hidden_size=32,
                intermediate_size=32,
                intermediate_size_mlp=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                head_dim=16,
                num_local_experts=1,
                attention_chunk_size=32,
            )
        ),
        "chunked_attention",
    ),
}


@pytest.mark.parametrize("which", REFUSED)
def test_the_probe_refuses_by_name_and_reason(which: str) -> None:
    make, reason = REFUSED[which]
    model = make().eval()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        LLM(model)
    assert type(model).__name__ in str(caught.value)
    assert caught.value.check in str(caught.value)
    assert model.config._attn_implementation == before


def test_the_probe_refuses_a_model_that_ignores_positions(tiny_model: Any) -> None:
    """Packed and alone must agree; a model that counts positions itself gives itself away."""
    model = hf.GPT2LMHeadModel(tiny_model("gpt2").config).eval()
    forward = model.transformer.forward

    def deaf(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model.transformer.forward = deaf
    with pytest.raises(UnsupportedModelError, match="packed logits"):
        LLM(model)


def test_the_probe_refuses_an_argument_that_attention_does_not_know(tiny_model: Any) -> None:
    model = hf.LlamaForCausalLM(tiny_model("llama").config).eval()
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def biased(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, position_bias=torch.zeros(1), **kwargs)

    attention.forward = biased
    with pytest.raises(UnsupportedModelError, match="position_bias"):
        LLM(model)


def test_the_probe_refuses_a_window_that_attention_never_hears_of(tiny_model: Any) -> None:
    model = hf.LlamaForCausalLM(tiny_model("llama").config).eval()
    model.config.sliding_window = 8
    try:
        with pytest.raises(UnsupportedModelError, match="sliding window"):
            LLM(model)
    finally:
        del model.config.sliding_window


def longrope_model() -> Any:
    torch.manual_seed(0)
    factors = [1.0] * 4
    config = hf.Phi3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": factors,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 32,
        },
    )
    return hf.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("max_model_len", [32, 128])
def test_longrope_is_chosen_once_by_max_model_len(max_model_len: int) -> None:
    """A short request gives the same bits beside a long one; alone it would have switched."""
    short = [5, 6, 7]
    mates = [[idx % 97 for idx in range(length)] for length in (20, 100) if length < max_model_len]
    params = SamplingParams(temperature=0.0, max_tokens=6, logprobs=1)
    expected = longrope_model()
    with LLM(longrope_model(), max_model_len=max_model_len, batch_invariant=True) as llm:
        alone = generate(llm, [short], params)[0]
        beside = generate(llm, [short, *mates], params)[0]
        assert alone.logprobs == beside.logprobs
    if max_model_len == 32:  # short factors: as transformers would have it for this length
        tokens = expected.generate(
            torch.tensor([short]),
            attention_mask=torch.ones(1, 3, dtype=torch.long),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
        )
        assert alone.token_ids == tokens[0, 3:].tolist()


def test_dynamic_rope_is_pinned_within_its_context() -> None:
    config = hf.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    )
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with LLM(model, batch_invariant=True) as llm:
        assert llm.config.max_model_len == 64
        assert len(generate(llm, [[1] * 50])[0].token_ids) == NUM_NEW_TOKENS
    with pytest.raises(ConfigError, match="context is 64"):
        LLM(model, max_model_len=65)
