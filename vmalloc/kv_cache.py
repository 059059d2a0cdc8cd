"""KV cache whose address space is reserved once and whose pages arrive on demand.

Owns: seq_id -> slot, and the tensor views. Page counts live in ``_core`` alone.
Thread-safety: none of its own; one engine thread. The worker thread inside ``_core`` is safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from types import TracebackType
from typing import NoReturn

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from . import _core
from .backend import KVBatchView, KVCacheStats, Reservation, SequenceGroupSpec, Step
from .config import DEFAULT_PAGE_BYTES, DTYPE_BYTES, KVCacheConfig, LayerKVSpec
from .errors import ConfigError
from .layout import KVLayout, plan_layout


class VirtualKVCache:
    """``KVBackend`` over contiguous virtual memory.

    Example:
        >>> layer = LayerKVSpec(num_kv_heads=2, k_head_dim=64, v_head_dim=64)
        >>> config = KVCacheConfig(
        ...     layers=(layer,) * 4, max_num_seqs=8, max_seq_len=2048, capacity_bytes=64 << 20
        ... )
        >>> cache = VirtualKVCache(config)
        >>> cache.try_admit(SequenceGroupSpec(seq_ids=(0,), num_tokens=100)) is not None
        True

    Raises:
        ConfigError: a value can never work; the text names it and the limit.
    """

    name = "virtual"

    def __init__(self, config: KVCacheConfig, *, driver: _core.Driver | None = None) -> None:
        """``driver``: an already made core driver, e.g. a ``FaultDriver``; else by config."""
        self._config = config
        self._driver = driver or make_driver(config)
        page_bytes = self._driver.page_bytes
        self._layout = plan_layout(config, page_bytes)
        max_pages = config.capacity_bytes // page_bytes
        self._arena = _core.KVArena(
            self._driver,
            layers=[_core_spec(layer) for layer in config.layers],
            layers_per_group=config.layers_per_group or len(config.layers),
            kv_split=config.kv_split,
            num_slots=self._layout.num_slots,
            max_rows=config.max_seq_len,
            max_pages=max_pages,
            low_pages=_low_pages(config, max_pages),
            high_pages=_high_pages(config, max_pages),
            ahead_rows=config.commit_ahead_tokens,
            lookahead_rows=config.lookahead_tokens,
            zero_on_reuse=config.zero_on_reuse or _mixes_dtypes(config),
        )
        self._slot_of: dict[int, int] = {}
        self._len_of: dict[int, int] = {}
        self._views: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def config(self) -> KVCacheConfig:
        return self._config

    @property
    def layout(self) -> KVLayout:
        """Byte offsets and strides behind the views."""
        return self._layout

    @property
    def driver_name(self) -> str:
        """``"host"`` or ``"null"``."""
        return self._driver.name

    def max_seq_tokens(self) -> int:
        return self._arena.max_slot_rows()

    def bytes_for(self, num_tokens: int) -> int:
        config = self._config
        backed = min(num_tokens + config.lookahead_tokens, config.max_seq_len) if num_tokens else 0
        return self._layout.pages_for(backed) * self._layout.page_bytes

    def can_admit(self, num_tokens: int) -> bool:
        return self._arena.can_admit(num_tokens)

    def prefetch(self, num_tokens: int) -> None:
        self._arena.prefetch(num_tokens)

    def try_admit(self, group: SequenceGroupSpec) -> Reservation | None:
        _check_num_tokens(group.num_tokens)
        for seq_id in group.seq_ids:
            if seq_id in self._slot_of:
                raise ConfigError(f"seq_id {seq_id} is live already")
        if len(set(group.seq_ids)) != len(group.seq_ids):
            raise ConfigError(f"seq_ids {group.seq_ids} name a sequence twice")
        if len(self._slot_of) + len(group.seq_ids) > self._config.max_num_seqs:
            return None
        slots = self._arena.try_admit(len(group.seq_ids), group.num_tokens)
        if slots is None:
            return None
        for seq_id, slot in zip(group.seq_ids, slots, strict=True):
            self._slot_of[seq_id] = slot
            self._len_of[seq_id] = group.num_tokens
        return Reservation(seq_ids=group.seq_ids, slots=tuple(slots))

    def try_extend(self, seq_ids: Sequence[int], num_tokens: Sequence[int]) -> bool:
        if not self._arena.try_extend(self._slots(seq_ids), num_tokens):
            return False
        self._len_of.update(zip(seq_ids, num_tokens, strict=True))
        return True

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        _check_num_tokens(num_tokens)
        self._arena.truncate(self._slots((seq_id,))[0], num_tokens)
        self._len_of[seq_id] = num_tokens

    def free(self, seq_ids: Sequence[int]) -> None:
        self._arena.free(self._slots(seq_ids))
        for seq_id in seq_ids:
            del self._slot_of[seq_id], self._len_of[seq_id]

    def begin_step(self, stream: int | None = None) -> Step:
        return Step(epoch=self._arena.begin_step(), stream=stream or 0)

    def end_step(self, step: Step) -> None:
        self._arena.end_step(step.epoch, step.stream)

    def layer_views(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer over all slots, as strided views.

        Reading a row that is not backed gives zeros on the host driver; writing it ends the
        process with SIGSEGV.

        Returns:
            Two tensors ``[num_slots, max_seq_len, num_kv_heads, head_dim]``.
        """
        views = self._views.get(layer_idx)
        if views is None:
            views = self._views[layer_idx] = self._make_views(layer_idx)
        return views

    def batch_view(self, seq_ids: Sequence[int], num_new_tokens: Sequence[int]) -> KVBatchView:
        slots = self._slots(seq_ids)
        lens = [self._len_of[seq_id] for seq_id in seq_ids]
        cu_seqlens = [0]
        for count in num_new_tokens:
            cu_seqlens.append(cu_seqlens[-1] + count)
        return KVBatchView(
            cache_batch_idx=torch.tensor(slots, dtype=torch.int32),
            cu_seqlens_q=torch.tensor(cu_seqlens, dtype=torch.int32),
            seqused_k=torch.tensor(lens, dtype=torch.int32),
            max_seqlen_q=max(num_new_tokens, default=0),
            max_seqlen_k=max(lens, default=0),
        )

    def seq_len(self, seq_id: int) -> int:
        """Tokens of a live sequence."""
        self._slots((seq_id,))
        return self._len_of[seq_id]

    def slot_of(self, seq_id: int) -> int:
        """Slot of a live sequence."""
        return self._slots((seq_id,))[0]

    def mapped_rows(self, seq_id: int) -> int:
        """Rows of the sequence's slot that have memory, those committed ahead included."""
        return self._arena.mapped_rows(self.slot_of(seq_id))

    def wait_worker(self) -> None:
        """Wait until the background worker has nothing left to do (tests and benchmarks)."""
        self._arena.wait_worker()

    def stats(self) -> KVCacheStats:
        raw = self._arena.stats()
        page = raw["page_bytes"]
        return KVCacheStats(
            reserved_bytes=raw["reserved_bytes"],
            capacity_bytes=raw["max_pages"] * page,
            page_bytes=page,
            created_pages=raw["created_pages"],
            free_pages=raw["free_pages"],
            in_use_pages=raw["in_use_pages"],
            retired_pages=raw["retired_pages"],
            live_bytes=raw["live_bytes"],
            committed_bytes=raw["committed_pages"] * page,
            ahead_bytes=raw["ahead_pages"] * page,
            parked_bytes=raw["parked_pages"] * page,
            peak_committed_bytes=raw["peak_committed_pages"] * page,
            peak_live_bytes=raw["peak_live_bytes"],
            num_live_seqs=raw["num_live"],
            peak_live_seqs=raw["peak_live"],
            map_calls=raw["map_calls"],
            unmap_calls=raw["unmap_calls"],
            critical_pages=raw["critical_pages"],
            background_pages=raw["background_pages"],
            adopted_pages=raw["adopted_pages"],
            reclaimed_pages=raw["reclaimed_pages"],
            stall_us=raw["stall_us"],
            num_steps=raw["num_steps"],
            live_byte_steps=raw["live_byte_steps"],
            committed_byte_steps=raw["committed_byte_steps"],
            worker_error=raw["worker_error"],
        )

    def trim(self, keep_free_pages: int = 0) -> int:
        return self._arena.trim(keep_free_pages)

    def resize(self, capacity_bytes: int) -> None:
        max_pages = capacity_bytes // self._layout.page_bytes
        self._arena.resize(
            max_pages, _low_pages(self._config, max_pages), _high_pages(self._config, max_pages)
        )

    def check_invariants(self) -> None:
        self._arena.check_invariants()

    def close(self) -> None:
        self._views.clear()
        self._arena.close()

    def __enter__(self) -> VirtualKVCache:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a VirtualKVCache cannot be pickled: its memory belongs to this process; "
            "send its config and make a new one"
        )

    def _slots(self, seq_ids: Sequence[int]) -> list[int]:
        try:
            return list(map(self._slot_of.__getitem__, seq_ids))
        except KeyError as error:
            raise ConfigError(
                f"seq_id {error.args[0]} is not live; {len(self._slot_of)} sequences are"
            ) from None

    def _make_views(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        num_layers = len(self._config.layers)
        if not 0 <= layer_idx < num_layers:
            raise ConfigError(f"layer_idx is {layer_idx}; it must be below {num_layers}")
        if self.driver_name == "null":
            raise ConfigError("the null driver only counts pages; it has no tensors")
        spec = self._config.layers[layer_idx]
        place = self._layout.placements[layer_idx]
        return (
            self._make_view(spec, place.k_region, place.k_offset, spec.k_head_dim),
            self._make_view(spec, place.v_region, place.v_offset, spec.v_head_dim),
        )

    def _make_view(self, spec: LayerKVSpec, region: int, offset: int, head_dim: int) -> Tensor:
        itemsize = DTYPE_BYTES[spec.dtype]
        layout = self._layout
        capsule = self._arena.tensor_capsule(
            region,
            offset,
            spec.dtype,
            [layout.num_slots, layout.max_seq_len, spec.num_kv_heads, head_dim],
            [
                layout.slot_bytes[region] // itemsize,
                layout.row_bytes[region] // itemsize,
                head_dim,
                1,
            ],
        )
        tensor: Tensor = from_dlpack(capsule)
        return tensor


def make_driver(config: KVCacheConfig) -> _core.Driver:
    """The driver that ``config`` names; ``"auto"`` is the host driver where there is no GPU."""
    page_bytes = config.page_bytes or DEFAULT_PAGE_BYTES
    if config.driver == "null":
        return _core.make_null_driver(page_bytes)
    return _core.make_host_driver(page_bytes)


def _core_spec(layer: LayerKVSpec) -> _core.LayerKVSpec:
    return _core.LayerKVSpec(
        num_kv_heads=layer.num_kv_heads,
        k_head_dim=layer.k_head_dim,
        v_head_dim=layer.v_head_dim,
        element_bytes=DTYPE_BYTES[layer.dtype],
    )


def _low_pages(config: KVCacheConfig, max_pages: int) -> int:
    return int(max_pages * config.low_watermark)


def _high_pages(config: KVCacheConfig, max_pages: int) -> int:
    return ceil(max_pages * config.high_watermark)


def _check_num_tokens(num_tokens: int) -> None:
    if num_tokens < 0:
        raise ConfigError(f"num_tokens is {num_tokens}; it must be 0 or more")


def _mixes_dtypes(config: KVCacheConfig) -> bool:
    # Bits of one type read as another may be NaN, which a masked row must never hold.
    return len({layer.dtype for layer in config.layers}) > 1
