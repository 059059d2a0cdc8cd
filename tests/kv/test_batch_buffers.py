"""Static index buffers and padded batches: addresses that stay, and rows that nobody else has."""

import pytest
import torch

from vmalloc import ConfigError, KVBatchBuffers, SequenceGroupSpec
from vmalloc.kernels import cpu

from .backends import BASES, GIVE_BACK, KINDS, Engine, books, make_cache

A, B, C = BASES
each_kind = pytest.mark.parametrize("kind", KINDS)


def parts(view):
    tensors = (view.cache_batch_idx, view.cu_seqlens_q, view.seqused_k, view.block_table)
    return [tensor for tensor in tensors if tensor is not None]


def padded_places(view, count):
    """Where the sequences past the first ``count`` write: a slot or a block for each."""
    if view.block_table is None:
        return view.cache_batch_idx[count:].tolist()
    return view.block_table[count:, 0].tolist()


def live_places(cache, seq_ids):
    if cache.name == "virtual":
        return {cache.slot_of(seq_id) for seq_id in seq_ids}
    return {block for seq_id in seq_ids for block in cache.block_ids(seq_id)}


def allocate(cache, max_batch=8):
    max_blocks = -(-cache.config.max_seq_len // cache.config.block_size)
    return KVBatchBuffers.allocate(max_batch, max_blocks if cache.name == "paged" else 0)


@each_kind
def test_a_padded_view_is_the_plain_one_for_the_real_sequences(kind):
    engine = Engine(kind)
    for seq_id, length in enumerate((9, 33, 20)):
        engine.admit(seq_id, A[:length])
    plain = engine.cache.batch_view([2, 0, 1], [1, 9, 2])
    padded = engine.cache.batch_view([2, 0, 1], [1, 9, 2], pad_to=7)
    assert padded.cache_batch_idx[:3].tolist() == plain.cache_batch_idx.tolist()
    assert padded.cu_seqlens_q.tolist() == [0, 1, 10, 12, 13, 14, 15, 16]
    assert padded.seqused_k.tolist() == [20, 9, 33, 1, 1, 1, 1]
    assert (padded.max_seqlen_q, padded.max_seqlen_k) == (9, 33)
    if plain.block_table is not None:
        assert padded.block_table.shape == (7, plain.block_table.shape[1])
        assert torch.equal(padded.block_table[:3], plain.block_table)
        assert padded.cache_batch_idx.tolist() == [0] * 7
    places = padded_places(padded, 3)
    assert len(set(places)) == 1
    assert not set(places) & live_places(engine.cache, [0, 1, 2])
    again = engine.cache.batch_view([1], [1], pad_to=2)
    assert padded_places(again, 1) == places[:1]


@each_kind
def test_an_empty_batch_can_be_padded(kind):
    view = make_cache(kind).batch_view([], [], pad_to=3)
    assert view.cu_seqlens_q.tolist() == [0, 1, 2, 3]
    assert view.seqused_k.tolist() == [1, 1, 1]
    assert (view.max_seqlen_q, view.max_seqlen_k) == (1, 1)


@each_kind
def test_buffers_keep_their_addresses_while_batches_change(kind):
    engine = Engine(kind)
    out = allocate(engine.cache)
    addresses = None
    for seq_id in range(5):
        engine.admit(seq_id, B[: 10 + seq_id])
        engine.extend_all({i: [seq_id] for i in range(seq_id + 1)})
        seq_ids = list(range(seq_id + 1))[::-1]
        plain = engine.cache.batch_view(seq_ids, [1] * len(seq_ids), max_seqlen_k=128)
        filled = engine.cache.batch_view(
            seq_ids, [1] * len(seq_ids), out=out, max_seqlen_k=128, pad_to=8
        )
        now = [tensor.data_ptr() for tensor in parts(filled)]
        assert addresses in (None, now)
        addresses = now
        assert all(address % 16 == 0 for address in now)
        for one, other in zip(parts(plain), parts(filled), strict=True):
            assert torch.equal(one, other[: len(one)])
    exact = engine.cache.batch_view([0], [1], out=out)
    assert [tensor.data_ptr() for tensor in parts(exact)] == addresses
    assert exact.seqused_k.tolist() == [15]


@each_kind
def test_views_without_buffers_do_not_share_memory(kind):
    engine = Engine(kind)
    engine.admit(0, A[:10])
    first = engine.cache.batch_view([0], [1])
    engine.extend(0, 1)
    second = engine.cache.batch_view([0], [1])
    assert first.seqused_k.tolist() == [10]
    assert second.seqused_k.tolist() == [11]


@each_kind
@pytest.mark.parametrize("shape", ["odd", "power of two"])
def test_what_padding_writes_reaches_no_live_row(kind, shape):
    engine = Engine(kind, shape)
    for seq_id, base in enumerate((A, B, C)):
        engine.admit(seq_id, base[: 15 + seq_id])
    engine.extend_all({0: [1], 1: [2], 2: [3]})
    out = allocate(engine.cache)
    view = engine.cache.batch_view([1, 0], [1, 1], out=out, pad_to=8)
    for layer, spec in enumerate(engine.cache.config.layers):
        k_cache, v_cache = engine.cache.layer_views(layer)
        place = live_row(view, engine.cache.config.block_size)
        # What the two real sequences have in their last rows is written again; padding is 1e9.
        key = torch.full((8, spec.num_kv_heads, spec.k_head_dim), 1e9, dtype=k_cache.dtype)
        value = torch.full((8, spec.num_kv_heads, spec.v_head_dim), 1e9, dtype=v_cache.dtype)
        key[:2], value[:2] = k_cache[place], v_cache[place]
        cpu.append_kv(key, value, k_cache, v_cache, view)
        query = torch.ones(8, spec.num_kv_heads, spec.k_head_dim, dtype=k_cache.dtype)
        attended = cpu.varlen_attention(query, k_cache, v_cache, view, softmax_scale=0.01)
        assert attended.isfinite().all()
        assert (attended[2:] == 1e9).all()  # padding sees its own row alone
    engine.check()


def live_row(view, block_size):
    """Index of the last rows of a view's first two sequences."""
    rows = view.seqused_k[:2].long() - 1
    if view.block_table is None:
        return view.cache_batch_idx[:2].long(), rows
    return view.block_table[torch.arange(2), rows // block_size].long(), rows % block_size


@each_kind
def test_the_scratch_place_is_in_the_books_and_taken_once(kind):
    engine = Engine(kind)
    engine.admit(0, A[:30])
    before, stats = books(engine.cache), engine.cache.stats()
    engine.cache.batch_view([0], [1])
    assert books(engine.cache) == before
    for _ in range(2):
        engine.cache.batch_view([0], [1], pad_to=4)
        after = engine.cache.stats()
        assert after.committed_bytes == stats.committed_bytes + engine.cache.bytes_for(1)
        assert after.num_live_seqs == 1
        assert (after.live_bytes, after.logical_bytes) == (stats.live_bytes, stats.logical_bytes)
        engine.check()
    engine.free(0, keep_prefix=False)
    assert engine.cache.stats().committed_bytes == engine.cache.bytes_for(1)
    engine.cache.check_invariants()


@pytest.mark.parametrize("kind", GIVE_BACK)
@pytest.mark.parametrize("swap_bytes", [0, 8 << 20])
def test_the_scratch_place_needs_no_swap_space_to_sleep_and_comes_back(kind, swap_bytes):
    engine = Engine(kind, swap_bytes=swap_bytes)
    if swap_bytes:
        engine.admit(0, A[:30])
    engine.cache.batch_view([], [], pad_to=2)
    before = books(engine.cache)
    assert engine.cache.try_sleep()
    assert engine.cache.stats().created_pages == 0
    with pytest.raises(ConfigError, match="asleep"):
        engine.cache.batch_view([], [], pad_to=2)
    assert engine.cache.try_wake()
    assert books(engine.cache) == before
    view = engine.cache.batch_view(list(engine.tokens), [1] * len(engine.tokens), pad_to=3)
    count = len(engine.tokens)
    assert not set(padded_places(view, count)) & live_places(engine.cache, engine.tokens)
    engine.check()


@each_kind
def test_the_scratch_place_leaves_the_rest_of_the_pool_to_one_sequence(kind):
    cache = make_cache(kind, "power of two", capacity_bytes=20 * 4096, low_watermark=0.25)
    assert cache.max_seq_tokens() == 80
    cache.batch_view([], [], pad_to=1)
    assert cache.max_seq_tokens() == 76
    # Nothing runs: what the low watermark keeps for others is nobody's.
    assert not cache.can_admit(77)
    assert cache.try_admit(SequenceGroupSpec((0,), 77)) is None
    assert cache.can_admit(76)
    assert cache.try_admit(SequenceGroupSpec((0,), 72)) is not None
    assert cache.try_admit(SequenceGroupSpec((1,), 4)) is None  # now something does
    assert cache.try_extend([0], [76])
    assert not cache.try_extend([0], [77])
    cache.check_invariants()


@each_kind
def test_a_full_pool_has_no_room_for_the_scratch_place(kind):
    cache = make_cache(kind, "power of two", capacity_bytes=20 * 4096)
    assert cache.try_admit(SequenceGroupSpec((0,), 80)) is not None
    before = books(cache)
    with pytest.raises(ConfigError, match="ask for a padded view once before"):
        cache.batch_view([0], [1], pad_to=2)
    assert books(cache) == before
    cache.check_invariants()
    cache.truncate(0, 70)
    assert cache.batch_view([0], [1], pad_to=2).seqused_k.tolist() == [70, 1]


@each_kind
def test_cached_prefixes_make_room_for_the_scratch_place(kind):
    engine = Engine(kind, "power of two", capacity_bytes=20 * 4096)
    engine.leave_prefix(0, A[:80])
    engine.cache.batch_view([], [], pad_to=2)
    assert engine.cache.prefix_stats().evicted_pages >= 1
    engine.cache.check_invariants()


def test_padding_needs_a_slot_beside_those_of_the_sequences():
    cache = make_cache("virtual", num_slots=8)
    with pytest.raises(ConfigError, match="num_slots is 8 and max_num_seqs 8"):
        cache.batch_view([], [], pad_to=1)
    cache = make_cache("virtual", num_slots=9)
    cache.batch_view([], [], pad_to=1)
    for seq_id in range(8):
        assert cache.try_admit(SequenceGroupSpec((seq_id,), 5)) is not None


def test_rows_that_a_kernel_may_read_behind_the_padding_have_memory():
    cache = make_cache("virtual", lookahead_tokens=100)
    (slot,) = padded_places(cache.batch_view([], [], pad_to=1), 0)
    assert cache.stats().committed_bytes == cache.bytes_for(1) >= 101 * cache.config.token_bytes
    for layer in range(len(cache.config.layers)):
        for rows in cache.layer_views(layer):
            rows[slot, :101] = 1.0  # a row without memory would end the process
    cache.check_invariants()


@each_kind
def test_a_bucket_of_lengths_sets_the_width(kind):
    engine = Engine(kind)
    engine.admit(0, A[:10])
    engine.admit(1, B[:33])
    view = engine.cache.batch_view([0], [1], max_seqlen_k=64)
    assert view.max_seqlen_k == 64
    assert view.seqused_k.tolist() == [10]
    if view.block_table is not None:
        assert view.block_table.shape == (1, 16)
        assert view.block_table[0, :3].tolist() == engine.cache.block_ids(0)
        assert view.block_table[0, 3:].tolist() == [0] * 13


@each_kind
def test_batches_that_do_not_fit_are_refused_by_name(kind):
    engine = Engine(kind)
    for seq_id in range(3):
        engine.admit(seq_id, A[:20])
    cache = engine.cache
    blocks = 4 if cache.name == "paged" else 0
    small = KVBatchBuffers.allocate(2, blocks)
    bad_calls = [
        (lambda: cache.batch_view([0, 1, 2], [1, 1, 1], pad_to=2), "pad_to is 2; .* 3 sequences"),
        (lambda: cache.batch_view([0], [1], max_seqlen_k=19), "max_seqlen_k is 19.* 20 tokens"),
        (lambda: cache.batch_view([0], [1], max_seqlen_k=129), "max_seqlen_k is 129.*128"),
        (lambda: cache.batch_view([0, 1], [1]), "1 numbers of new tokens are given for 2"),
        (lambda: cache.batch_view([0, 1, 2], [1, 1, 1], out=small), "3 sequences; out holds 2"),
        (lambda: KVBatchBuffers.allocate(0), "max_batch is 0"),
        (lambda: KVBatchBuffers.allocate(1, -1), "max_blocks is -1"),
    ]
    if blocks:
        bad_calls.append((lambda: cache.batch_view([0], [1], out=small), "takes 5 blocks.*holds 4"))
    before = books(cache)
    for call, words in bad_calls:
        with pytest.raises(ConfigError, match=words):
            call()
    assert books(cache) == before


def test_buffers_elsewhere_are_refused():
    cache = make_cache("virtual")
    out = KVBatchBuffers.allocate(2, device="meta")
    with pytest.raises(ConfigError, match="out is on meta; the cache is on cpu"):
        cache.batch_view([], [], out=out)
