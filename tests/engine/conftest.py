"""Tiny seeded models and the meaning of "token-exact" (design.md section 5)."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # read when libgomp loads, so before torch
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network

import copy
import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers as hf

from tests.engine.running import PAGE, assert_no_page_is_lost
from vmalloc.engine import EngineConfig, LLMEngine

VOCAB_SIZE = 97
CONTEXT = 160
LONG_CONTEXT = 640
NUM_PROMPTS = 16
NUM_NEW_TOKENS = 12
WINDOW = 8  # far below the prompts' lengths, so that it matters

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": CONTEXT,
    # Large weights spread the logits: ties would make greedy decoding meaningless.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_ODD = {
    "num_hidden_layers": 5,
    "hidden_size": 240,
    "num_attention_heads": 6,
    "head_dim": 40,
    "max_position_embeddings": LONG_CONTEXT,
    "initializer_range": 0.15,
}
# A token stores 1,024 bytes: four of them fill a page.
_POWER_OF_TWO = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": LONG_CONTEXT,
}
_GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 6,
    "n_positions": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}
_OPT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "word_embed_proj_dim": 48,
    "ffn_dim": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": CONTEXT,
    "init_std": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}
_NEOX = {name: value for name, value in _COMMON.items() if name != "num_key_value_heads"}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 8,  # keys of 24 elements, values of 8
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 2,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**_COMMON),
    "llama-5x3x40": lambda: hf.LlamaConfig(**{**_COMMON, **_ODD}),
    "llama-4x2x16": lambda: hf.LlamaConfig(**{**_COMMON, **_POWER_OF_TWO}),
    "qwen2": lambda: hf.Qwen2Config(**_COMMON),
    "qwen3": lambda: hf.Qwen3Config(**_COMMON, head_dim=16),
    "mistral": lambda: hf.MistralConfig(**_COMMON, sliding_window=WINDOW),
    "gemma2": lambda: hf.Gemma2Config(**_COMMON, **_GEMMA),
    "gemma3": lambda: hf.Gemma3TextConfig(**_COMMON, **_GEMMA),
    "phi3": lambda: hf.Phi3Config(**_COMMON, sliding_window=WINDOW),
    "gpt2": lambda: hf.GPT2Config(**_GPT2),
    "opt": lambda: hf.OPTConfig(**_OPT),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**_NEOX),
    "gpt-oss": lambda: hf.GptOssConfig(
        **_COMMON, **_MOE, head_dim=16, sliding_window=WINDOW, rope_parameters=_ROPE
    ),
    "starcoder2": lambda: hf.Starcoder2Config(**_COMMON, sliding_window=WINDOW),
    "olmo2": lambda: hf.Olmo2Config(**_COMMON),
    "granite": lambda: hf.GraniteConfig(**_COMMON),
    "phi": lambda: hf.PhiConfig(**_COMMON),
    "stablelm": lambda: hf.StableLmConfig(**_COMMON),
    "cohere": lambda: hf.CohereConfig(**_COMMON),
    "cohere2": lambda: hf.Cohere2Config(**_COMMON, sliding_window=WINDOW),
    "deepseek-v3": lambda: hf.DeepseekV3Config(**{**_COMMON, **_LATENT}),
    "mixtral": lambda: hf.MixtralConfig(**_COMMON, **_MOE),
}


@cache
def _model(name: str) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    # transformers 5.17 computes soft-capped models under sdpa, and drops the cap without a word.
    has_softcap = getattr(config, "attn_logit_softcapping", None) is not None
    model = hf.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager" if has_softcap else None
    ).eval()
    model.generation_config.eos_token_id = None
    return model


def ragged_prompts(num_prompts: int = NUM_PROMPTS, seed: int = 1) -> list[list[int]]:
    """Prompts of 1 to 60 tokens."""
    rng = random.Random(seed)
    lengths = [1, 60, *(rng.randint(2, 59) for _ in range(num_prompts - 2))]
    return [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in lengths]


@cache
def _reference(name: str) -> tuple[tuple[int, ...], ...]:
    """What ``model.generate()`` writes after each prompt, run alone."""
    model = _model(name)
    written = []
    for prompt in ragged_prompts():
        tokens = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        written.append(tuple(tokens[0, len(prompt) :].tolist()))
    return tuple(written)


@torch.inference_mode()
def _assert_token_exact(
    model: Any, prompts: list[list[int]], written: list[list[int]], reference: Any
) -> None:
    """Tokens equal; a difference needs a gap under 1e-4 and is allowed once in 1,000 sequences."""
    different = []
    for idx, (prompt, ours, theirs) in enumerate(zip(prompts, written, reference, strict=True)):
        if tuple(ours) == tuple(theirs):
            continue
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        logits = model(torch.tensor([prompt + list(theirs[:at])])).logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        print(f"sequence {idx} differs at token {at}: gap {best - second:.2e}")
        assert best - second < 1e-4, f"sequence {idx}, token {at}: {ours[at]} is not {theirs[at]}"
        different.append(idx)
    assert len(different) <= max(1, len(prompts) // 1000)


@torch.inference_mode()
def _assert_logprobs_agree(model: Any, prompt: list[int], output: Any) -> None:
    """Logprobs of the written tokens, against one teacher-forced pass."""
    token_ids = output.token_ids
    logits = model(torch.tensor([prompt + token_ids])).logits[0]
    expected = logits.float().log_softmax(-1)
    for at, token_id in enumerate(token_ids):
        ours = output.logprobs[at][token_id].logprob
        assert ours == pytest.approx(float(expected[len(prompt) + at - 1, token_id]), abs=1e-4)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[str], Any]:
    """``tiny_model("llama")``: a seeded random model, the same object every time."""
    return _model


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Any]:
    """``reference("llama")``: greedy tokens of ``model.generate()`` for ``prompts``."""
    return _reference


@pytest.fixture
def prompts() -> list[list[int]]:
    return ragged_prompts()


@pytest.fixture(scope="session")
def assert_token_exact() -> Any:
    return _assert_token_exact


@pytest.fixture(scope="session")
def assert_logprobs_agree() -> Any:
    return _assert_logprobs_agree


@pytest.fixture(params=["virtual", "paged"])
def make_engine(request: pytest.FixtureRequest) -> Iterator[Callable[..., LLMEngine]]:
    """``make_engine("llama", max_num_seqs=4)``: an engine over a tiny model, on each backend.

    At the end no page of an engine that has nothing to do may be missing.
    """
    engines: list[LLMEngine] = []

    def make(name: str = "llama", **settings: Any) -> LLMEngine:
        defaults: dict[str, Any] = {
            "kv_backend": request.param,
            "page_size": PAGE,
            "batch_invariant": True,
            "max_num_seqs": 16,
        }
        model = copy.deepcopy(_model(name))
        # One row for all layers: the pools of these tests are counted in its pages.
        defaults["layers_per_group"] = model.config.get_text_config().num_hidden_layers
        engines.append(LLMEngine(model, None, EngineConfig(**{**defaults, **settings})))
        return engines[-1]

    yield make
    for engine in engines:
        if not (engine.has_unfinished_requests() or engine.is_asleep):
            assert_no_page_is_lost(engine)
        engine.close()


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)
