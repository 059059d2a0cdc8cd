"""All that an engine sees of a KV cache: one protocol and the values that cross it.

Owns: nothing.  Thread-safety: a backend belongs to one engine thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from .config import KVCacheConfig


@dataclass(frozen=True, slots=True)
class SequenceGroupSpec:
    """Sequences that are admitted together or not at all.

    Attributes:
        seq_ids: names the engine gives them; unique among live sequences.
        num_tokens: rows backed at once for each of them.
    """

    seq_ids: tuple[int, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """Proof that a group was admitted; its rows are backed, nothing is left to race for.

    Attributes:
        seq_ids: the group's sequences.
        slots: their slots, in the same order (block-table backends: empty).
        num_cached_tokens: leading tokens whose K and V are already there.
    """

    seq_ids: tuple[int, ...]
    slots: tuple[int, ...]
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step. Pages freed while it is open are not reused before its kernels are done."""

    epoch: int
    stream: int = 0


@dataclass(frozen=True, slots=True)
class KVBatchView:
    """Where a packed batch reads and writes; int32 tensors in flash-attn's words.

    New rows of sequence ``i`` are rows ``[seqused_k[i] - q_len[i], seqused_k[i])`` of its slot,
    with ``q_len[i] = cu_seqlens_q[i + 1] - cu_seqlens_q[i]``.

    Attributes:
        cache_batch_idx: ``[batch]`` slot of each sequence.
        cu_seqlens_q: ``[batch + 1]`` prefix sums of the new tokens.
        seqused_k: ``[batch]`` tokens in the cache once the new ones are written.
        max_seqlen_q, max_seqlen_k: largest values of the above.
        block_table: ``[batch, max_blocks]`` for the paged backend, else None.
    """

    cache_batch_idx: Tensor
    cu_seqlens_q: Tensor
    seqused_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    block_table: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheStats:
    """What the memory is doing. Byte counts are physical memory unless they say otherwise.

    ``created_pages == free_pages + in_use_pages + retired_pages``, and
    ``in_use_pages * page_bytes == committed_bytes + ahead_bytes + parked_bytes``.

    Attributes:
        reserved_bytes: address space reserved (costs no memory).
        capacity_bytes: hard cap on physical memory.
        page_bytes: one physical page.
        created_pages: pages that the driver holds now.
        free_pages, in_use_pages, retired_pages: of those, by state; a retired page waits for the
            step that may still read it.
        live_bytes: K and V of tokens that exist.
        committed_bytes: pages that hold live rows.
        ahead_bytes: pages mapped past the ends of live sequences, before they are needed.
        parked_bytes: pages still mapped in free slots, warm for the next sequence.
        peak_committed_bytes, peak_live_bytes: highest values so far.
        num_live_seqs, peak_live_seqs: sequences with a slot.
        map_calls, unmap_calls: driver calls so far.
        critical_pages: pages mapped while the engine waited.
        background_pages: pages mapped by the worker while the engine computed.
        adopted_pages: parked pages that a new sequence took over, mapped already.
        reclaimed_pages: ahead and parked pages taken back for another sequence.
        stall_us: microseconds the engine waited for pages.
        num_steps: steps ended so far.
        live_byte_steps, committed_byte_steps: the byte counts summed over the ends of steps, for
            averages over time.
        worker_error: why the background worker stopped, or "".
    """

    reserved_bytes: int
    capacity_bytes: int
    page_bytes: int
    created_pages: int
    free_pages: int
    in_use_pages: int
    retired_pages: int
    live_bytes: int
    committed_bytes: int
    ahead_bytes: int
    parked_bytes: int
    peak_committed_bytes: int
    peak_live_bytes: int
    num_live_seqs: int
    peak_live_seqs: int
    map_calls: int
    unmap_calls: int
    critical_pages: int
    background_pages: int
    adopted_pages: int
    reclaimed_pages: int
    stall_us: float
    num_steps: int
    live_byte_steps: float
    committed_byte_steps: float
    worker_error: str

    @property
    def utilisation(self) -> float:
        """Live bytes over committed bytes, averaged over the steps so far; 1.0 before the first."""
        if self.committed_byte_steps == 0:
            return 1.0
        return self.live_byte_steps / self.committed_byte_steps


class KVBackend(Protocol):
    """KV-cache memory, as an engine uses it.

    Running out of pages or slots is a value (``None`` or ``False``) and changes nothing; misuse
    raises ``ConfigError``, a broken driver ``DriverError``.
    """

    @property
    def name(self) -> str:
        """``"virtual"`` or ``"paged"``."""
        ...

    @property
    def config(self) -> KVCacheConfig: ...

    def max_seq_tokens(self) -> int:
        """Most tokens one sequence could hold if it had the whole pool to itself."""
        ...

    def bytes_for(self, num_tokens: int) -> int:
        """Physical memory that one sequence of ``num_tokens`` takes, in whole pages."""
        ...

    def can_admit(self, num_tokens: int) -> bool:
        """Whether ``try_admit`` would likely succeed now. Advice, never a promise."""
        ...

    def prefetch(self, num_tokens: int) -> None:
        """Hint that a sequence of ``num_tokens`` comes soon; the worker may warm a slot for it."""
        ...

    def try_admit(self, group: SequenceGroupSpec) -> Reservation | None:
        """Give each sequence a slot with ``group.num_tokens`` backed rows, or do nothing."""
        ...

    def try_extend(self, seq_ids: Sequence[int], num_tokens: Sequence[int]) -> bool:
        """Back rows ``[0, num_tokens[i])`` of every sequence, or change nothing.

        ``num_tokens`` are new totals, never below the current ones.
        """
        ...

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """Drop rows from ``num_tokens`` on; pages that become empty leave after this step."""
        ...

    def free(self, seq_ids: Sequence[int]) -> None:
        """End sequences. Their pages stay warm in the slot, or return to the pool."""
        ...

    def begin_step(self, stream: int | None = None) -> Step:
        """Open a step; ``stream`` is the engine's stream handle on devices that have one."""
        ...

    def end_step(self, step: Step) -> None:
        """Close a step once its kernels are enqueued."""
        ...

    def layer_views(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer, ``[num_slots, rows, num_kv_heads, head_dim]``, strided views."""
        ...

    def batch_view(self, seq_ids: Sequence[int], num_new_tokens: Sequence[int]) -> KVBatchView:
        """Where a packed batch writes its last ``num_new_tokens[i]`` rows and what it reads."""
        ...

    def stats(self) -> KVCacheStats: ...

    def trim(self, keep_free_pages: int = 0) -> int:
        """Give free pages back to the system until ``keep_free_pages`` are left; the count."""
        ...

    def resize(self, capacity_bytes: int) -> None:
        """Move the cap; below what is in use, it takes effect as pages are freed."""
        ...

    def check_invariants(self) -> None:
        """Raise ``InvariantError`` naming the equation that does not hold."""
        ...

    def close(self) -> None:
        """Give everything back. Idempotent."""
        ...

    def __enter__(self) -> KVBackend: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None: ...
