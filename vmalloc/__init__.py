"""KV-cache memory for LLM inference as virtual memory.

Address space is reserved once per sequence slot; physical pages are mapped into it on demand, so
attention kernels see one contiguous strided tensor and need no block table.

Owns: the public names below.  Thread-safety: see each class.
"""

import pkgutil

# In a checkout, ``vmalloc`` may be found twice (the working tree, and the installed extension's
# folder): search both, so that ``vmalloc._core`` is found from wherever Python was started.
__path__ = pkgutil.extend_path(__path__, __name__)

from .backend import (  # noqa: E402
    KVBackend,
    KVBatchView,
    KVCacheStats,
    Reservation,
    SequenceGroupSpec,
    Step,
)
from .config import KVCacheConfig, LayerKVSpec  # noqa: E402
from .errors import (  # noqa: E402
    ClosedError,
    ConfigError,
    DriverError,
    InvariantError,
    VmallocError,
)
from .factory import BackendChoice, choose_backend, create_kv_backend  # noqa: E402
from .kv_cache import VirtualKVCache  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "BackendChoice",
    "ClosedError",
    "ConfigError",
    "DriverError",
    "InvariantError",
    "KVBackend",
    "KVBatchView",
    "KVCacheConfig",
    "KVCacheStats",
    "LayerKVSpec",
    "Reservation",
    "SequenceGroupSpec",
    "Step",
    "VirtualKVCache",
    "VmallocError",
    "choose_backend",
    "create_kv_backend",
]
