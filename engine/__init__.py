"""Continuous batching for Hugging Face decoders over a vmalloc KV cache.

Owns: the engine's public names, and the config and stats types that a server may use.
Thread-safety: see each class.
"""

import os
import sys

if __name__ != "vmalloc.engine":
    raise ImportError("import vmalloc.engine instead: a second copy of the engine is a bug")

if "torch" not in sys.modules:
    # libgomp reads this when torch loads it. Its workers spin between products by default, which
    # slows a step down more than tenfold on a small machine that does anything else besides.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")

from ..backend import KVCacheStats, PrefixCacheStats
from ..config import KVCacheConfig, LayerKVSpec
from ..errors import ConfigError, VmallocError
from ..page_map import PAGE_KINDS, PageMap, PageRun, SlotPages
from .async_engine import AsyncLLMEngine, EngineRequest, EngineState
from .config import EngineConfig
from .engine_thread import EngineSnapshot
from .errors import (
    EngineUnavailableError,
    QueueFullError,
    RankLostError,
    RankMismatchError,
    RequestAbortedError,
    RequestTimeoutError,
    UnsupportedModelError,
)
from .llm import LLM
from .llm_engine import LLMEngine
from .loading import load_engine
from .outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from .request_stream import RequestStream
from .sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from .schedule import SchedulerStats
from .startup import StartupPhase, StartupPhases
from .tensor_parallel.rank_report import RankReport, page_map_of_all, stats_of_all
from .token_counts import STEP_TOKEN_BOUNDS, TokenStats

__all__ = [
    "LLM",
    "PAGE_KINDS",
    "STEP_TOKEN_BOUNDS",
    "AsyncLLMEngine",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "EngineRequest",
    "EngineSnapshot",
    "EngineState",
    "EngineUnavailableError",
    "KVCacheConfig",
    "KVCacheStats",
    "LLMEngine",
    "LayerKVSpec",
    "Logprob",
    "PageMap",
    "PageRun",
    "PrefixCacheStats",
    "QueueFullError",
    "RankLostError",
    "RankMismatchError",
    "RankReport",
    "RequestAbortedError",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "RequestStream",
    "RequestTimeoutError",
    "SamplingParams",
    "SchedulerStats",
    "SlotPages",
    "StartupPhase",
    "StartupPhases",
    "StructuredOutputsParams",
    "TokenStats",
    "UnsupportedModelError",
    "VmallocError",
    "load_engine",
    "page_map_of_all",
    "stats_of_all",
]
