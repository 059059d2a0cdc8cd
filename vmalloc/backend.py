"""All that an engine sees of a KV cache: one protocol and the values that cross it.

Owns: nothing.  Thread-safety: a backend belongs to one engine thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from .errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .config import KVCacheConfig
    from .page_map import PageMap


@dataclass(frozen=True, slots=True)
class SequenceGroupSpec:
    """Sequences that are admitted together or not at all.

    Attributes:
        seq_ids: names the engine gives them; unique among live sequences.
        num_tokens: rows backed at once for each of them.
        prompt_tokens: length of the prompt, where that is not ``num_tokens``.
        final_tokens: length that each is expected to end with, for commit policies that reserve
            ahead of need. None: unknown.
        cache_salt: only sequences of equal salt share cached prefixes. None: this one neither
            leaves its prefix to others nor is it looked up.
    """

    seq_ids: tuple[int, ...]
    num_tokens: int
    prompt_tokens: int | None = None
    final_tokens: int | None = None
    cache_salt: str | None = ""


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The longest cached prefix of some tokens, as ``KVBackend.match_prefix`` found it.

    A hit reserves nothing: if the cache changed since, ``try_admit`` looks again.

    Attributes:
        num_tokens: leading tokens whose K and V are cached.
        token_ids: the tokens that were looked up.
        salt: under which salt.
        miss_reason: why the rest was not found, ``""`` if everything was; see ``MISS_REASONS``.
        path: the cache's own note of where the prefix is.
    """

    num_tokens: int
    token_ids: tuple[int, ...]
    salt: str
    miss_reason: str = ""
    path: object = None


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
    """Where a packed batch reads and writes; int32 on ``config.device``, in flash-attn's words.

    New rows of sequence ``i`` are rows ``[seqused_k[i] - q_len[i], seqused_k[i])`` of its slot,
    with ``q_len[i] = cu_seqlens_q[i + 1] - cu_seqlens_q[i]``. With a block table, row ``j`` of
    sequence ``i`` is row ``j % block_size`` of block ``block_table[i, j // block_size]``.

    Sequences that a batch was padded with have one new row and nothing else. They all write to one
    scratch slot, or block, that belongs to no sequence.

    Attributes:
        cache_batch_idx: ``[batch]`` slot of each sequence; zeros where there is a block table.
        cu_seqlens_q: ``[batch + 1]`` prefix sums of the new tokens.
        seqused_k: ``[batch]`` tokens in the cache once the new ones are written.
        max_seqlen_q, max_seqlen_k: largest values of the above, or what was asked for.
        block_table: ``[batch, blocks of max_seqlen_k]`` for the paged backend, else None.
    """

    cache_batch_idx: Tensor
    cu_seqlens_q: Tensor
    seqused_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    block_table: Tensor | None = None


@dataclass(frozen=True, slots=True)
class KVBatchBuffers:
    """Index tensors that stay where they are, for CUDA graphs: ``batch_view(out=...)`` fills them.

    The tensors of each part start at a fixed address, and a view has their leading entries. A
    graph depends on the shapes of a view too, so it asks for the same ``pad_to`` and
    ``max_seqlen_k`` whenever it is replayed. A copy into the buffers is enqueued on torch's current
    stream; kernels on another stream have to wait for it.

    Attributes:
        packed: all of them, one int32 tensor.
        max_batch: most sequences, those that pad the batch included.
        max_blocks: most blocks of a sequence; 0 without block tables.
    """

    packed: Tensor
    max_batch: int
    max_blocks: int

    @classmethod
    def allocate(
        cls, max_batch: int, max_blocks: int = 0, device: str | torch.device = "cpu"
    ) -> KVBatchBuffers:
        """Zeroed buffers for so many sequences of so many blocks each."""
        import torch

        if max_batch < 1:
            raise ConfigError(f"max_batch is {max_batch}; it must be at least 1")
        if max_blocks < 0:
            raise ConfigError(f"max_blocks is {max_blocks}; it must be 0 or more")
        num_ints = packed_offsets(max_batch)[-1] + max_batch * max_blocks
        packed = torch.zeros(num_ints, dtype=torch.int32, device=device)
        return cls(packed, max_batch, max_blocks)


def packed_offsets(batch: int) -> tuple[int, int, int, int]:
    """Where slots, cu_seqlens_q, seqused_k and the block table of ``batch`` sequences start.

    In one int32 tensor, each at a multiple of 16 bytes: Triton compiles for such addresses apart.
    """
    size, sums_size = -(-batch // 4) * 4, (batch // 4 + 1) * 4
    return 0, size, size + sums_size, 2 * size + sums_size


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheStats:
    """What the memory is doing. Byte counts are physical memory unless they say otherwise.

    ``created_pages == free_pages + in_use_pages + retired_pages``, and
    ``in_use_pages * page_bytes == committed_bytes + ahead_bytes + parked_bytes + cached_bytes``.
    In the paged backend a page is a block.

    Attributes:
        reserved_bytes: address space reserved (costs no memory).
        capacity_bytes: hard cap on physical memory.
        page_bytes: one physical page.
        created_pages: pages that the driver holds now.
        free_pages, in_use_pages, retired_pages: of those, by state; a retired page waits for the
            step that may still read it.
        live_bytes: K and V of tokens that exist; what sequences share counts once.
        logical_bytes: the same with what they share counted for each of them.
        committed_bytes: pages that hold live rows, or are held for swapped or pinned ones.
        ahead_bytes: pages mapped past the ends of live sequences, before they are needed.
        parked_bytes: pages still mapped in free slots, warm for the next sequence.
        cached_bytes: pages that only the prefix index refers to.
        shared_bytes: memory that sharing saves now: each further reference to a page.
        swapped_bytes: host memory that swapped-out sequences take.
        peak_committed_bytes, peak_live_bytes: highest values so far.
        num_live_seqs, peak_live_seqs: sequences with a slot.
        map_calls, unmap_calls: driver calls so far.
        critical_pages: pages mapped while the engine waited.
        background_pages: pages mapped by the worker while the engine computed.
        adopted_pages: parked pages that a new sequence took over, mapped already.
        reclaimed_pages: ahead and parked pages taken back for another sequence.
        aliased_pages: references to pages that another sequence or the prefix index had already.
        cow_copies: pages copied, whole or in part, so that a sequence could write to its own.
        swap_out_pages, swap_in_pages: pages copied to host memory and back.
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
    logical_bytes: int
    committed_bytes: int
    ahead_bytes: int
    parked_bytes: int
    cached_bytes: int
    shared_bytes: int
    swapped_bytes: int
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
    aliased_pages: int
    cow_copies: int
    swap_out_pages: int
    swap_in_pages: int
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


MISS_REASONS = ("never_seen", "shorter_than_page", "evicted", "other_salt")
"""Why a prefix was not found, or ended where it did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixCacheStats:
    """What the prefix index did so far. Counts are of admitted sequences that were looked up.

    Attributes:
        num_lookups: sequences looked up.
        queried_tokens: their tokens; hit_tokens: those of them that were cached.
        misses: lookups that did not find everything, by reason (``MISS_REASONS``).
        cached_pages: pages that the index refers to, in use or not.
        pinned_pages: of those, pinned ones.
        evicted_pages: pages dropped for lack of memory.
    """

    num_lookups: int
    queried_tokens: int
    hit_tokens: int
    misses: Mapping[str, int]
    cached_pages: int
    pinned_pages: int
    evicted_pages: int


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

    def can_admit(self, num_tokens: int, num_seqs: int = 1) -> bool:
        """Whether ``try_admit`` would likely succeed now. Advice, never a promise."""
        ...

    def prefetch(self, num_tokens: int) -> None:
        """Hint that a sequence of ``num_tokens`` comes soon; the worker may warm a slot for it."""
        ...

    def match_prefix(self, token_ids: Sequence[int], salt: str = "") -> PrefixHit:
        """Longest cached prefix of ``token_ids``. Changes nothing and counts nothing."""
        ...

    def try_admit(
        self, group: SequenceGroupSpec, hit: PrefixHit | None = None
    ) -> Reservation | None:
        """Give each sequence a slot with ``group.num_tokens`` backed rows, or do nothing.

        With a ``hit`` the leading ``Reservation.num_cached_tokens`` rows hold their K and V
        already: whole pages are shared, the partly used one is copied. It may be fewer than
        ``hit.num_tokens``, and always leaves out at least the last of ``group.num_tokens``.
        """
        ...

    def try_extend(self, seq_ids: Sequence[int], num_tokens: Sequence[int]) -> bool:
        """Back rows ``[0, num_tokens[i])`` of every sequence, or change nothing.

        ``num_tokens`` are new totals, never below the current ones. The new rows may be written:
        what they shared with another sequence is copied.
        """
        ...

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """Drop rows from ``num_tokens`` on; pages that become empty leave after this step."""
        ...

    def try_fork(
        self, parent_id: int, child_ids: Sequence[int], num_tokens: int | None = None
    ) -> bool:
        """Make sequences that start with the first ``num_tokens`` rows of the parent, or none.

        ``None``: all of them. Full pages are shared; what a child writes is its own.
        """
        ...

    def try_reorder(self, seq_ids: Sequence[int], parent_idx: Sequence[int]) -> bool:
        """Let every sequence ``i`` go on from what ``seq_ids[parent_idx[i]]`` holds now, or none.

        All of ``seq_ids`` have equal lengths (beams of one request).
        """
        ...

    def register_tokens(self, seq_id: int, token_ids: Sequence[int], num_tokens: int) -> None:
        """Say that rows ``[0, num_tokens)`` hold the K and V of ``token_ids[:num_tokens]``.

        Others may share them from then on, unless the sequence has no salt. ``token_ids`` is kept
        until the next call for ``seq_id`` and may grow, but not change, meanwhile.
        """
        ...

    def free(self, seq_ids: Sequence[int], keep_prefix: bool = True) -> None:
        """End sequences, swapped-out ones too. Their pages stay warm, or return to the pool.

        ``keep_prefix``: leave the last, partly used page of what was registered to the prefix
        index too; its full pages are there already.
        """
        ...

    def try_swap_out(self, seq_ids: Sequence[int]) -> bool:
        """Move a group's K and V to host memory, every page once; False if there is no space.

        Pages that sequences outside the group share stay where they are. A swapped-out sequence
        can only be freed or swapped in, together with its group.
        """
        ...

    def try_swap_in(self, seq_ids: Sequence[int]) -> bool:
        """Bring a group back as it was, what it shared included, or change nothing."""
        ...

    def pin_prefix(self, token_ids: Sequence[int], salt: str = "") -> int:
        """Keep the cached prefix of ``token_ids`` until it is unpinned; the tokens pinned."""
        ...

    def unpin_prefix(self, token_ids: Sequence[int], salt: str = "") -> int:
        """Undo one ``pin_prefix`` of the same tokens; the tokens unpinned."""
        ...

    def flush_prefixes(self) -> int:
        """Forget every cached prefix that is not pinned nor in use; the pages set free."""
        ...

    def prefix_stats(self) -> PrefixCacheStats: ...

    def begin_step(self, stream: int | None = None) -> Step:
        """Open a step whose kernels the engine enqueues on ``stream``.

        A stream is named by its pointer: ``torch.cuda.Stream.cuda_stream``,
        ``int(cuda.core.Stream.handle)``, ``int(CUstream)``. None: on a CUDA device torch's current
        stream, elsewhere there are none.
        """
        ...

    def end_step(self, step: Step) -> None:
        """Close a step once its kernels are enqueued."""
        ...

    def wait_worker(self) -> None:
        """Wait until the background worker, if there is one, has nothing left to do.

        Until the next call that changes sequences it then makes no driver call either, as when a
        CUDA graph is being captured.
        """
        ...

    def layer_views(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer, ``[num_slots, rows, num_kv_heads, head_dim]``, strided views.

        With a block table: ``[num_blocks, block_size, num_kv_heads, head_dim]``.
        """
        ...

    def batch_view(
        self,
        seq_ids: Sequence[int],
        num_new_tokens: Sequence[int],
        *,
        out: KVBatchBuffers | None = None,
        pad_to: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> KVBatchView:
        """Where a packed batch writes its last ``num_new_tokens[i]`` rows and what it reads.

        On a CUDA device all of it goes there in one asynchronous copy on torch's current stream.

        Args:
            out: buffers to write into, so that no address changes; the view has their leading
                entries. Else every view has tensors of its own.
            pad_to: fill up to so many sequences with ones of one new row in a scratch slot, or
                block. It is taken by the first call that asks for it, also by one without any
                sequence, and kept until ``close``.
            max_seqlen_k: say so instead of the longest sequence; at least as long.

        Raises:
            ConfigError: a sequence is not live, or the batch does not fit ``out``, ``pad_to`` or
                ``max_seqlen_k``; no room is left to take the scratch slot.
        """
        ...

    def stats(self) -> KVCacheStats: ...

    def page_map(self) -> PageMap:
        """The pages of every slot, by kind; while the cache sleeps too."""
        ...

    def trim(self, keep_free_pages: int = 0) -> int:
        """Give free pages back to the system until ``keep_free_pages`` are left; the count."""
        ...

    def resize(self, capacity_bytes: int) -> None:
        """Move the cap; below what is in use, it takes effect as pages are freed."""
        ...

    def try_sleep(self) -> bool:
        """Give all physical memory back, the live sequences' to host memory; addresses stay.

        Cached prefixes that are not in use are lost; the virtual backend leaves pinned ones in
        place. Until ``try_wake`` every call but ``stats``, ``prefix_stats``, ``page_map``,
        ``close`` and ``try_wake`` raises ``ConfigError``, so what sleeps can wake under its cap.
        False, and nothing changed, where the swap space or the host does not hold the live
        sequences, or what is committed exceeds a cap that was lowered, or the memory cannot go
        without its addresses (paged on CUDA).

        Raises:
            ConfigError: a step is open.
            DriverError: not all memory could be given back. The cache may sleep all the same;
                ``try_wake`` undoes it.
        """
        ...

    def try_wake(self) -> bool:
        """Undo ``try_sleep``; True if it is awake.

        False, and it sleeps on without memory, as long as the machine has none for it or kernels
        of the last steps still read what they left.
        """
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
