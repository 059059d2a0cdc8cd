"""The KV cache behind the vAttention API: slots that the caller names, K and V tensors over them.

Owns: lengths and backed rows of every slot, one thread that backs rows ahead.
Thread-safety: all methods, one lock. The thread works only between two calls: each waits for it.

Rows of all slots are rows of one ``ElasticTensor`` family, a slot's from a page boundary on; the
tensors handed out are strided views ``[slots, rows, ...]`` of it. A *block* is what a slot grows
by: one page in each tensor. Page counts live in the core alone; here are rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from operator import index
from threading import RLock

import torch
from torch import Tensor

from ..device import check_device, current_stream, tensor_device
from ..elastic import DriverChoice, ElasticTensor
from ..errors import ConfigError, DriverError, VmallocError
from ..sizes import MOST_BYTES, checked_size
from .vattention_layout import SlotLayout

AHEAD_TOKENS = 9
"""Tokens that the thread looks ahead of each sequence ..."""
AHEAD_BLOCKS = 2
"""... until it has mapped so many blocks in one step."""


class OutOfPagesError(VmallocError, RuntimeError):
    """A step, or a reservation of pages, needs more memory than there is; nothing was lost."""


class VAttentionCache:
    """What ``init_kvcache`` makes; see ``vattention.py`` for the arguments and the semantics."""

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_size: int,
        max_batch_size: int,
        max_context_length: int,
        device: int | str | torch.device,
        dtype: torch.dtype,
        page_size: int,
        megacache: bool,
        *,
        lookahead_tokens: int,
        zero_on_reuse: bool,
        driver: DriverChoice,
    ) -> None:
        self.num_layers = checked_size("num_layers", num_layers, 1)
        self.num_kv_heads = checked_size("num_kv_heads", num_kv_heads, 1)
        self.head_size = checked_size("head_size", head_size, 1)
        self.max_batch_size = checked_size("max_batch_size", max_batch_size, 1)
        self.max_context_length = checked_size("max_context_length", max_context_length, 1)
        page_size = checked_size("page_size", page_size, 1)
        lookahead_tokens = checked_size("lookahead_tokens", lookahead_tokens, 0)
        self.megacache = bool(megacache)
        self.is_deferred = True
        self.worker_error = ""
        self.dtype = dtype
        self._zero_on_reuse = zero_on_reuse
        name = _device_name(device)
        check_device(name)
        self._device = tensor_device(name)
        row_shape = [self.num_layers] * self.megacache + [self.num_kv_heads, self.head_size]
        self._layout = SlotLayout(
            prod(row_shape) * dtype.itemsize, page_size, self.max_context_length, lookahead_tokens
        )
        shape = (self.max_batch_size * self._layout.slot_rows, *row_shape)
        num_tensors = 2 if self.megacache else 2 * self.num_layers
        self._elastic = ElasticTensor(
            shape,
            dtype,
            name,
            num_tensors=num_tensors,
            capacity_bytes=0,
            page_bytes=page_size,
            spare_bytes=MOST_BYTES,  # a pool gives nothing back
            zero_on_reuse=zero_on_reuse,
            driver=driver,
        )
        self.page_bytes = self._elastic.page_bytes
        self.block_bytes = self.page_bytes * len(self._elastic.tensors)
        self.slot_bytes = self._layout.slot_rows * self._layout.row_bytes
        self._lens = [0] * self.max_batch_size
        self._backed = [0] * self.max_batch_size  # rows from the slot's first on
        self._common_rows = [0] * self.max_batch_size  # of those, what map_common_pages gave
        self._lock = RLock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vattention")
        self._ahead: Future[None] | None = None

    def tensors(self) -> list[Tensor]:
        """Per layer: K of every layer, then V of every layer, ``[B, L, H, D]``; megacache: K and V,
        ``[B, L, N, H, D]``."""
        stride = self.slot_bytes // self.dtype.itemsize
        return [
            tensor.as_strided(
                (self.max_batch_size, self.max_context_length, *tensor.shape[1:]),
                (stride, *tensor.stride()),
            )
            for tensor in self._elastic.tensors
        ]

    # Memory ---------------------------------------------------------------------------------------

    def reserve_pages(self, num_bytes: int) -> int:
        """Create as many pages as fit into ``num_bytes``, in whole blocks; how many there are."""
        num_bytes = checked_size("free_memory", num_bytes, 0)
        with self._entered():
            before = self._elastic.capacity_bytes
            wanted = num_bytes // self.block_bytes * self.block_bytes
            if wanted > before:
                is_there = False
                try:
                    self._elastic.resize(wanted)
                    is_there = self._elastic.create_spare(wanted - self._elastic.committed_bytes)
                finally:
                    if not is_there:
                        self._elastic.resize(before)
                if not is_there:
                    raise OutOfPagesError(
                        f"{wanted} bytes of pages were asked for; {self._device} has not so many, "
                        f"and the pool stays at {before}"
                    )
            return self._elastic.capacity_bytes // self.page_bytes

    def num_free_blocks(self) -> int:
        """Blocks that a step could still get, those of inactive slots counted."""
        with self._entered():
            spare = self._num_free() + self._num_surplus({})
            return max(spare - self._num_missing(self._targets(0)), 0)

    def release_inactive(self) -> None:
        """Give the memory of inactive slots, and all that is free, back to the system."""
        with self._entered():
            self._release()
            self._elastic.trim()

    # Slots ----------------------------------------------------------------------------------------

    def alloc(self, seq_len: int) -> int:
        """An inactive slot, now active: the one with the fewest blocks that suffice, else the one
        with the most; -1 if all are active."""
        if not 1 <= index(seq_len) <= self.max_context_length:
            raise ConfigError(
                f"seqlen is {seq_len}; it must be between 1 and max_context_length, "
                f"{self.max_context_length}"
            )
        with self._entered():
            inactive = [slot for slot, length in enumerate(self._lens) if length == 0]
            if not inactive:
                return -1
            needed = self._layout.rows_for(seq_len)
            fits = [slot for slot in inactive if self._backed[slot] >= needed]
            if fits:
                slot = min(fits, key=lambda slot: self._backed[slot])
            else:
                slot = max(inactive, key=lambda slot: self._backed[slot])
            self._clear(slot)
            self._lens[slot] = index(seq_len)
            return slot

    def free(self, slot: int) -> None:
        """Make a slot inactive; its pages stay with it if reclamation is deferred."""
        if not 0 <= index(slot) < self.max_batch_size:
            raise ConfigError(
                f"batch_idx is {slot}; it must be below max_batch_size, {self.max_batch_size}"
            )
        with self._entered():
            self._lens[slot] = 0
            if not self.is_deferred:
                self._release()

    def map_common(self, num_tokens: int) -> None:
        """Let the first rows of all slots be the same memory, up to a row that ends on a page."""
        if not 0 <= index(num_tokens) <= self.max_context_length:
            raise ConfigError(
                f"num_tokens is {num_tokens}; it must be at most max_context_length, "
                f"{self.max_context_length}"
            )
        with self._entered():
            if any(self._backed):
                raise ConfigError("map_common_pages comes first, while no slot has pages yet")
            num_rows = self._layout.round_up(num_tokens)
            if num_rows == 0:
                return
            parts = [self._layout.rows_of(s, 0, num_rows) for s in range(self.max_batch_size)]
            is_mapped = False
            try:
                is_mapped = self._elastic.commit(parts[0]) and all(
                    self._elastic.alias(parts[0], part.start) for part in parts[1:]
                )
            finally:
                if not is_mapped:
                    self._elastic.decommit(*parts)
            if not is_mapped:
                raise self._shortage(self._layout.blocks(num_rows))
            self._backed = [num_rows] * self.max_batch_size
            self._common_rows = list(self._backed)

    # Steps ----------------------------------------------------------------------------------------

    def step(self, seq_lens: Sequence[int], eager_reclaim: bool, commit_ahead: bool) -> None:
        """Back the rows of all active slots; then, on the thread, those that come next."""
        lens = self._checked_lens(seq_lens)
        with self._entered():
            self._advance(lens, eager_reclaim or not self.is_deferred)
            if commit_ahead:
                # torch knows a current stream for this thread only.
                stream = current_stream(self._device)
                self._ahead = self._thread.submit(self._commit_ahead, stream)

    def close(self) -> None:
        """Unmap everything, once the device is done with it."""
        with self._entered():
            self._thread.shutdown()
            self._elastic.close()

    def wait_worker(self) -> None:
        """Until nothing is being mapped ahead."""
        with self._entered():
            pass

    def check_invariants(self) -> None:
        """Recount every page."""
        with self._entered():
            self._elastic.check_invariants()

    def describe_slots(self) -> list[str]:
        """The pool, and one line for each slot: length, blocks it has, blocks it needs."""
        with self._entered():
            lines = [f"Free pool: {self._num_free()} KV blocks", "reqId : seqlen: mapped: required"]
            for slot, length in enumerate(self._lens):
                mapped = self._layout.blocks(self._backed[slot])
                needed = self._layout.blocks(self._layout.rows_for(length))
                lines.append(f"{slot:8}: {length:8} : {mapped:8} : {needed:8}")
            if self.worker_error:
                lines.append(f"The thread that maps ahead met: {self.worker_error}")
            return lines

    # ----------------------------------------------------------------------------------------------

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """Alone with the slots, once the thread is idle.

        A forked child has neither the thread nor the memory, and hears so first.
        """
        _ = self._elastic.committed_bytes
        with self._lock:
            ahead, self._ahead = self._ahead, None
            if ahead is not None:
                ahead.result()
            yield

    def _advance(self, lens: list[int], is_eager: bool) -> None:
        """Make ``lens`` the lengths, or change nothing and raise."""
        targets = {slot: self._layout.rows_for(length) for slot, length in enumerate(lens)}
        missing = self._num_missing(targets)
        old, self._lens = self._lens, lens
        if missing > self._num_free() + self._num_surplus(targets):
            self._lens = old
            raise self._shortage(missing)
        is_backed = False
        try:
            for slot, length in enumerate(old):
                if length == 0 and lens[slot] > 0:
                    self._clear(slot)  # a sequence that did not come by alloc
            if is_eager:
                self._release()
            is_backed = self._try_back(targets, None)
        finally:
            if not is_backed:
                # What was named inactive may have lost its pages by now; the rest has not.
                pairs = zip(old, lens, strict=True)
                self._lens = [min(before, after) for before, after in pairs]
        if not is_backed:
            raise self._shortage(missing)

    def _commit_ahead(self, stream: int) -> None:
        """Runs on the thread: back what the next step needs, and a little more if it is free."""
        try:
            next_rows = self._targets(1)
            num_mapped = self._num_missing(next_rows)
            if not self._try_back(next_rows, stream):
                return
            for ahead in range(2, AHEAD_TOKENS + 1):
                for slot, num_rows in self._targets(ahead).items():
                    if num_mapped >= AHEAD_BLOCKS:
                        return
                    missing = self._num_missing({slot: num_rows})
                    if missing == 0:
                        continue
                    if missing > self._num_free() or not self._commit({slot: num_rows}, stream):
                        return
                    num_mapped += missing
        except DriverError as error:
            self.worker_error = str(error)  # the next step meets it too, and raises it, if it lasts

    def _targets(self, ahead: int) -> dict[int, int]:
        """Rows that active slots need so many tokens later."""
        return {
            slot: self._layout.rows_for(min(length + ahead, self.max_context_length))
            for slot, length in enumerate(self._lens)
            if length > 0
        }

    def _try_back(self, targets: dict[int, int], stream: int | None) -> bool:
        """Back rows of slots, at the cost of what no slot needs if it must be; all or none."""
        missing = self._num_missing(targets) - self._num_free()
        if missing > 0:
            if missing > self._num_surplus(targets):
                return False
            self._reclaim(missing, targets, stream)
        return self._commit(targets, stream)

    def _commit(self, targets: dict[int, int], stream: int | None) -> bool:
        grown = {
            slot: self._layout.rows_in(self._layout.blocks(num_rows))
            for slot, num_rows in targets.items()
            if num_rows > self._backed[slot]
        }
        spans = [self._layout.rows_of(slot, self._backed[slot], end) for slot, end in grown.items()]
        if spans and not self._elastic.commit(*spans, stream=stream):
            return False
        for slot, num_rows in grown.items():
            self._backed[slot] = num_rows
        return True

    def _reclaim(self, num_blocks: int, targets: dict[int, int], stream: int | None) -> None:
        """Take blocks that no slot needs, from the last slot on."""
        layout = self._layout
        for slot in reversed(range(self.max_batch_size)):
            taken = min(self._surplus(slot, targets), num_blocks)
            if taken == 0:
                continue
            before = self._backed[slot]
            left = layout.rows_in(layout.blocks(before) - taken)
            left = max(left, self._kept_rows(slot, targets))
            self._elastic.decommit(layout.rows_of(slot, left, before), stream=stream)
            self._backed[slot] = left
            num_blocks -= taken

    def _release(self) -> None:
        """Take all pages of inactive slots."""
        idle = [s for s, length in enumerate(self._lens) if length == 0 and self._backed[s] > 0]
        self._elastic.decommit(*(self._layout.rows_of(s, 0, self._backed[s]) for s in idle))
        for slot in idle:
            self._backed[slot] = self._common_rows[slot] = 0

    def _clear(self, slot: int) -> None:
        """Let a new sequence find zeros in what the slot's last one left, if it is to."""
        if not self._zero_on_reuse:
            return
        own = self._layout.rows_of(slot, self._common_rows[slot], self._backed[slot])
        for tensor in self._elastic.tensors:
            tensor[own.start : own.stop].zero_()

    # Arithmetic -----------------------------------------------------------------------------------

    def _kept_rows(self, slot: int, targets: dict[int, int]) -> int:
        """Rows that nobody may take: common pages come free with the last slot only."""
        own = self._layout.rows_for(self._lens[slot])
        return max(own, self._common_rows[slot], targets.get(slot, 0))

    def _num_free(self) -> int:
        return self._elastic.available_bytes // self.block_bytes

    def _num_missing(self, targets: dict[int, int]) -> int:
        return sum(
            max(self._layout.blocks(num_rows) - self._layout.blocks(self._backed[slot]), 0)
            for slot, num_rows in targets.items()
        )

    def _surplus(self, slot: int, targets: dict[int, int]) -> int:
        """Blocks that a slot has beyond its length and its target."""
        blocks = self._layout.blocks
        return max(blocks(self._backed[slot]) - blocks(self._kept_rows(slot, targets)), 0)

    def _num_surplus(self, targets: dict[int, int]) -> int:
        return sum(self._surplus(slot, targets) for slot in range(self.max_batch_size))

    def _checked_lens(self, seq_lens: Sequence[int]) -> list[int]:
        lens = [index(length) for length in seq_lens]
        if len(lens) != self.max_batch_size:
            raise ConfigError(
                f"seq_lens has {len(lens)} lengths; it must have one a slot, {self.max_batch_size}"
            )
        for slot, length in enumerate(lens):
            if not 0 <= length <= self.max_context_length:
                raise ConfigError(
                    f"seq_lens[{slot}] is {length}; it must be between 0 and max_context_length, "
                    f"{self.max_context_length}"
                )
        return lens

    def _shortage(self, num_blocks: int) -> OutOfPagesError:
        capacity = self._elastic.capacity_bytes
        return OutOfPagesError(
            f"{num_blocks} more KV blocks of {self.block_bytes} bytes are needed; "
            f"{self._num_free()} are free and {capacity // self.block_bytes} were reserved "
            "(reserve_physical_pages)"
        )


def _device_name(device: int | str | torch.device) -> str:
    """``0`` is ``"cuda:0"``."""
    if isinstance(device, (str, torch.device)):
        return str(device)
    return f"cuda:{checked_size('device', device, 0)}"
