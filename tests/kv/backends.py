"""KV backends for tests of the protocol, and rows of sequences by content.

A row's K and V are a function of the salt and of all tokens up to it, as in a real model: whatever
is shared wrongly shows.
"""

import gc
import os
from contextlib import contextmanager

import torch

from tests.drivers import driver_kind
from tests.fakecuda import library_path
from vmalloc import KVCacheConfig, LayerKVSpec, SequenceGroupSpec, create_kv_backend

# Kind -> backend, and where its memory comes from: CUDA's is that of the stand-in driver, or
# torch's for the paged backend.
BACKENDS = {
    "virtual": ("virtual", {}),
    "virtual(cuda)": ("virtual", {"driver": "cuda"}),
    "paged": ("paged", {}),
    "paged(torch)": ("paged", {"driver": "cuda"}),
}
KINDS = list(BACKENDS)
GIVE_BACK = [kind for kind in KINDS if kind != "paged(torch)"]  # a tensor's memory cannot shrink
BLOCK = 4  # small, so that a few tokens make several blocks

SHAPES = {
    # Rows of 4,800 bytes: they straddle pages, and blocks straddle the system's pages.
    "odd": {"layers": (LayerKVSpec(num_kv_heads=3, k_head_dim=40, v_head_dim=40),) * 5},
    "odd, per layer": {
        "layers": (LayerKVSpec(num_kv_heads=3, k_head_dim=40, v_head_dim=40),) * 5,
        "layers_per_group": 1,
    },
    "split, uneven dims, pairs": {
        "layers": (LayerKVSpec(num_kv_heads=2, k_head_dim=24, v_head_dim=16, dtype="bfloat16"),)
        * 5,
        "layers_per_group": 2,
        "kv_split": True,
        "zero_on_reuse": True,
    },
    # Rows of 1,200 and 32 bytes: pages of the one fill long before those of the other.
    "wide and thin": {
        "layers": (
            LayerKVSpec(num_kv_heads=3, k_head_dim=60, v_head_dim=40),
            LayerKVSpec(num_kv_heads=1, k_head_dim=4, v_head_dim=4),
        ),
        "layers_per_group": 1,
    },
    # Rows of 1,024 bytes: four of them are a page, and a block.
    "power of two": {"layers": (LayerKVSpec(num_kv_heads=2, k_head_dim=16, v_head_dim=16),) * 4},
}
BASES = [[(base * 7 + i * i) % 50 for i in range(128)] for base in range(3)]


@contextmanager
def stand_in_driver():
    """Let the CUDA driver be the stand-in, which must be empty again at the end."""
    before = os.environ.get("VMALLOC_LIBCUDA")
    os.environ["VMALLOC_LIBCUDA"] = library_path()
    gc.freeze()  # what is older need not be looked at again
    try:
        with driver_kind("cuda") as fake:
            yield fake
            if fake.library.fakecuda_leaks():
                gc.collect()  # what nobody closed goes with its last reference
            assert fake.library.fakecuda_leaks() == 0
    finally:
        gc.unfreeze()
        if before is None:
            del os.environ["VMALLOC_LIBCUDA"]
        else:
            os.environ["VMALLOC_LIBCUDA"] = before


def make_config(shape="odd", **changes):
    """Room for a few sequences of full length, and nothing that works in the background."""
    settings = {
        **SHAPES[shape],
        "max_num_seqs": 8,
        "max_seq_len": 128,
        "capacity_bytes": 8 << 20,
        "page_bytes": 4096,
        "block_size": BLOCK,
        "commit_ahead_tokens": 0,
        "low_watermark": 0.0,
        "swap_bytes": 8 << 20,
        **changes,
    }
    return KVCacheConfig(**settings)


def make_cache(kind, shape="odd", **changes):
    name, settings = BACKENDS[kind]
    return create_kv_backend(make_config(shape, **{**settings, **changes}), name)


def row_values(tokens, salt=""):
    """One value per row, exact in bfloat16 whatever view it is written to."""
    values, state = [], sum(map(ord, salt or "-")) + len(salt or "-")
    for token in tokens:
        state = (state * 31 + token * 7 + 1) % 65_521
        values.append(state % 230 + 1)
    return values


class Contents:
    """Reads and writes rows of sequences by slot or by block table, over all layers."""

    def __init__(self, cache):
        self.cache = cache
        num_layers = len(cache.config.layers)
        self.views = [view for i in range(num_layers) for view in cache.layer_views(i)]

    def write(self, seq_id, tokens, first=0, salt=""):
        """Write rows ``[first, len(tokens))``."""
        place = self._place(seq_id, first, len(tokens))
        values = torch.tensor(row_values(tokens, salt)[first:], dtype=torch.float32)
        for i, view in enumerate(self.views):
            view[place] = (values + i)[:, None, None].expand(-1, *view.shape[2:]).to(view.dtype)

    def check(self, seq_id, tokens, salt=""):
        """Every row of ``tokens`` is as written, in all layers."""
        place = self._place(seq_id, 0, len(tokens))
        values = torch.tensor(row_values(tokens, salt), dtype=torch.float32)
        for i, view in enumerate(self.views):
            rows = view[place].float()
            expected = (values + i)[:, None, None].expand_as(rows)
            assert torch.equal(rows, expected), f"sequence {seq_id}, view {i}"

    def rows(self, seq_id, count):
        """The first rows of every layer's K and V, as copies."""
        place = self._place(seq_id, 0, count)
        return [view[place] for view in self.views]

    def length(self, seq_id):
        return int(self.cache.batch_view([seq_id], [0]).seqused_k[0])

    def _place(self, seq_id, first, end):
        view = self.cache.batch_view([seq_id], [0])
        assert int(view.seqused_k[0]) >= end
        rows = torch.arange(first, end)
        if view.block_table is None:
            return view.cache_batch_idx[0].long().expand_as(rows), rows
        size = self.cache.config.block_size
        return view.block_table[0][rows // size].long(), rows % size


class Engine:
    """A cache, and what its sequences should hold; checks the books after every call."""

    def __init__(self, kind, shape="odd", **changes):
        self.cache = make_cache(kind, shape, **changes)
        self.contents = Contents(self.cache)
        self.tokens = {}
        self.salts = {}

    def admit(self, seq_id, tokens, salt="", *, use_cache=True):
        """Admit one sequence and write what is not cached; its cached tokens, or None."""
        use_cache = use_cache and salt is not None
        hit = self.cache.match_prefix(tokens, salt) if use_cache else None
        group = SequenceGroupSpec((seq_id,), len(tokens), cache_salt=salt)
        reservation = self.cache.try_admit(group, hit)
        self.cache.check_invariants()
        if reservation is None:
            return None
        self.tokens[seq_id], self.salts[seq_id] = list(tokens), salt
        num_cached = reservation.num_cached_tokens
        self.contents.check(seq_id, tokens[:num_cached], salt)
        self.contents.write(seq_id, tokens, num_cached, salt)
        return num_cached

    def extend(self, seq_id, *tokens):
        return self.extend_all({seq_id: tokens})

    def extend_all(self, new_tokens):
        lens = [len(self.tokens[seq_id]) + len(new) for seq_id, new in new_tokens.items()]
        done = self.cache.try_extend(list(new_tokens), lens)
        self.cache.check_invariants()
        if done:
            for seq_id, new in new_tokens.items():
                first = len(self.tokens[seq_id])
                self.tokens[seq_id] = [*self.tokens[seq_id], *new]
                self.contents.write(seq_id, self.tokens[seq_id], first, self.salts[seq_id])
        return done

    def truncate(self, seq_id, num_tokens):
        self.cache.truncate(seq_id, num_tokens)
        self.cache.check_invariants()
        self.tokens[seq_id] = self.tokens[seq_id][:num_tokens]

    def fork(self, parent_id, *child_ids, num_tokens=None):
        done = self.cache.try_fork(parent_id, list(child_ids), num_tokens)
        self.cache.check_invariants()
        if done:
            for child_id in child_ids:
                self.tokens[child_id] = self.tokens[parent_id][:num_tokens]
                self.salts[child_id] = self.salts[parent_id]
        return done

    def reorder(self, seq_ids, parent_idx):
        done = self.cache.try_reorder(seq_ids, parent_idx)
        self.cache.check_invariants()
        if done:
            tokens = [self.tokens[seq_ids[i]] for i in parent_idx]
            self.tokens.update(zip(seq_ids, tokens, strict=True))
        return done

    def register(self, seq_id, num_tokens=None):
        tokens = self.tokens[seq_id]
        self.cache.register_tokens(
            seq_id, tokens, len(tokens) if num_tokens is None else num_tokens
        )
        self.cache.check_invariants()

    def free(self, *seq_ids, keep_prefix=True):
        self.cache.free(list(seq_ids), keep_prefix)
        self.cache.check_invariants()
        for seq_id in seq_ids:
            del self.tokens[seq_id], self.salts[seq_id]

    def swap_out(self, *seq_ids):
        done = self.cache.try_swap_out(list(seq_ids))
        self.cache.check_invariants()
        return done

    def swap_in(self, *seq_ids):
        done = self.cache.try_swap_in(list(seq_ids))
        self.cache.check_invariants()
        return done

    def check(self, *seq_ids):
        """All rows of the sequences (all there are, if none is named) are as written."""
        for seq_id in seq_ids or self.tokens:
            self.contents.check(seq_id, self.tokens[seq_id], self.salts[seq_id])
            assert self.contents.length(seq_id) == len(self.tokens[seq_id])
        self.cache.check_invariants()

    def rows_per_page(self):
        """Rows that fit into a page or a block."""
        cache = self.cache
        if cache.name == "paged":
            return cache.config.block_size
        return max(cache.stats().page_bytes // row for row in cache.layout.row_bytes)

    def may_cache(self, num_tokens):
        """What a hit of so many tokens may come to.

        Where rows straddle pages, the end of the last row may lie in a page that nobody left.
        """
        straddles = self.cache.name == "virtual" and any(
            self.cache.stats().page_bytes % row for row in self.cache.layout.row_bytes
        )
        return (num_tokens - 1, num_tokens) if straddles else (num_tokens,)

    def leave_prefix(self, seq_id, tokens, salt=""):
        """Let a sequence of ``tokens`` come and go, so that its prefix is cached."""
        assert self.admit(seq_id, tokens, salt) is not None
        self.register(seq_id)
        self.free(seq_id)


def books(cache):
    """Every count that a call which changes nothing must leave alone."""
    stats = cache.stats()
    return (
        stats.created_pages,
        stats.in_use_pages,
        stats.committed_bytes,
        stats.cached_bytes,
        stats.live_bytes,
        stats.logical_bytes,
        stats.shared_bytes,
        stats.swapped_bytes,
        stats.num_live_seqs,
    )
