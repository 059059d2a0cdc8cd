"""Continuous batching for Hugging Face decoders over a vmalloc KV cache.

Owns: the engine's public names, and the config and stats types that a server may use.
Thread-safety: see each class.
"""

if __name__ != "vmalloc.engine":
    raise ImportError("import vmalloc.engine instead: a second copy of the engine is a bug")

from ..backend import KVCacheStats
from ..config import KVCacheConfig, LayerKVSpec
from ..errors import ConfigError, VmallocError
from .config import EngineConfig
from .errors import UnsupportedModelError
from .llm import LLM
from .llm_engine import LLMEngine
from .outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from .sampling_params import RequestOutputKind, SamplingParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "KVCacheConfig",
    "KVCacheStats",
    "LLMEngine",
    "LayerKVSpec",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "UnsupportedModelError",
    "VmallocError",
]
