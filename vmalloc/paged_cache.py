"""KV cache in fixed blocks with block tables: what PagedAttention does, behind the same protocol.

Owns: the parts below, the steps and the tensor views. Block counts live in ``BlockPool`` alone.
Thread-safety: none of its own; one engine thread.

Freed blocks are reusable at once: whatever the next sequence writes to them is enqueued after the
kernels that may still read them. So there are no retired pages, and steps are only counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import NoReturn

from torch import Tensor

from .backend import (
    KVBatchBuffers,
    KVBatchView,
    KVCacheStats,
    PrefixCacheStats,
    PrefixHit,
    Reservation,
    SequenceGroupSpec,
    Step,
)
from .batch_views import Batch, BatchViews
from .block_pool import BlockPool
from .block_storage import make_block_storage
from .block_supply import BlockSupply
from .block_table import BlockTables
from .config import KVCacheConfig
from .device import current_stream, tensor_device
from .errors import ClosedError, ConfigError
from .layout import plan_layout
from .page_map import PageMap
from .paged_checks import check_books
from .paged_prefix import SequencePrefixes
from .paged_sequences import PagedSequences, check_between
from .paged_stats import StepTotals, collect_page_map, collect_stats
from .paged_swap import SwapSpace
from .prefix_node import PrefixNode


class PagedKVCache:
    """``KVBackend`` over blocks of ``config.block_size`` tokens.

    A page, in statistics and byte counts, is a block over all regions. Kernels are exact to the
    row, so ``lookahead_tokens`` backs nothing here; nor is there a worker or a parked slot.

    On the host, memory is reserved for the cap, or for ``max_num_seqs`` sequences of full length if
    that is more, and taken as blocks are used. ``trim``, ``try_sleep`` and a lowered cap give it
    back, but for system pages that a free block shares with a used one (see ``block_storage``).

    On CUDA the cap is taken at start as torch tensors, and nothing goes back: ``trim`` gives back
    0 pages, ``try_sleep`` is False, ``resize`` moves the cap below the one at start, and all
    blocks count as created.

    Example:
        >>> layer = LayerKVSpec(num_kv_heads=2, k_head_dim=64, v_head_dim=64)
        >>> config = KVCacheConfig(
        ...     layers=(layer,) * 4, max_num_seqs=8, max_seq_len=2048, capacity_bytes=64 << 20
        ... )
        >>> cache = PagedKVCache(config)
        >>> cache.try_admit(SequenceGroupSpec(seq_ids=(0,), num_tokens=100)) is not None
        True

    Raises:
        ConfigError: a value can never work; the text names it and the limit.
    """

    name = "paged"

    def __init__(self, config: KVCacheConfig) -> None:
        if config.commit_policy != "on_demand":
            raise ConfigError(
                f"commit_policy is {config.commit_policy!r}; the paged backend supports on_demand"
            )
        layout = plan_layout(config, page_bytes=1)
        block_bytes = config.block_size * layout.token_bytes
        blocks_per_seq = -(-config.max_seq_len // config.block_size)
        num_blocks = config.capacity_bytes // block_bytes
        if config.driver_name != "cuda":  # whose memory is all taken at start
            num_blocks = max(num_blocks, config.max_num_seqs * blocks_per_seq)
        self._config = config
        self._pool = BlockPool(num_blocks)
        self._storage = make_block_storage(config, layout, num_blocks)
        self._prefixes = SequencePrefixes(
            self._pool, config.block_size, enabled=config.prefix_caching
        )
        self._index = self._prefixes.index
        self._supply = BlockSupply(config, self._pool, self._storage, self._index, block_bytes)
        self._swap = SwapSpace(self._pool, self._storage, config.swap_bytes // block_bytes)
        self._tables = BlockTables(config.max_num_seqs, blocks_per_seq, config.block_size)
        self._seqs = PagedSequences(
            self._pool, self._storage, self._supply, self._tables, self._prefixes, self._swap
        )
        self._tensor_device = tensor_device(config.device)
        self._batches = BatchViews(self._tensor_device, config.max_seq_len)
        self._views: dict[int, tuple[Tensor, Tensor]] = {}
        self._is_closed = False
        self._epoch = 0
        self._is_step_open = False
        self._totals = StepTotals()

    @property
    def config(self) -> KVCacheConfig:
        return self._config

    @property
    def driver_name(self) -> str:
        """``"host"``, ``"torch"`` or ``"null"``."""
        return self._storage.name

    def max_seq_tokens(self) -> int:
        self._check_usable()
        num_blocks = self._pool.capacity - len(self._supply.scratch)
        return min(self._config.max_seq_len, num_blocks * self._config.block_size)

    def bytes_for(self, num_tokens: int) -> int:
        return self._tables.blocks_for(num_tokens) * self._supply.block_bytes

    def can_admit(self, num_tokens: int, num_seqs: int = 1) -> bool:
        self._check_usable()
        if num_tokens > self._config.max_seq_len or not self._seqs.has_rows(num_seqs):
            return False
        num_blocks = num_seqs * self._tables.blocks_for(num_tokens)
        return self._supply.has_room(num_blocks, above_low=len(self._seqs) > 0)

    def prefetch(self, num_tokens: int) -> None:
        """Nothing to warm: a block is as good as any other."""
        self._check_usable()

    def match_prefix(self, token_ids: Sequence[int], salt: str = "") -> PrefixHit:
        self._check_usable()
        found = self._index.match(token_ids, salt)
        return PrefixHit(found.num_tokens, tuple(token_ids), salt, found.miss_reason)

    def try_admit(
        self, group: SequenceGroupSpec, hit: PrefixHit | None = None
    ) -> Reservation | None:
        self._check_usable()
        self._seqs.check_new(group.seq_ids)
        check_between("num_tokens", group.num_tokens, "max_seq_len", self._config.max_seq_len)
        if hit is not None and hit.salt != group.cache_salt:
            raise ConfigError(
                f"the hit was looked up under salt {hit.salt!r}; the group's is "
                f"{group.cache_salt!r}"
            )
        if not self._seqs.has_rows(len(group.seq_ids)):
            return None
        found = None
        if hit is not None:
            limit = min(hit.num_tokens, group.num_tokens - 1)
            found = self._index.match(hit.token_ids, hit.salt, max_tokens=limit)
        num_cached = self._seqs.try_admit(group, found)
        if num_cached is None:
            return None
        if hit is not None and found is not None:
            reason = hit.miss_reason or found.miss_reason  # it may have left since
            for _ in group.seq_ids:
                self._index.note_lookup(len(hit.token_ids), num_cached, reason)
        return Reservation(seq_ids=group.seq_ids, slots=(), num_cached_tokens=num_cached)

    def try_extend(self, seq_ids: Sequence[int], num_tokens: Sequence[int]) -> bool:
        self._check_usable()
        return self._seqs.try_extend(seq_ids, num_tokens, self._config.max_seq_len)

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        self._check_usable()
        self._seqs.truncate(seq_id, num_tokens)
        self._supply.give_back_surplus()

    def try_fork(
        self, parent_id: int, child_ids: Sequence[int], num_tokens: int | None = None
    ) -> bool:
        self._check_usable()
        return self._seqs.try_fork(parent_id, child_ids, num_tokens)

    def try_reorder(self, seq_ids: Sequence[int], parent_idx: Sequence[int]) -> bool:
        """See ``KVBackend``. Only the tables change, so it never fails for lack of blocks."""
        self._check_usable()
        self._seqs.reorder(seq_ids, parent_idx)
        self._supply.give_back_surplus()
        return True

    def register_tokens(self, seq_id: int, token_ids: Sequence[int], num_tokens: int) -> None:
        self._check_usable()
        self._seqs.register(seq_id, token_ids, num_tokens)

    def free(self, seq_ids: Sequence[int], keep_prefix: bool = True) -> None:
        self._check_usable()
        self._seqs.free(seq_ids, keep_tail=keep_prefix)
        self._supply.give_back_surplus()

    def try_swap_out(self, seq_ids: Sequence[int]) -> bool:
        self._check_usable()
        done = self._seqs.try_swap_out(seq_ids)
        self._supply.give_back_surplus()
        return done

    def try_swap_in(self, seq_ids: Sequence[int]) -> bool:
        self._check_usable()
        return self._seqs.try_swap_in(seq_ids)

    def pin_prefix(self, token_ids: Sequence[int], salt: str = "") -> int:
        self._check_usable()
        return self._index.pin(token_ids, salt)

    def unpin_prefix(self, token_ids: Sequence[int], salt: str = "") -> int:
        self._check_usable()
        return self._index.unpin(token_ids, salt)

    def flush_prefixes(self) -> int:
        self._check_usable()
        num_freed = self._index.flush()
        self._supply.give_back_surplus()
        return num_freed

    def prefix_stats(self) -> PrefixCacheStats:
        self._check_open()
        return self._index.stats()

    def begin_step(self, stream: int | None = None) -> Step:
        self._check_usable()
        self._check_between_steps()
        self._epoch += 1
        self._is_step_open = True
        if stream is None:
            stream = current_stream(self._tensor_device)
        return Step(epoch=self._epoch, stream=stream)

    def end_step(self, step: Step) -> None:
        self._check_usable()
        if not self._is_step_open or step.epoch != self._epoch:
            raise ConfigError(f"step {step.epoch} is not open; the last one begun is {self._epoch}")
        self._is_step_open = False
        self._totals.num_steps += 1
        self._totals.live_tokens += self._seqs.note_live_tokens()
        self._totals.committed_blocks += self._pool.num_committed

    def layer_views(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer over all blocks, as strided views.

        Returns:
            Two tensors ``[num_blocks, block_size, num_kv_heads, head_dim]``. Rows that were never
            written are zeros and cost nothing.
        """
        self._check_usable()
        views = self._views.get(layer_idx)
        if views is None:
            num_layers = len(self._config.layers)
            if not 0 <= layer_idx < num_layers:
                raise ConfigError(f"layer_idx is {layer_idx}; it must be below {num_layers}")
            views = self._views[layer_idx] = self._storage.layer_views(layer_idx)
        return views

    def batch_view(
        self,
        seq_ids: Sequence[int],
        num_new_tokens: Sequence[int],
        *,
        out: KVBatchBuffers | None = None,
        pad_to: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> KVBatchView:
        self._check_usable()
        rows = self._seqs.rows(seq_ids)
        return self._batches.make(
            Batch(
                self._tables.lens[rows],
                num_new_tokens,
                table=partial(self._tables.gather, rows),
                block_size=self._config.block_size,
            ),
            take_scratch=self._supply.take_scratch,
            out=out,
            pad_to=pad_to,
            max_seqlen_k=max_seqlen_k,
        )

    def wait_worker(self) -> None:
        """Nothing to wait for: blocks are taken on the calling thread."""
        self._check_usable()

    def seq_len(self, seq_id: int) -> int:
        """Tokens of a live sequence."""
        self._check_usable()
        return self._seqs.length(seq_id)

    def live_seq_ids(self) -> list[int]:
        """Sequences that have a block table."""
        self._check_usable()
        return self._seqs.ids()

    def swapped_seq_ids(self) -> list[list[int]]:
        """Swapped-out sequences, group by group."""
        return [list(group.members) for group in self._swap.distinct_groups()]

    def page_table(self, seq_id: int) -> list[list[int]]:
        """Ids of the blocks that a live sequence's tokens are in, in a list of their own."""
        return [self.block_ids(seq_id)]

    def prefix_nodes(self) -> Iterator[PrefixNode]:
        """Nodes of the prefix index, parents first."""
        return self._index.nodes()

    def block_ids(self, seq_id: int) -> list[int]:
        """Blocks of a live sequence, in order of its rows."""
        self._check_usable()
        blocks: list[int] = self._tables.blocks(self._seqs.get(seq_id).row).tolist()
        return blocks

    def stats(self) -> KVCacheStats:
        """See ``KVCacheStats``. While the cache sleeps, it has no pages and no live bytes."""
        self._check_open()
        return collect_stats(
            self._pool,
            self._supply,
            self._seqs,
            self._swap,
            self._totals,
            self._config.token_bytes,
        )

    def page_map(self) -> PageMap:
        """See ``KVBackend``. Cached blocks are in no row: ``cached_pages`` says how many."""
        self._check_open()
        return collect_page_map(self._pool, self._supply, self._seqs, self._config.token_bytes)

    def trim(self, keep_free_pages: int = 0) -> int:
        self._check_usable()
        if keep_free_pages < 0:
            raise ConfigError(f"keep_free_pages is {keep_free_pages}; it must be 0 or more")
        return self._supply.trim(keep_free_pages)

    def resize(self, capacity_bytes: int) -> None:
        """Move the cap, at most to the address space that was reserved at first."""
        self._check_usable()
        self._supply.set_capacity(capacity_bytes)

    def try_sleep(self) -> bool:
        self._check_usable()
        self._check_between_steps()
        if not self._storage.gives_back:
            return False
        num_committed = self._pool.num_committed
        if num_committed > self._pool.capacity:
            return False  # after a resize to less
        if num_committed - len(self._supply.scratch) > self._swap.room:
            return False
        self._index.flush()
        self._supply.sleep()
        return True

    def try_wake(self) -> bool:
        """See ``KVBackend``. True at once if the cache is awake."""
        self._check_open()
        self._supply.wake()
        return True

    def check_invariants(self) -> None:
        self._check_usable()
        self._index.check_invariants()
        self._pool.check_invariants()
        check_books(
            self._pool,
            self._tables,
            self._seqs.all_rows().tolist(),
            self._index,
            self._swap,
            self._seqs.num_tokens,
            self._supply.scratch,
        )

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._views.clear()
            self._swap.groups.clear()
            self._supply.close()

    def __enter__(self) -> PagedKVCache:
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
            "a PagedKVCache cannot be pickled: its memory belongs to this process; "
            "send its config and make a new one"
        )

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("the cache was closed")

    def _check_between_steps(self) -> None:
        if self._is_step_open:
            raise ConfigError(f"step {self._epoch} is still open; end it first")

    def _check_usable(self) -> None:
        self._check_open()
        if self._supply.is_asleep:
            raise ConfigError("the cache is asleep; call try_wake first")
