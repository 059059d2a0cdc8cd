"""KV-cache memory for LLM inference as virtual memory.

Address space is reserved once per sequence slot; physical pages are mapped into it on demand, so
attention kernels see one contiguous strided tensor and need no block table.

Owns: the public names below.  Thread-safety: see each class.
"""

import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING

# In a checkout, ``vmalloc`` may be found twice (the working tree, and the installed extension's
# folder): search both, so that ``vmalloc._core`` is found from wherever Python was started.
__path__ = pkgutil.extend_path(__path__, __name__)

if TYPE_CHECKING:
    from .backend import (
        MISS_REASONS,
        KVBackend,
        KVBatchBuffers,
        KVBatchView,
        KVCacheStats,
        PrefixCacheStats,
        PrefixHit,
        Reservation,
        SequenceGroupSpec,
        Step,
    )
    from .config import KVCacheConfig, LayerKVSpec
    from .elastic import ElasticTensor, elastic_tensor
    from .errors import ClosedError, ConfigError, DriverError, InvariantError, VmallocError
    from .factory import BackendChoice, choose_backend, create_kv_backend
    from .kv_cache import VirtualKVCache
    from .page_map import PAGE_KINDS, PageMap, PageRun, SlotPages
    from .paged_cache import PagedKVCache

__version__ = "0.1.0"

# Loaded on first use: ``vmalloc --help`` and the scheduler need no torch, and the command line must
# set OpenMP's environment before torch loads it.
_MODULE_OF = {
    "BackendChoice": "factory",
    "ClosedError": "errors",
    "ConfigError": "errors",
    "DriverError": "errors",
    "ElasticTensor": "elastic",
    "InvariantError": "errors",
    "KVBackend": "backend",
    "KVBatchBuffers": "backend",
    "KVBatchView": "backend",
    "KVCacheConfig": "config",
    "KVCacheStats": "backend",
    "LayerKVSpec": "config",
    "MISS_REASONS": "backend",
    "PAGE_KINDS": "page_map",
    "PageMap": "page_map",
    "PageRun": "page_map",
    "PagedKVCache": "paged_cache",
    "PrefixCacheStats": "backend",
    "PrefixHit": "backend",
    "Reservation": "backend",
    "SequenceGroupSpec": "backend",
    "SlotPages": "page_map",
    "Step": "backend",
    "VirtualKVCache": "kv_cache",
    "VmallocError": "errors",
    "choose_backend": "factory",
    "create_kv_backend": "factory",
    "elastic_tensor": "elastic",
}

__all__ = [
    "MISS_REASONS",
    "PAGE_KINDS",
    "BackendChoice",
    "ClosedError",
    "ConfigError",
    "DriverError",
    "ElasticTensor",
    "InvariantError",
    "KVBackend",
    "KVBatchBuffers",
    "KVBatchView",
    "KVCacheConfig",
    "KVCacheStats",
    "LayerKVSpec",
    "PageMap",
    "PageRun",
    "PagedKVCache",
    "PrefixCacheStats",
    "PrefixHit",
    "Reservation",
    "SequenceGroupSpec",
    "SlotPages",
    "Step",
    "VirtualKVCache",
    "VmallocError",
    "choose_backend",
    "create_kv_backend",
    "elastic_tensor",
]


def __getattr__(name: str) -> object:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
