"""A transformers ``Cache`` whose keys and values grow in place, in virtual memory.

Owns: the layers and the rows that they share.  Thread-safety: none; the thread that runs the model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from ...errors import ConfigError
from .batch_rows import BatchRows, RowSettings
from .errors import CacheFullError
from .layer import VirtualLayer, cropped
from .other_layers import cross_attention_layers, is_full_attention, start_over
from .shapes import context_tokens, decoder_config
from .stats import VirtualCacheStats

# Of transformers' own layers those that say how many tokens they have seen.
_COUNTING_LAYERS = (DynamicSlidingWindowLayer,)


class VirtualCache(DynamicCache):  # type: ignore[misc]
    """Drop-in for ``DynamicCache``, in ``model.generate(past_key_values=...)`` and ``forward()``.

    A token's keys and values are written once and never copied: attention gets strided views
    ``[batch, num_kv_heads, num_tokens, head_dim]`` of contiguous rows that grow as pages are mapped
    behind them. Beam search, ``batch_repeat_interleave`` and ``batch_select_indices`` share whole
    pages among rows instead of copying the cache. Layers that are not full self-attention (sliding
    windows, recurrent states, attention to an image) are those that transformers would use.

    Keys, values and everything that attention was given are views: they are good until the cache
    changes or is closed. Clone what should outlive that, and what is saved: torch saves a view with
    all the address space around it. For inference only; ``backward()`` through it raises
    ``InferenceOnlyError``.

    Args:
        config: the model's config, or the model.
        max_batch: most rows; None: room for 64 or 4 times the first batch.
        max_len: most tokens of a row; None: room for the model's maximum. Neither takes memory:
            only address space is reserved, at the first call. What passes a number that nobody
            gave is moved once to where there is more room; past one that was given is an error.
        capacity_bytes: hard cap on physical memory a device; None: what the device has.
        page_bytes: physical unit; None: 64 KiB on the CPU, the granularity (2 MiB) on CUDA.
        layers_per_group: layers whose tokens lie side by side, so that they fill pages together;
            None: 1 on the CPU, where it is fastest, all of them on CUDA.
        commit_ahead_tokens: tokens that a worker thread maps ahead; None: 0 on the CPU, 4 on CUDA.
        layers: layers for this cache, as ``DynamicCache`` made them; None: by ``config``.

    Example:
        >>> with VirtualCache(model.config) as cache:
        ...     model.generate(**inputs, past_key_values=cache, num_beams=4)

    Raises:
        ConfigError: a value can never work. Later, in use: see ``update``.
    """

    def __init__(
        self,
        config: Any,
        *,
        max_batch: int | None = None,
        max_len: int | None = None,
        capacity_bytes: int | None = None,
        page_bytes: int | None = None,
        layers_per_group: int | None = None,
        commit_ahead_tokens: int | None = None,
        layers: Sequence[Any] | None = None,
    ) -> None:
        config = decoder_config(config)
        settings = {
            "max_batch": max_batch,
            "max_len": max_len,
            "capacity_bytes": capacity_bytes,
            "page_bytes": page_bytes,
            "layers_per_group": layers_per_group,
        }
        for name, value in settings.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if commit_ahead_tokens is not None and commit_ahead_tokens < 0:
            raise ConfigError(f"commit_ahead_tokens is {commit_ahead_tokens}; it must be 0 or more")
        if layers is None:
            layers = DynamicCache(config=config).layers
        crossing = cross_attention_layers(config)
        virtual = [
            idx
            for idx, layer in enumerate(layers)
            if is_full_attention(layer) and idx not in crossing
        ]
        self._rows = BatchRows(
            virtual,
            RowSettings(
                max_len=context_tokens(config) if max_len is None else max_len,
                max_batch=max_batch,
                is_max_len_given=max_len is not None,
                capacity_bytes=capacity_bytes,
                page_bytes=page_bytes,
                layers_per_group=layers_per_group,
                commit_ahead_tokens=commit_ahead_tokens,
            ),
        )
        self._config = config
        Cache.__init__(
            self,
            layers=[
                VirtualLayer(idx, self._rows) if idx in virtual else layer
                for idx, layer in enumerate(layers)
            ],
        )

    @property
    def is_compileable(self) -> bool:
        """Nothing here is static."""
        return False

    def reserve(self, max_batch: int, max_len: int) -> None:
        """Reserve address space for so many rows of so many tokens, at most; no memory is taken.

        Without it the first call does so, with room to spare.

        Raises:
            ConfigError: the cache holds tokens already.
        """
        self._rows.reserve(max_batch, max_len)

    # A compiler that looks into the allocator is at it for minutes, and finds nothing.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add new states ``[batch, num_kv_heads, new tokens, head_dim]`` to a layer.

        Returns:
            Keys and values of all its tokens.

        Raises:
            CacheFullError: the cap, or ``max_len``, is reached. The cache is as it was before the
                forward pass (recurrent states of hybrid models, which go their own way, are not).
            ConfigError: another batch than the one that the cache holds, more rows than
                ``max_batch``, or an element type or device that vmalloc does not know.
            ClosedError: after ``close()``.
        """
        layer = self.layers[layer_idx]
        try:
            if self._rows.is_laid_out and type(layer) in _COUNTING_LAYERS:
                # All layers of a forward pass get as many tokens: ask before any of them changes.
                num_tokens = layer.get_seq_length() + key_states.shape[2]
                self._rows.extend(key_states.shape[0], num_tokens)
            keys, values = layer.update(key_states, value_states, *args, **kwargs)
        except CacheFullError:
            if self._num_tokens() == 0:  # the first pass: layers of other kinds may have begun
                self.reset()
            raise
        return keys, values

    def reset(self) -> None:
        """Forget all tokens; their pages stay for the next ones, see ``trim``."""
        self._rows.cut(0)
        for layer in self.layers:
            layer.reset()
            start_over(layer)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens.

        Raises:
            ValueError: a positive number, which transformers does not take any more (up to 5.17 it
                is the length to keep).
            RuntimeError: a layer of another kind has forgotten what would be needed.
        """
        num_tokens = cropped(self._rows.num_tokens, tokens_to_remove)
        for layer in self._other_layers():  # first, because they may refuse
            layer.crop(tokens_to_remove)
        for layer in self.layers:
            if isinstance(layer, VirtualLayer):
                layer.forget(num_tokens)
        if num_tokens < self._rows.num_tokens:
            self._rows.cut(num_tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let every row go on from the row that ``beam_idx`` names: beam search, by aliasing pages.

        Raises:
            CacheFullError: not even the partly filled pages can be copied; nothing has changed.
        """
        self._select(beam_idx.tolist())
        for layer in self._other_layers():
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, sharing its whole pages.

        Raises:
            ConfigError: more rows than ``max_batch``.
            CacheFullError: see ``reorder_cache``.
        """
        if repeats < 1:
            raise ConfigError(f"repeats is {repeats}; it must be at least 1")
        self._select([row for row in range(self._rows.batch) for _ in range(repeats)])
        for layer in self._other_layers():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor | Sequence[int]) -> None:
        """Keep the rows that are named (indices, or a boolean for each), in their order.

        Raises:
            ConfigError: there is no such row.
            CacheFullError: see ``reorder_cache``.
        """
        chosen = torch.as_tensor(indices)
        if chosen.dtype == torch.bool:
            chosen = chosen.nonzero().flatten()
        batch = self._rows.batch
        self._select([row + batch if row < 0 else row for row in chosen.tolist()])
        for layer in self._other_layers():
            layer.batch_select_indices(indices)

    def stats(self) -> VirtualCacheStats:
        """What the cache holds and takes; see ``VirtualCacheStats``."""
        devices = self._rows.stats()

        def total(name: str) -> int:
            return sum(int(getattr(stats, name)) for stats in devices.values())

        num_virtual = len(self.layers) - len(self._other_layers())
        return VirtualCacheStats(
            num_virtual_layers=num_virtual,
            num_other_layers=len(self.layers) - num_virtual,
            batch_size=self._rows.batch,
            num_tokens=self._rows.num_tokens,
            reserved_bytes=total("reserved_bytes"),
            capacity_bytes=total("capacity_bytes"),
            committed_bytes=total("committed_bytes"),
            peak_committed_bytes=total("peak_committed_bytes"),
            resident_bytes=sum(s.created_pages * s.page_bytes for s in devices.values()),
            logical_bytes=total("logical_bytes"),
            shared_bytes=total("shared_bytes"),
            aliased_pages=total("aliased_pages"),
            cow_copies=total("cow_copies"),
            devices=devices,
        )

    def trim(self) -> int:
        """Give pages that hold no tokens back to the system; the count."""
        return self._rows.trim()

    def check_invariants(self) -> None:
        """Raise ``InvariantError`` if the books do not balance."""
        self._rows.check_invariants()

    def close(self) -> None:
        """Give everything back, also what views of the cache show. Idempotent."""
        self._rows.close()

    def __enter__(self) -> VirtualCache:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> VirtualCache:
        """A cache of its own with the same contents: to go on from one prompt more than once."""
        settings = self._rows.settings
        twin = VirtualCache(
            self._config,
            max_batch=settings.max_batch,
            max_len=settings.max_len if settings.is_max_len_given else None,
            capacity_bytes=settings.capacity_bytes,
            page_bytes=settings.page_bytes,
            layers_per_group=settings.layers_per_group,
            commit_ahead_tokens=settings.commit_ahead_tokens,
            layers=[
                DynamicLayer() if isinstance(layer, VirtualLayer) else copy.deepcopy(layer, memo)
                for layer in self.layers
            ],
        )
        memo[id(self)] = twin
        if self._rows.reserved is not None:
            twin.reserve(*self._rows.reserved)
        for layer, other in zip(self.layers, twin.layers, strict=True):
            if isinstance(layer, VirtualLayer) and layer.get_seq_length() > 0:
                other.update(layer.keys, layer.values)
        return twin

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a VirtualCache cannot be pickled: its memory belongs to this process; copy.deepcopy() "
            "makes another one here; to save it, clone the keys and values of its layers"
        )

    def _num_tokens(self) -> int:
        """Tokens of the layer that is furthest behind: of the last whole forward pass."""
        return min(
            (layer.get_seq_length() for layer in self.layers if isinstance(layer, VirtualLayer)),
            default=0,
        )

    def _other_layers(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, VirtualLayer)]

    def _select(self, sources: list[int]) -> None:
        """Ours first: it may refuse, and then nothing may have changed."""
        if self._rows.num_tokens == 0:
            return
        try:
            self._rows.select(sources)
        except CacheFullError:
            if self._rows.num_tokens == 0:  # one of several devices had gone ahead
                self.reset()
            raise
