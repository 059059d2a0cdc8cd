"""Write docs/supported-models.md: the load probe's verdict on a tiny model of each architecture.

Owns: the page and the table of tiny configs behind it.  Thread-safety: none; one process.

Nothing on the page is typed by hand but names: each architecture is built with seeded random
weights, small enough that all of them take seconds, and handed to the engine as a checkpoint is.

    python scripts/list_supported_models.py           # write the page
    python scripts/list_supported_models.py --check   # exit 1 and show a diff if it is out of date
"""

from __future__ import annotations

import ast
import difflib
import os
import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # read when libgomp loads, so before torch
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the network

import torch
import transformers as hf
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vmalloc.engine import EngineConfig, LayerKVSpec, LLMEngine, UnsupportedModelError
from vmalloc.engine.kv_attention import AttentionCall, attention_through
from vmalloc.engine.tensor_parallel.sharding_checks import (
    check_shardable,
    has_whole_heads,
    sharding_plan,
)

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("docs/supported-models.md")
TOKEN_EXACT_TESTS = ROOT / "tests" / "engine" / "test_models.py"
COMMAND = "python scripts/list_supported_models.py"
VERSION_LINE = "Generated with transformers "
MAX_REASON_CHARS = 300

EXIT_OUT_OF_DATE = 1
EXIT_SCRIPT_ERROR = 2

ADMITTED, REFUSED, MISSING, ERROR = "admitted", "refused", "missing", "error"

Settings = dict[str, Any]

VOCAB_SIZE = 97
WINDOW = 8  # below the probe's prompts, so that a window that is ignored shows in the logits

_IDS: Settings = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_COMMON: Settings = _IDS | {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Large weights spread the logits, so that attention matters to them.
    "initializer_range": 0.3,
}
# Models without grouped heads do not know the word.
_NO_GROUPS = {name: value for name, value in _COMMON.items() if name != "num_key_value_heads"}
_ALL_HEADS = _COMMON | {"num_key_value_heads": 4}
_HEAD = {"head_dim": 16}
_SLIDING = {"sliding_window": WINDOW}
_MIXED = _SLIDING | {"layer_types": ["sliding_attention", "full_attention"] * 2}
_GEMMA = _HEAD | _SLIDING | {"query_pre_attn_scalar": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 8,
}
_INDEXER = {"index_topk": 4, "index_head_dim": 16, "index_n_heads": 2}
_MLP_TYPES = {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GPT2 = _IDS | {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.3,
}
_OPT = _IDS | {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "init_std": 0.3,
}
_BART = _IDS | {
    "vocab_size": VOCAB_SIZE,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "init_std": 0.3,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
_MAMBA = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One line of the table.

    Attributes:
        key: short name; the same as in the engine's token-exact test where that has it.
        name: what people call it.
        config_class: its config in transformers.
        settings: of a tiny model.
        model_class: what to build; None: what transformers' auto class takes.
    """

    key: str
    name: str
    config_class: str
    settings: Settings
    model_class: str | None = None


A = Architecture
ARCHITECTURES: tuple[Architecture, ...] = (
    A("afmoe", "AFMoE", "AfmoeConfig", _COMMON | _HEAD | _MIXED | _EXPERTS),
    A("apertus", "Apertus", "ApertusConfig", _COMMON),
    A("arcee", "Arcee", "ArceeConfig", _COMMON),
    A("bamba", "Bamba", "BambaConfig", _COMMON | {"mamba_n_heads": 8, "mamba_d_head": 16}),
    A("bart", "BART decoder", "BartConfig", _BART, "BartForCausalLM"),
    A("biogpt", "BioGPT", "BioGptConfig", _NO_GROUPS),
    A("bitnet", "BitNet", "BitNetConfig", _COMMON),
    A(
        "bloom",
        "BLOOM",
        "BloomConfig",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "n_layer": 4, "n_head": 4},
    ),
    A("codegen", "CodeGen", "CodeGenConfig", _GPT2 | {"rotary_dim": 8}),
    A("cohere", "Cohere", "CohereConfig", _COMMON),
    A("cohere2", "Cohere2", "Cohere2Config", _COMMON | _SLIDING),
    A("ctrl", "CTRL", "CTRLConfig", _GPT2 | {"dff": 64}),
    A(
        "cwm",
        "CWM",
        "CwmConfig",
        _COMMON | _HEAD | _MIXED | {"bos_token_id": 0, "eos_token_id": 1},
    ),
    A(
        "dbrx",
        "DBRX",
        "DbrxConfig",
        {
            "vocab_size": VOCAB_SIZE,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 4,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {
                "ffn_hidden_size": 32,
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "hidden_size": 64,
            },
        },
    ),
    A("deepseek-v2", "DeepSeek-V2", "DeepseekV2Config", _COMMON | _ROUTED | _LATENT),
    A("deepseek-v3", "DeepSeek-V3", "DeepseekV3Config", _COMMON | _ROUTED | _LATENT),
    A(
        "deepseek-v3.2",
        "DeepSeek-V3.2",
        "DeepseekV32Config",
        _COMMON | _ROUTED | _LATENT | _INDEXER,
    ),
    A("diffllama", "DiffLlama", "DiffLlamaConfig", _COMMON),
    A("doge", "Doge", "DogeConfig", _COMMON),
    A("dots1", "dots.llm1", "Dots1Config", _COMMON | _HEAD | _ROUTED),
    A("ernie4.5", "ERNIE 4.5", "Ernie4_5Config", _COMMON | _HEAD),
    A(
        "ernie4.5-moe",
        "ERNIE 4.5 MoE",
        "Ernie4_5_MoeConfig",
        _COMMON
        | {
            "moe_intermediate_size": 32,
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "moe_layer_end_index": 3,
        },
    ),
    A("exaone4", "EXAONE 4.0", "Exaone4Config", _COMMON | _MIXED),
    A(
        "falcon",
        "Falcon",
        "FalconConfig",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
    ),
    A(
        "falcon-h1",
        "Falcon-H1",
        "FalconH1Config",
        _COMMON | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
    ),
    A("falcon-mamba", "Falcon Mamba", "FalconMambaConfig", _MAMBA),
    A("flex-olmo", "FlexOlmo", "FlexOlmoConfig", _COMMON | _EXPERTS),
    A("gemma", "Gemma", "GemmaConfig", _COMMON | _HEAD),
    A("gemma2", "Gemma 2", "Gemma2Config", _COMMON | _GEMMA),
    A("gemma3", "Gemma 3", "Gemma3TextConfig", _COMMON | _GEMMA | _MIXED),
    A(
        "gemma3n",
        "Gemma 3n",
        "Gemma3nTextConfig",
        _COMMON
        | _HEAD
        | _MIXED
        | {
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 2,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
            "pad_token_id": 0,
        },
    ),
    # Its full layers keep their head_dim of 512: every published checkpoint has it.
    A(
        "gemma4",
        "Gemma 4",
        "Gemma4TextConfig",
        _COMMON
        | _HEAD
        | _MIXED
        | {
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "hidden_size_per_layer_input": 16,
            "pad_token_id": 0,
        },
    ),
    A("glm", "GLM", "GlmConfig", _COMMON | _HEAD),
    A("glm4", "GLM-4", "Glm4Config", _COMMON | _HEAD),
    A("glm4-moe", "GLM-4.5 (MoE)", "Glm4MoeConfig", _COMMON | _HEAD | _ROUTED),
    A(
        "glm4-moe-lite",
        "GLM-4 MoE lite",
        "Glm4MoeLiteConfig",
        _COMMON | _ROUTED | _LATENT | _MLP_TYPES,
    ),
    A(
        "glm-moe-dsa",
        "GLM-5 (MoE)",
        "GlmMoeDsaConfig",
        _COMMON | _ROUTED | _LATENT | _INDEXER | _MLP_TYPES,
    ),
    A("gpt2", "GPT-2", "GPT2Config", _GPT2),
    A("gpt-bigcode", "GPTBigCode", "GPTBigCodeConfig", _GPT2),
    A("gptj", "GPT-J", "GPTJConfig", _GPT2 | {"rotary_dim": 8}),
    A(
        "gpt-neo",
        "GPT-Neo",
        "GPTNeoConfig",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "max_position_embeddings": 128,
            "window_size": WINDOW,
        },
    ),
    A("gpt-neox", "GPT-NeoX", "GPTNeoXConfig", _NO_GROUPS),
    A(
        "gpt-oss",
        "gpt-oss",
        "GptOssConfig",
        _COMMON | _LOCAL_EXPERTS | _HEAD | _SLIDING | {"rope_parameters": _ROPE},
    ),
    A("granite", "Granite", "GraniteConfig", _COMMON),
    A("granitemoe", "Granite MoE", "GraniteMoeConfig", _COMMON | _LOCAL_EXPERTS),
    A(
        "granitemoehybrid",
        "Granite MoE hybrid",
        "GraniteMoeHybridConfig",
        _COMMON
        | _LOCAL_EXPERTS
        | {"mamba_n_heads": 8, "mamba_d_head": 16, "layer_types": ["mamba", "attention"] * 2},
    ),
    A(
        "granitemoeshared",
        "Granite MoE, shared expert",
        "GraniteMoeSharedConfig",
        _COMMON | _LOCAL_EXPERTS | {"shared_intermediate_size": 32},
    ),
    A("helium", "Helium", "HeliumConfig", _COMMON | _HEAD),
    A("hunyuan", "HunYuan dense", "HunYuanDenseV1Config", _COMMON | _HEAD),
    A(
        "hunyuan-moe",
        "HunYuan MoE",
        "HunYuanMoEV1Config",
        _COMMON | _HEAD | {"num_experts": 4, "moe_topk": 2},
    ),
    A("jais2", "Jais 2", "Jais2Config", _COMMON),
    A(
        "jamba",
        "Jamba",
        "JambaConfig",
        _COMMON | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    A(
        "jetmoe",
        "JetMoE",
        "JetMoeConfig",
        _COMMON | _LOCAL_EXPERTS | {"num_attention_heads": 4, "kv_channels": 16},
    ),
    A(
        "kimi-linear",
        "Kimi Linear",
        "KimiLinearConfig",
        _COMMON
        | _LATENT
        | _MLP_TYPES
        | {
            "num_experts": 4,
            "num_experts_per_token": 2,
            "moe_intermediate_size": 32,
            "linear_num_heads": 4,
            "linear_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
    ),
    A("lfm2", "LFM2", "Lfm2Config", _COMMON | {"layer_types": ["conv", "full_attention"] * 2}),
    A("llama", "LLaMA", "LlamaConfig", _COMMON),
    A(
        "llama4",
        "Llama 4",
        "Llama4TextConfig",
        _COMMON
        | _HEAD
        | {"intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": 32},
    ),
    A(
        "longcat-flash",
        "LongCat-Flash",
        "LongcatFlashConfig",
        _NO_GROUPS
        | _LATENT
        | {
            "head_dim": 8,
            "num_layers": 2,
            "num_hidden_layers": 4,
            "ffn_hidden_size": 64,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
        },
    ),
    A("mamba", "Mamba", "MambaConfig", _MAMBA),
    A(
        "mamba2",
        "Mamba 2",
        "Mamba2Config",
        _MAMBA | {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    ),
    A("marian", "Marian decoder", "MarianConfig", _BART, "MarianForCausalLM"),
    A(
        "mimo-v2-flash",
        "MiMo-V2-Flash",
        "MiMoV2FlashConfig",
        _COMMON
        | _ROUTED
        | _MIXED
        | _MLP_TYPES
        | {"head_dim": 24, "v_head_dim": 16, "attention_value_scale": 0.7},
    ),
    A(
        "minicpm3",
        "MiniCPM3",
        "MiniCPM3Config",
        _COMMON | _LATENT | {"head_dim": 8, "dim_model_base": 64},
    ),
    A(
        "minimax",
        "MiniMax-01",
        "MiniMaxConfig",
        _COMMON | _LOCAL_EXPERTS | {"layer_types": ["linear_attention", "full_attention"] * 2},
    ),
    A("minimax-m2", "MiniMax-M2", "MiniMaxM2Config", _COMMON | _HEAD | _LOCAL_EXPERTS),
    A("ministral", "Ministral", "MinistralConfig", _COMMON | _HEAD | _MIXED),
    A("ministral3", "Ministral 3", "Ministral3Config", _COMMON | _HEAD | {"sliding_window": None}),
    A("mistral", "Mistral", "MistralConfig", _COMMON | _SLIDING),
    A("mixtral", "Mixtral", "MixtralConfig", _COMMON | _LOCAL_EXPERTS),
    A(
        "modernbert-decoder",
        "ModernBERT decoder",
        "ModernBertDecoderConfig",
        _NO_GROUPS
        | {"local_attention": 2 * WINDOW}
        | {f"{name}_token_id": idx for idx, name in enumerate(("pad", "bos", "eos", "cls", "sep"))},
    ),
    A(
        "mpt",
        "MPT",
        "MptConfig",
        {"vocab_size": VOCAB_SIZE, "d_model": 64, "n_layers": 4, "n_heads": 4},
    ),
    A("nanochat", "nanochat", "NanoChatConfig", _COMMON),
    A("nemotron", "Nemotron", "NemotronConfig", _COMMON),
    A(
        "nemotron-h",
        "Nemotron-H",
        "NemotronHConfig",
        {name: value for name, value in _COMMON.items() if name != "num_hidden_layers"}
        | _HEAD
        | _ROUTED
        | {
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "moe_shared_expert_intermediate_size": 32,
        },
    ),
    A("olmo", "OLMo", "OlmoConfig", _COMMON),
    A("olmo2", "OLMo 2", "Olmo2Config", _COMMON),
    A("olmo3", "OLMo 3", "Olmo3Config", _COMMON | _MIXED),
    A("olmoe", "OLMoE", "OlmoeConfig", _COMMON | _EXPERTS),
    A(
        "openai-gpt",
        "OpenAI GPT",
        "OpenAIGPTConfig",
        {name: value for name, value in _GPT2.items() if name not in _IDS},
    ),
    A("opt", "OPT", "OPTConfig", _OPT),
    A("persimmon", "Persimmon", "PersimmonConfig", _NO_GROUPS),
    A("phi", "Phi", "PhiConfig", _COMMON),
    A("phi3", "Phi-3", "Phi3Config", _COMMON | _SLIDING),
    A("phimoe", "Phi-3.5-MoE", "PhimoeConfig", _COMMON | _LOCAL_EXPERTS),
    A("qwen2", "Qwen2", "Qwen2Config", _COMMON),
    A(
        "qwen2-moe",
        "Qwen2-MoE",
        "Qwen2MoeConfig",
        _COMMON | _EXPERTS | {"shared_expert_intermediate_size": 32},
    ),
    A("qwen3", "Qwen3", "Qwen3Config", _COMMON | _HEAD),
    A("qwen3-moe", "Qwen3-MoE", "Qwen3MoeConfig", _COMMON | _HEAD | _EXPERTS),
    A(
        "qwen3-next",
        "Qwen3-Next",
        "Qwen3NextConfig",
        _COMMON | _HEAD | _EXPERTS | _LINEAR | {"shared_expert_intermediate_size": 32},
    ),
    A("qwen3.5", "Qwen3.5", "Qwen3_5TextConfig", _COMMON | _HEAD | _LINEAR),
    A("recurrent-gemma", "RecurrentGemma", "RecurrentGemmaConfig", _COMMON | {"lru_width": 64}),
    A(
        "rwkv",
        "RWKV",
        "RwkvConfig",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "attention_hidden_size": 64,
            "num_hidden_layers": 2,
            "context_length": 128,
        },
    ),
    A("seed-oss", "Seed-OSS", "SeedOssConfig", _COMMON | _HEAD),
    A("smollm3", "SmolLM3", "SmolLM3Config", _COMMON),
    A("solar-open", "Solar Open", "SolarOpenConfig", _COMMON | _HEAD | _ROUTED),
    A("stablelm", "StableLM", "StableLmConfig", _COMMON),
    A("starcoder2", "StarCoder2", "Starcoder2Config", _COMMON | _SLIDING),
    A(
        "t5",
        "T5",
        "T5Config",
        {
            "vocab_size": VOCAB_SIZE,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
        },
        "T5ForConditionalGeneration",
    ),
    A("vaultgemma", "VaultGemma", "VaultGemmaConfig", _COMMON | _GEMMA),
    A(
        "xglm",
        "XGLM",
        "XGLMConfig",
        {
            "vocab_size": VOCAB_SIZE,
            "d_model": 64,
            "ffn_dim": 64,
            "num_layers": 4,
            "attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    A("xlstm", "xLSTM", "xLSTMConfig", {**_MAMBA, "num_heads": 4}),
    A("youtu", "Youtu-LLM", "YoutuConfig", _COMMON | _LATENT),
    A(
        "zamba2",
        "Zamba2",
        "Zamba2Config",
        _COMMON | {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_mem_blocks": 1},
    ),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one architecture.

    Attributes:
        architecture: which.
        outcome: ``ADMITTED``, ``REFUSED``, ``MISSING`` (from transformers) or ``ERROR`` (of this
            script, or of an engine that raised where it should have refused).
        model_class: the class that was built; "" if none was.
        layer_types: ``full``, ``sliding`` or both; "" unless admitted.
        notes: what is special about its attention; "" unless admitted.
        is_fused: whether the fused decoder computes it on the CPU.
        sharding: what several ranks share of it; "" where it runs on one only.
        check: the probe's check that failed; "" unless refused.
        reason: the refusal's text, or the error's; "" if admitted.
    """

    architecture: Architecture
    outcome: str
    model_class: str = ""
    layer_types: str = ""
    notes: str = ""
    is_fused: bool = False
    sharding: str = ""
    check: str = ""
    reason: str = ""


def build_model(architecture: Architecture) -> Any:
    """The tiny model, with seeded random weights, in eval mode."""
    config = getattr(hf, architecture.config_class)(**architecture.settings)
    torch.manual_seed(0)
    if architecture.model_class is not None:
        return getattr(hf, architecture.model_class)(config).eval()
    return hf.AutoModelForCausalLM.from_config(config).eval()


def examine(architecture: Architecture) -> Verdict:
    """Build one architecture and put it through the load probe. Never raises ``Exception``."""
    if not hasattr(hf, architecture.config_class):
        return Verdict(architecture, MISSING)
    with warnings.catch_warnings():
        # Tiny models make transformers warn about sizes and missing kernels.
        warnings.simplefilter("ignore")
        try:
            model = build_model(architecture)
        except Exception as error:
            return _error(architecture, "error of this page's script, building", error)
        return _probe(architecture, model)


def _probe(architecture: Architecture, model: Any) -> Verdict:
    model_class = type(model).__name__
    try:
        with LLMEngine(model, config=EngineConfig(max_num_seqs=2)) as engine:
            layers = engine.backend.config.layers
            is_fused = engine.fused_refusal is None
            calls = _attention_calls(model)
    except UnsupportedModelError as error:
        return Verdict(
            architecture, REFUSED, model_class, check=error.check, reason=str(error.reason)
        )
    except Exception as error:
        # Not a refusal: the probe should have said no, or the engine is broken.
        return _error(architecture, "error of the engine, probing", error)
    return Verdict(
        architecture,
        ADMITTED,
        model_class,
        _layer_types(layers),
        _notes(model, layers, calls),
        is_fused,
        _sharding(model),
    )


def _sharding(model: Any) -> str:
    """What two ranks share, by the check that is made before any is started."""
    try:
        check_shardable("", model.config, 2)
    except UnsupportedModelError:
        return ""
    return "weights" if has_whole_heads(sharding_plan("", model.config)) else "weights, KV"


def _error(architecture: Architecture, whose: str, error: Exception) -> Verdict:
    return Verdict(architecture, ERROR, reason=f"{whose}: {type(error).__name__}: {error}")


@torch.inference_mode()
def _attention_calls(model: Any) -> list[AttentionCall]:
    """What each layer of an admitted model asks of attention: seen, not read from its config."""
    calls: list[AttentionCall] = []

    def record(call: AttentionCall) -> torch.Tensor:
        calls.append(call)
        return call.query.new_zeros(*call.query.shape[:2], call.value.shape[2])

    token_ids = torch.tensor([[1, 2, 3]])
    with attention_through(record):
        model(input_ids=token_ids, position_ids=torch.arange(3).unsqueeze(0), use_cache=False)
    return calls


def _layer_types(layers: Sequence[LayerKVSpec]) -> str:
    return ", ".join(sorted({"full" if layer.window is None else "sliding" for layer in layers}))


def _notes(model: Any, layers: Sequence[LayerKVSpec], calls: Sequence[AttentionCall]) -> str:
    notes = []
    head_dims = sorted({(layer.k_head_dim, layer.v_head_dim) for layer in layers})
    if any(k_head_dim != v_head_dim for k_head_dim, v_head_dim in head_dims):
        notes.append("K and V head_dim differ")
    if len(head_dims) > 1 or len({layer.num_kv_heads for layer in layers}) > 1:
        notes.append("KV shape differs between layers")
    if getattr(model.config, "kv_lora_rank", None) is not None:
        notes.append("latent attention, cached expanded")
    if getattr(model.config, "num_kv_shared_layers", 0):
        notes.append("layers that share KV each cache it")
    if any(call.key.shape[1] == 1 < call.query.shape[1] for call in calls):
        notes.append("one KV head")
    if any(call.sinks is not None for call in calls):
        notes.append("sinks")
    if any(call.softcap for call in calls):
        notes.append("soft-cap")
    return ", ".join(notes)


def examine_all(
    architectures: Iterable[Architecture], on_done: Callable[[Verdict], None]
) -> list[Verdict]:
    """Verdicts in the order of their names."""
    verdicts = []
    for architecture in sorted(architectures, key=lambda item: item.name.casefold()):
        verdicts.append(examine(architecture))
        on_done(verdicts[-1])
    return verdicts


def token_exact_keys() -> set[str]:
    """Architectures that the test suite holds token-exact: its list, read without running it."""
    for node in ast.parse(TOKEN_EXACT_TESTS.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODELS":
            return set(ast.literal_eval(node.value))
    raise ValueError(f"{TOKEN_EXACT_TESTS.name} has no list MODELS")


def render(verdicts: Sequence[Verdict]) -> str:
    """The page."""
    sections = [_intro(), _admitted_section(verdicts), _refused_section(verdicts)]
    if any(verdict.outcome in (MISSING, ERROR) for verdict in verdicts):
        sections.append(_unknown_section(verdicts))
    return "\n".join(sections)


def _intro() -> str:
    paragraphs = (
        f"<!-- Written by `{COMMAND}`; do not edit. -->",
        "No list decides what the engine loads: the load probe does. At load it checks that every "
        "layer calls attention once, in order, through transformers' AttentionInterface; that "
        "heads, head_dim and sliding windows are what the config declares; and that two sequences "
        "packed into one batch, in two steps over a real KV cache, give the logits that the model "
        "gives for each alone under its own eager attention. What fails is refused with "
        "`UnsupportedModelError`, which names the check.",
        "Below is the probe's verdict on a tiny seeded random model of each architecture. An "
        "architecture that is not here is probed at load in the same way, and so is every "
        "checkpoint of one that is: settings of its own, such as a head_dim that is not a "
        "multiple of 8, can still get it refused.",
        f"{VERSION_LINE}{hf.__version__}.",
        f"`{COMMAND}` writes this page; with `--check` it tells whether the page is up to date.",
    )
    return "\n".join(["# Supported models", "", *(f"{text}\n" for text in paragraphs)])


def _admitted_section(verdicts: Sequence[Verdict]) -> str:
    exact = token_exact_keys()
    rows = [
        (
            verdict.architecture.name,
            f"`{verdict.model_class}`",
            verdict.layer_types,
            verdict.notes,
            "yes" if verdict.is_fused else "",
            verdict.sharding,
            "yes" if verdict.architecture.key in exact else "",
        )
        for verdict in verdicts
        if verdict.outcome == ADMITTED
    ]
    intro = (
        "Layers are full or sliding as seen at the attention function, with the settings of the "
        "tiny model. Fused: on the CPU in float32 one native loop over the layers computes in the "
        "place of the model's own forward pass ([architecture](architecture.md)). Sharded: what "
        "the ranks of `tensor_parallel_size` divide among them under transformers' tensor parallel "
        "plan; where that is the weights alone, each rank holds K and V of all heads. The test "
        "suite holds the logits of two ranks equal to those of one. Token-exact: the test suite "
        "holds what the engine writes equal to `model.generate()`, token for token, over ragged "
        "batches.\n"
    )
    header = (
        *("Architecture", "Model class", "Layers", "Notes"),
        *("Fused", "Sharded", "Token-exact in tests"),
    )
    return "\n".join([f"## Admitted ({len(rows)})", "", intro, _table(header, rows)])


def _refused_section(verdicts: Sequence[Verdict]) -> str:
    rows = [
        (
            verdict.architecture.name,
            f"`{verdict.model_class}`",
            verdict.check,
            _reason_cell(verdict.reason),
        )
        for verdict in verdicts
        if verdict.outcome == REFUSED
    ]
    header = ("Architecture", "Model class", "Failed check", "Reason")
    return "\n".join([f"## Refused ({len(rows)})", "", _table(header, rows)])


def _unknown_section(verdicts: Sequence[Verdict]) -> str:
    """Neither admitted nor refused, so that nobody takes a gap for a verdict."""
    rows = []
    intro = "Neither admitted nor refused.\n"
    for verdict in verdicts:
        if verdict.outcome == MISSING:
            reason = f"transformers has no {verdict.architecture.config_class}"
            rows.append((verdict.architecture.name, reason))
        elif verdict.outcome == ERROR:
            rows.append((verdict.architecture.name, _reason_cell(verdict.reason)))
    header = ("Architecture", "Why")
    return "\n".join([f"## No verdict ({len(rows)})", "", intro, _table(header, rows)])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _reason_cell(reason: str) -> str:
    text = textwrap.shorten(reason, MAX_REASON_CHARS, placeholder=" …")
    for char in "|<*`":  # each would be markup
        text = text.replace(char, f"\\{char}")
    return text


def page_diff(committed: str, fresh: str) -> str:
    """Unified diff of two pages, "" if they differ in nothing but the transformers version."""
    lines = [
        [line for line in page.splitlines() if not line.startswith(VERSION_LINE)]
        for page in (committed, fresh)
    ]
    return "\n".join(difflib.unified_diff(*lines, "committed", "fresh", n=1, lineterm=""))


def _report(verdicts: Sequence[Verdict], console: Console) -> None:
    names: dict[str, list[str]] = {ADMITTED: [], REFUSED: [], MISSING: [], ERROR: []}
    for verdict in verdicts:
        names[verdict.outcome].append(verdict.architecture.name)
        if verdict.outcome == ERROR:
            text = f"{verdict.architecture.name}: {verdict.reason}"
            console.print(text, markup=False, soft_wrap=True)
    console.print(
        ", ".join(f"{len(names[outcome])} {outcome}" for outcome in names if names[outcome])
    )
    if names[MISSING]:
        console.print(f"not in transformers {hf.__version__}: {', '.join(names[MISSING])}")


def _examine_with_progress(console: Console) -> list[Verdict]:
    columns = (TextColumn("Probing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    name = TextColumn("{task.description}")
    with Progress(*columns, name, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(ARCHITECTURES))

        def on_done(verdict: Verdict) -> None:
            progress.update(task, advance=1, description=verdict.architecture.name)

        return examine_all(ARCHITECTURES, on_done)


def main(
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Write nothing; print a diff and exit 1 if the page is out of date. The line "
            "with the transformers version is not compared.",
        ),
    ] = False,
    page: Annotated[
        Path, typer.Option(help="The page, relative to the root of the repository.")
    ] = PAGE,
) -> None:
    """Probe a tiny random model of each architecture and write docs/supported-models.md.

    Exits 2 after writing a page on which an error took the place of a verdict.
    """
    console = Console(stderr=True, highlight=False)
    hf.logging.set_verbosity_error()
    torch.set_num_threads(1)  # products this small only lose time to a second thread
    verdicts = _examine_with_progress(console)
    _report(verdicts, console)
    path, fresh = ROOT / page, render(verdicts)
    if check:
        diff = page_diff(path.read_text() if path.exists() else "", fresh)
        if diff:
            print(diff)
            console.print(f"{page} is out of date; run: {COMMAND}")
            raise typer.Exit(EXIT_OUT_OF_DATE)
        return
    path.write_text(fresh)
    if any(verdict.outcome == ERROR for verdict in verdicts):
        raise typer.Exit(EXIT_SCRIPT_ERROR)


if __name__ == "__main__":
    typer.run(main)
