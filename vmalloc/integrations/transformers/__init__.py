"""Hugging Face transformers over vmalloc: a cache for ``generate()``, and attention kernels.

    from vmalloc.integrations.transformers import VirtualCache, use_virtual_cache

    with VirtualCache(model.config) as cache:
        model.generate(**inputs, past_key_values=cache)

    with use_virtual_cache():  # for code that cannot be edited
        model.generate(**inputs)

Owns: the public names below.  Thread-safety: see each of them.
"""

try:
    import transformers as _transformers
except ImportError as error:
    raise ImportError(
        "vmalloc.integrations.transformers needs transformers: pip install 'transformers>=5.17,<6'"
    ) from error

if not (5, 17) <= tuple(map(int, _transformers.__version__.split(".")[:2])) < (6,):
    raise ImportError(
        f"vmalloc.integrations.transformers needs transformers>=5.17,<6; "
        f"{_transformers.__version__} is installed: pip install -U 'transformers>=5.17,<6'"
    )

from .attention import register
from .cache import VirtualCache
from .errors import CacheFullError, InferenceOnlyError
from .stats import VirtualCacheStats
from .switch import use_virtual_cache

__all__ = [
    "CacheFullError",
    "InferenceOnlyError",
    "VirtualCache",
    "VirtualCacheStats",
    "register",
    "use_virtual_cache",
]
