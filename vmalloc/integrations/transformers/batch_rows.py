"""The rows of a batch over all its layers, whatever devices they are on.

Owns: the ``DeviceRows``, how many rows and tokens they hold, and what each layer stores.
Thread-safety: none; the thread that runs the model.

What a layer stores is known when it first brings something. The first layer speaks for all; if a
later one differs, the rows are laid out anew and what the first ones had written is copied, once.
The same happens when rows or tokens pass what was reserved, unless somebody named a limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...backend import KVCacheStats
from ...errors import ClosedError, ConfigError, VmallocError
from .device_rows import DeviceRows
from .errors import CacheFullError
from .shapes import MAX_RESERVED_BYTES, LayerShape

_DEFAULT_MAX_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSettings:
    """What the user said; see ``VirtualCache``. ``max_len`` is the model's if nobody said."""

    max_len: int
    max_batch: int | None = None
    is_max_len_given: bool = False
    capacity_bytes: int | None = None
    page_bytes: int | None = None
    layers_per_group: int | None = None
    commit_ahead_tokens: int | None = None


class BatchRows:
    """Rows of keys and values for the layers ``layer_idxs``."""

    def __init__(self, layer_idxs: Sequence[int], settings: RowSettings) -> None:
        self.settings = settings
        self.batch = 0
        self.num_tokens = 0
        self._layer_idxs = tuple(layer_idxs)
        self._known: dict[int, LayerShape] = {}
        self._expected: dict[int, LayerShape] = {}
        self._devices: dict[torch.device, DeviceRows] = {}
        self._max_batch = self._max_len = 0
        self._reserved: tuple[int, int] | None = None
        self._shared_tokens = 0  # what was written before rows were last selected
        self._is_closed = False

    @property
    def max_len(self) -> int:
        return self._max_len or self.settings.max_len

    @property
    def is_max_len_said(self) -> bool:
        return self.settings.is_max_len_given or self._reserved is not None

    @property
    def is_max_batch_said(self) -> bool:
        return self.settings.max_batch is not None or self._reserved is not None

    @property
    def reserved(self) -> tuple[int, int] | None:
        """``max_batch`` and ``max_len`` of the last ``reserve()``."""
        return self._reserved

    @property
    def is_laid_out(self) -> bool:
        """Whether address space is reserved: what the layers store is known."""
        return bool(self._devices)

    def bind(self, layer_idx: int, shape: LayerShape) -> None:
        """Say what a layer stores, before its first update."""
        self._check_open()
        if self._expected.get(layer_idx) != shape:
            if self.num_tokens == 0:
                self._known.clear()
            expected = {idx: self._known.get(idx, shape) for idx in self._layer_idxs}
            if self._devices:
                self._lay_out(expected, self._max_batch, self._max_len)
            self._expected = expected
        self._known[layer_idx] = shape

    def extend(self, batch: int, num_tokens: int, first: int | None = None) -> None:
        """Back so many tokens of so many rows; nothing happens if they are.

        ``first``: the first token that will be written.

        Raises:
            CacheFullError: pages or tokens run out; nothing has changed.
            ConfigError: the rows are of another batch, or too many.
        """
        self._check_open()
        if batch != self.batch and self.num_tokens > 0:
            raise ConfigError(
                f"the batch has {batch} rows; the cache holds {self.num_tokens} tokens of "
                f"{self.batch} rows: reset() it, or use batch_select_indices()"
            )
        if first is not None and first < self._shared_tokens:
            raise VmallocError(
                f"token {first} would be written anew; rows may share the first "
                f"{self._shared_tokens} tokens: crop() the cache first"
            )
        if num_tokens <= self.num_tokens and batch == self.batch:
            return
        self._make_place(batch, num_tokens)
        extended: list[DeviceRows] = []
        for rows in self._devices.values():
            if not rows.try_extend(batch, num_tokens):
                for other in extended:
                    other.cut(batch, self.num_tokens)
                raise self._full(rows, f"{num_tokens} tokens of {batch} rows")
            extended.append(rows)
        self.batch, self.num_tokens = batch, num_tokens

    def views(self, layer_idx: int, num_tokens: int, first: int = 0) -> list[Tensor]:
        """Keys and values ``[batch, num_kv_heads, tokens, head_dim]``, never copied."""
        self._check_open()
        rows = self._devices[self._known[layer_idx].device]
        return rows.views(layer_idx, self.batch, num_tokens, first)

    def cut(self, num_tokens: int) -> None:
        """Drop the tokens from ``num_tokens`` on; with 0 the batch may be another one next."""
        self._check_open()
        if num_tokens < self.num_tokens:
            for rows in self._devices.values():
                rows.cut(self.batch, num_tokens)
            self.num_tokens = num_tokens
            self._shared_tokens = min(self._shared_tokens, num_tokens)
        if num_tokens == 0:
            for rows in self._devices.values():
                rows.end_step()
            self.batch = 0

    def select(self, sources: Sequence[int]) -> None:
        """Let row ``i`` be what row ``sources[i]`` is now, sharing whole pages.

        Raises:
            CacheFullError: pages are short; nothing has changed.
            ConfigError: there is no such row, or they are too many.
        """
        self._check_open()
        for source in sources:
            if not 0 <= source < self.batch:
                raise ConfigError(f"row {source} is asked for; the cache has {self.batch} rows")
        if list(sources) == list(range(self.batch)):
            return
        if len(sources) > self._max_batch:
            if self.is_max_batch_said:
                raise ConfigError(
                    f"{len(sources)} rows are asked for; max_batch is {self._max_batch}: give "
                    "VirtualCache(max_batch=...) or call reserve() first"
                )
            self._lay_out(self._expected, 2 * len(sources), self._max_len)
        done: list[DeviceRows] = []
        for rows in self._devices.values():
            if not rows.try_select(self.batch, sources, self.num_tokens):
                if done:  # the rows of those are gone; what is left is not one batch any more
                    self.cut(0)
                    raise self._full(rows, f"{len(sources)} rows; the cache was emptied")
                raise self._full(rows, f"{len(sources)} rows of {self.num_tokens} tokens")
            done.append(rows)
        self.batch = len(sources)
        self._shared_tokens = self.num_tokens

    def reserve(self, max_batch: int, max_len: int) -> None:
        """Take address space for so many rows of so many tokens.

        Raises:
            ConfigError: the cache holds tokens, or a number is not positive.
        """
        self._check_open()
        if self.num_tokens > 0:
            raise ConfigError(
                f"the cache holds {self.num_tokens} tokens; reserve() comes before the first, or "
                "after reset()"
            )
        for name, value in (("max_batch", max_batch), ("max_len", max_len)):
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")
        if self._devices:
            self._lay_out(self._expected, max_batch, max_len)
        self._max_batch, self._max_len = self._reserved = (max_batch, max_len)

    def stats(self) -> dict[str, KVCacheStats]:
        return {str(device): rows.stats() for device, rows in self._devices.items()}

    def trim(self) -> int:
        self._check_open()
        return sum(rows.trim() for rows in self._devices.values())

    def check_invariants(self) -> None:
        for rows in self._devices.values():
            rows.check_invariants()

    def close(self) -> None:
        self._is_closed = True
        for rows in self._devices.values():
            rows.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("this VirtualCache is closed")

    def _make_place(self, batch: int, num_tokens: int) -> None:
        """Have address space for so much, or raise."""
        settings = self.settings
        max_batch, max_len = self._max_batch, self._max_len
        if not max_batch:
            max_len = settings.max_len
            max_batch = settings.max_batch or self._roomy_batch(batch, max_len)
        # Nobody said so much would do: take more, with room to spare, for what is there moves.
        if batch > max_batch and not self.is_max_batch_said:
            max_batch = 2 * batch
        if num_tokens > max_len and not self.is_max_len_said:
            max_len = 2 * num_tokens
        if batch > max_batch:
            raise ConfigError(
                f"the batch has {batch} rows; max_batch is {max_batch}: give "
                "VirtualCache(max_batch=...) or call reserve() first"
            )
        if num_tokens > max_len:
            raise CacheFullError(
                f"no room for {num_tokens} tokens: max_len is {max_len}, and the cache holds "
                f"{self.num_tokens}; give VirtualCache(max_len=...) or call reserve() first"
            )
        if (max_batch, max_len) != (self._max_batch, self._max_len) or not self._devices:
            self._lay_out(self._expected, max_batch, max_len)

    def _roomy_batch(self, batch: int, max_len: int) -> int:
        row_bytes = sum(shape.spec.token_bytes for shape in self._expected.values()) * max_len
        return max(batch, min(max(_DEFAULT_MAX_BATCH, 4 * batch), MAX_RESERVED_BYTES // row_bytes))

    def _lay_out(self, expected: dict[int, LayerShape], max_batch: int, max_len: int) -> None:
        """Reserve for what every layer is expected to store; what some have stored moves along."""
        shapes_of: dict[torch.device, dict[int, LayerShape]] = {}
        for layer_idx, shape in expected.items():
            shapes_of.setdefault(shape.device, {})[layer_idx] = shape
        settings = self.settings
        new: dict[torch.device, DeviceRows] = {}
        try:
            for device, shapes in shapes_of.items():
                new[device] = DeviceRows(
                    shapes,
                    max_batch=max_batch,
                    max_len=max_len,
                    capacity_bytes=settings.capacity_bytes,
                    page_bytes=settings.page_bytes,
                    layers_per_group=settings.layers_per_group,
                    commit_ahead_tokens=settings.commit_ahead_tokens,
                )
            if self.num_tokens > 0:
                self._copy_to(new)
        except BaseException:  # whoever keeps the exception would keep the pages
            for rows in new.values():
                rows.close()
            raise
        # The old rows go with the last view of them: an earlier layer's attention may have one.
        self._devices = new
        self._max_batch, self._max_len = max_batch, max_len
        self._shared_tokens = 0

    def _copy_to(self, new: dict[torch.device, DeviceRows]) -> None:
        for rows in new.values():
            if not rows.try_extend(self.batch, self.num_tokens):
                raise self._full(
                    rows,
                    f"{self.num_tokens} tokens of {self.batch} rows a second time, to move them "
                    "where there is room: give VirtualCache(max_batch=..., max_len=...)",
                )
        for layer_idx, shape in self._known.items():
            place = (layer_idx, self.batch, self.num_tokens)
            old = self._devices[shape.device].views(*place)
            for to, source in zip(new[shape.device].views(*place), old, strict=True):
                to.copy_(source)

    def _full(self, rows: DeviceRows, what: str) -> CacheFullError:
        stats = rows.stats()
        return CacheFullError(
            f"no room for {what}: the cap is capacity_bytes={stats.capacity_bytes}, of which "
            f"{stats.committed_bytes} hold {self.num_tokens} tokens of {self.batch} rows"
        )
