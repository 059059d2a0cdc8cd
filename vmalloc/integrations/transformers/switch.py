"""``generate()`` with our cache in code that one cannot edit, for as long as a block lasts.

Owns: ``GenerationMixin._prepare_cache_for_generation`` while any block is open, in the whole
process; the original is put back when the last one ends.
Thread-safety: blocks may be open in several threads at once. A block is a context variable: it
holds for what its own thread, or asyncio task, runs; others get the cache they always got.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from types import MappingProxyType
from typing import Any

from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.generation.utils import GenerationMixin

from .cache import VirtualCache
from .other_layers import is_full_attention

_CACHE_NAMES = ("past_key_values", "cache_params")

_settings: ContextVar[Mapping[str, Any] | None] = ContextVar("vmalloc_cache", default=None)
_lock = Lock()
_num_open = 0
_original: Callable[..., Any] | None = None
_wrapper: Callable[..., Any] | None = None


@contextmanager
def use_virtual_cache(**settings: Any) -> Iterator[None]:
    """Let ``generate()`` use a ``VirtualCache`` wherever it would make a ``DynamicCache`` itself.

    A cache that the caller passes, ``use_cache=False`` and any ``cache_implementation`` are left
    alone, and so is the cache of a model none of whose layers is full attention. Of an
    encoder-decoder model the self-attention cache is ours. Each call gets a cache of its own, which
    lives as long as somebody holds it (``outputs.past_key_values``) or its keys and values.

    Args:
        settings: of ``VirtualCache``: ``capacity_bytes``, ``max_batch`` and so on.
    """
    token = _settings.set(MappingProxyType(dict(settings)))
    _enter()
    try:
        yield
    finally:
        _leave()
        _settings.reset(token)


def _enter() -> None:
    global _num_open, _original, _wrapper
    with _lock:
        if _num_open == 0:
            _original = GenerationMixin._prepare_cache_for_generation
            _wrapper = GenerationMixin._prepare_cache_for_generation = _wrap(_original)
        _num_open += 1


def _leave() -> None:
    global _num_open, _original, _wrapper
    with _lock:
        _num_open -= 1
        if _num_open == 0:
            # Whoever wrapped ours meanwhile keeps it; without a block it does nothing.
            if GenerationMixin._prepare_cache_for_generation is _wrapper:
                GenerationMixin._prepare_cache_for_generation = _original
            _original = _wrapper = None


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def prepare(self: Any, generation_config: Any, model_kwargs: Any, *args: Any, **kw: Any) -> Any:
        settings = _settings.get()
        given = {name for name in _CACHE_NAMES if model_kwargs.get(name) is not None}
        result = original(self, generation_config, model_kwargs, *args, **kw)
        if settings is None or generation_config.cache_implementation not in (None, "dynamic"):
            return result
        for name in _CACHE_NAMES:
            if name not in given and model_kwargs.get(name) is not None:
                model_kwargs[name] = _replaced(model_kwargs[name], self.config, settings)
        return result

    return prepare


def _replaced(cache: Any, config: Any, settings: Mapping[str, Any]) -> Any:
    """The cache that transformers just made, its full-attention layers over our pages."""
    if type(cache) is EncoderDecoderCache:
        cache.self_attention_cache = _replaced(cache.self_attention_cache, config, settings)
    elif type(cache) is DynamicCache and any(map(is_full_attention, cache.layers)):
        return VirtualCache(config, layers=cache.layers, **settings)
    return cache
