"""Tiny seeded models of every module graph that the fused decoder knows, each with its oddities.

Weights are large, and norms and biases far from 1 and 0, so that none of them can be left out
unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf

from vmalloc.engine.cache_factory import CacheFactory
from vmalloc.engine.model_lease import ModelLease
from vmalloc.engine.probe import ProbedModel, probe_model

VOCAB_SIZE = 97
CONTEXT = 160
WINDOW = 8  # far below the prompts' lengths, so that it matters

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_HEAD = {"head_dim": 16}
_ODD = {
    "num_hidden_layers": 5,
    "hidden_size": 240,
    "intermediate_size": 52,
    "head_dim": 40,
    "initializer_range": 0.15,
}
_MIXED = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": WINDOW,
}
_GEMMA = {**_HEAD, **_MIXED, "query_pre_attn_scalar": 24}
_CAPS = {"attn_logit_softcapping": 6.0, "final_logit_softcapping": 9.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 40,
}
_PARTIAL_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [2.0, 2.5, 3.0],
    "original_max_position_embeddings": 32,
}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.5,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**_BASE),
    "llama-5x3x40": lambda: hf.LlamaConfig(**{**_BASE, **_ODD}),
    "llama-biases-tied": lambda: hf.LlamaConfig(
        **_BASE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama-llama3-rope": lambda: hf.LlamaConfig(**_BASE, rope_parameters=_LLAMA3),
    "llama-yarn-gelu": lambda: hf.LlamaConfig(
        **_BASE, rope_parameters=_YARN, hidden_act="gelu_pytorch_tanh"
    ),
    "mistral": lambda: hf.MistralConfig(**_BASE, sliding_window=WINDOW),
    "ministral": lambda: hf.MinistralConfig(**_BASE, **_HEAD, **_MIXED),
    "qwen2": lambda: hf.Qwen2Config(**_BASE, **_MIXED, use_sliding_window=True),
    "qwen3": lambda: hf.Qwen3Config(**_BASE, **_HEAD, attention_bias=True),
    "smollm3": lambda: hf.SmolLM3Config(**_BASE, no_rope_layers=[1, 0, 1]),
    "phi3": lambda: hf.Phi3Config(**_BASE, sliding_window=WINDOW),
    "phi3-partial-longrope": lambda: hf.Phi3Config(**_BASE, rope_parameters=_PARTIAL_LONGROPE),
    "granite": lambda: hf.GraniteConfig(**_BASE, **_GRANITE, attention_bias=True),
    "olmo2": lambda: hf.Olmo2Config(**_BASE),
    "cwm": lambda: hf.CwmConfig(
        **{**_BASE, "bos_token_id": 0, "eos_token_id": 0}, **_HEAD, **_MIXED
    ),
    "seed_oss": lambda: hf.SeedOssConfig(**_BASE, **_HEAD, attention_out_bias=True),
    "gemma": lambda: hf.GemmaConfig(**_BASE, **_HEAD),
    "gemma2": lambda: hf.Gemma2Config(**_BASE, **_GEMMA, **_CAPS),
    "gemma3": lambda: hf.Gemma3TextConfig(**_BASE, **_GEMMA, final_logit_softcapping=9.0),
}


@cache
def make_model(name: str) -> Any:
    """The model, the same object every time."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    # transformers 5.17 computes soft-capped models under sdpa, and drops the cap without a word.
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases
                parameter += 0.3 * torch.randn_like(parameter)
    return model


class Probed:
    """A model lent for tests of parts that an engine puts together."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.caches = CacheFactory(torch.device("cpu"))
        self._lease = ModelLease(model, CONTEXT, owner=self)
        self.probed: ProbedModel = probe_model(model, self.caches)

    def give_back(self) -> None:
        self._lease.give_back()
