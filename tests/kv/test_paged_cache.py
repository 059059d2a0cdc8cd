"""PagedKVCache beyond the protocol: blocks, tables, physical memory, what it refuses."""

import pickle

import pytest
import torch

from vmalloc import (
    ConfigError,
    InvariantError,
    LayerKVSpec,
    PagedKVCache,
    SequenceGroupSpec,
    choose_backend,
    create_kv_backend,
)

from .backends import BASES, Engine, make_cache, make_config

A, B, C = BASES


def admit(cache, seq_id, num_tokens):
    assert cache.try_admit(SequenceGroupSpec((seq_id,), num_tokens)) is not None


def resident_bytes(address):
    """Physical memory of the mapping that ``address`` is in."""
    inside = False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            head = line.split()[0]
            if "-" in head and ":" not in head:
                start, end = (int(word, 16) for word in head.split("-"))
                inside = start <= address < end
            elif inside and head == "Rss:":
                return int(line.split()[1]) * 1024
    raise AssertionError(f"no mapping at {address:#x}")


@pytest.mark.parametrize("layers_per_group", [1, 2, 5])
@pytest.mark.parametrize("kv_split", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_views_of_all_layers_are_disjoint(layers_per_group, kv_split, dtype):
    layer = LayerKVSpec(num_kv_heads=3, k_head_dim=40, v_head_dim=24, dtype=dtype)
    cache = PagedKVCache(
        make_config(layers=(layer,) * 5, layers_per_group=layers_per_group, kv_split=kv_split)
    )
    admit(cache, 0, 100)
    blocks = cache.block_ids(0)
    views = [view for i in range(5) for view in cache.layer_views(i)]
    for i, view in enumerate(views):
        assert view.shape[1:] == (4, 3, 40 if i % 2 == 0 else 24)
        assert view.dtype == getattr(torch, dtype)
        view[blocks] = i + 1
    for i, view in enumerate(views):
        assert (view[blocks] == i + 1).all()
        assert view.sum() == (i + 1) * view[blocks].numel()


def test_layers_of_two_dtypes_share_a_row():
    layers = tuple(
        LayerKVSpec(num_kv_heads=2, k_head_dim=16, v_head_dim=16, dtype=dtype)
        for dtype in ("bfloat16", "float32", "float16")
    )
    engine = Engine("paged", layers=layers)
    assert [view.dtype for view in engine.contents.views[::2]] == [
        torch.bfloat16,
        torch.float32,
        torch.float16,
    ]
    engine.admit(0, A[:50])
    engine.fork(0, 1)
    engine.extend(1, 7)
    engine.check()


def test_a_row_that_cannot_be_aligned_is_refused_by_name():
    layers = (
        LayerKVSpec(num_kv_heads=1, k_head_dim=1, v_head_dim=2, dtype="bfloat16"),
        LayerKVSpec(num_kv_heads=1, k_head_dim=1, v_head_dim=1, dtype="float32"),
    )
    cache = PagedKVCache(make_config(layers=layers))
    with pytest.raises(ConfigError, match="float32 at byte 6"):
        cache.layer_views(1)


def test_a_block_that_passes_to_another_type_or_tenant_is_cleared():
    layers = tuple(
        LayerKVSpec(num_kv_heads=1, k_head_dim=64, v_head_dim=64, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    for changes in ({"layers": layers}, {"zero_on_reuse": True}):
        cache = make_cache("paged", **changes)
        key, _ = cache.layer_views(0)
        for trim in (False, True):
            admit(cache, 0, 100)
            blocks = cache.block_ids(0)
            assert (key[blocks] == 0).all()
            key[blocks] = float("nan")
            cache.free([0])
            if trim:
                cache.trim()
        admit(cache, 0, 128)
        assert set(blocks) <= set(cache.block_ids(0))
        assert (key[cache.block_ids(0)] == 0).all()


def test_forks_that_write_in_one_step_copy_for_all_but_the_last():
    engine = Engine("paged")
    engine.admit(0, A[:10])
    engine.fork(0, 1, 2, 3)
    shared = engine.cache.block_ids(0)
    assert all(engine.cache.block_ids(child) == shared for child in (1, 2, 3))
    assert engine.extend_all({i: [i] for i in range(4)})
    engine.check()
    assert engine.cache.stats().cow_copies == 3
    assert engine.cache.block_ids(3) == shared
    assert engine.cache.stats().in_use_pages == 2 + 4


def test_what_the_index_refers_to_is_copied_before_it_is_written():
    engine = Engine("paged")
    engine.admit(0, A[:12])
    engine.register(0)
    engine.truncate(0, 10)
    assert engine.extend(0, 99)
    engine.check()
    assert engine.cache.stats().cow_copies == 1
    assert engine.cache.match_prefix(A[:12]).num_tokens == 12


def test_a_reorder_moves_no_contents():
    engine = Engine("paged")
    engine.admit(0, A[:10])
    engine.fork(0, 1, 2)
    engine.extend_all({i: [i] for i in range(3)})
    tables = [engine.cache.block_ids(i) for i in range(3)]
    copies = engine.cache.stats().cow_copies
    assert engine.reorder([0, 1, 2], [2, 2, 1])
    assert [engine.cache.block_ids(i) for i in range(3)] == [tables[2], tables[2], tables[1]]
    assert engine.cache.stats().cow_copies == copies
    engine.check()


def test_freed_blocks_are_reusable_at_once_even_in_an_open_step():
    cache = make_cache("paged")
    step = cache.begin_step()
    admit(cache, 0, 40)
    blocks = cache.block_ids(0)
    cache.free([0])
    assert cache.stats().retired_pages == 0
    admit(cache, 1, 40)
    assert set(cache.block_ids(1)) == set(blocks)
    cache.end_step(step)


def test_block_tables_are_zero_past_the_end_of_each_sequence():
    engine = Engine("paged")
    engine.admit(0, A[:100])
    engine.free(0)
    engine.admit(1, B[:5])
    engine.admit(2, B[:30])
    engine.truncate(2, 21)
    table = engine.cache.batch_view([1, 2], [1, 1]).block_table
    assert table.shape == (2, 6)
    assert table[0, 2:].tolist() == [0] * 4
    assert table[1].tolist() == engine.cache.block_ids(2)
    assert engine.cache.batch_view([], []).block_table.shape == (0, 1)


@pytest.mark.parametrize("block_size", [1, 3, 16, 200])
def test_any_block_size_works(block_size):
    engine = Engine("paged", block_size=block_size)
    engine.leave_prefix(0, A[:50])
    assert engine.admit(1, [*A[:40], *B[:20]]) == 40
    assert engine.fork(1, 2)
    assert engine.extend_all({1: C[:20], 2: B[:30]})
    engine.check()


def test_a_tail_gives_way_when_only_its_own_block_is_left():
    engine = Engine("paged", "power of two", capacity_bytes=4 * 4096)
    engine.leave_prefix(0, A[:15])  # three full blocks and a tail of three tokens
    hit = engine.cache.match_prefix(A[:16])
    assert hit.num_tokens == 15
    # Sharing three and copying the fourth takes five; without the tail there are four.
    assert engine.admit(1, A[:16]) == 12
    engine.check()


def test_memory_is_taken_by_use_and_given_back_by_trim():
    cache = make_cache("paged", "power of two", max_num_seqs=4, max_seq_len=4096)
    views = [view for i in range(4) for view in cache.layer_views(i)]
    address = views[0].data_ptr()
    reserved = cache.stats().reserved_bytes
    before = resident_bytes(address)
    assert reserved >= 4 * 4096 * cache.config.token_bytes
    admit(cache, 0, 2048)
    for view in views:
        view[cache.block_ids(0)] = 1.0
    used = cache.bytes_for(2048)
    assert used <= resident_bytes(address) - before <= used + 4096
    cache.free([0])
    assert cache.stats().free_pages == 512
    assert cache.trim(keep_free_pages=12) == 500
    assert cache.stats().created_pages == 12
    assert resident_bytes(address) - before == 12 * 4096
    assert cache.trim() == 12
    assert resident_bytes(address) - before == 0
    cache.check_invariants()


def test_blocks_smaller_than_a_system_page_leave_when_their_neighbours_do():
    layer = LayerKVSpec(num_kv_heads=1, k_head_dim=40, v_head_dim=40)  # 1,280 bytes a block
    cache = make_cache("paged", layers=(layer,), max_seq_len=1024, capacity_bytes=4 << 20)
    key, value = cache.layer_views(0)
    before = resident_bytes(key.data_ptr())
    for seq_id in range(4):
        admit(cache, seq_id, 1024)
        key[cache.block_ids(seq_id)] = 1.0
        value[cache.block_ids(seq_id)] = 1.0
    cache.free([0, 2], keep_prefix=False)
    cache.trim()
    for seq_id in (1, 3):
        assert (key[cache.block_ids(seq_id)] == 1.0).all()
        assert (value[cache.block_ids(seq_id)] == 1.0).all()
    held = resident_bytes(key.data_ptr()) - before
    assert held <= 2 * cache.bytes_for(1024) + 4 * 4096
    cache.free([1, 3], keep_prefix=False)
    cache.trim()
    assert resident_bytes(key.data_ptr()) == before


def test_sleep_leaves_nothing_resident():
    engine = Engine("paged", "power of two")
    address = engine.contents.views[0].data_ptr()
    engine.admit(0, A[:120])
    assert resident_bytes(address) >= engine.cache.bytes_for(120)
    assert engine.cache.try_sleep()
    assert resident_bytes(address) == 0
    assert engine.cache.try_wake()
    assert engine.cache.try_wake()  # awake is what was asked for
    engine.check()


def test_free_blocks_above_the_high_watermark_go_back():
    cache = make_cache("paged", "power of two", capacity_bytes=20 * 4096, high_watermark=0.25)
    admit(cache, 0, 80)
    cache.free([0])
    assert cache.stats().free_pages == 5
    cache.check_invariants()


def test_the_cap_cannot_pass_the_reserved_address_space():
    cache = make_cache("paged", max_num_seqs=4, max_seq_len=128, capacity_bytes=200_000)
    most = cache.stats().reserved_bytes
    assert most == 4 * cache.bytes_for(128)
    cache.resize(most)
    assert cache.stats().capacity_bytes == most
    with pytest.raises(ConfigError, match="address space is reserved"):
        cache.resize(most + cache.stats().page_bytes)
    assert cache.stats().capacity_bytes == most


def test_null_driver_counts_but_has_no_tensors():
    cache = make_cache("paged", driver="null", max_num_seqs=256, swap_bytes=1 << 30)
    cache.resize(cache.stats().reserved_bytes)
    assert cache.driver_name == "null"
    for seq_id in range(256):
        admit(cache, seq_id, 100)
        cache.register_tokens(seq_id, [seq_id] * 100, 100)
    assert cache.try_extend([0, 1], [128, 101])
    cache.free(list(range(0, 256, 2)))
    cache.check_invariants()
    assert cache.stats().live_bytes == cache.config.token_bytes * (127 * 100 + 101)
    assert cache.try_swap_out([1])
    assert cache.try_sleep()
    assert cache.try_wake()
    assert cache.try_swap_in([1])
    cache.check_invariants()
    with pytest.raises(ConfigError, match="null driver"):
        cache.layer_views(0)


def test_settings_that_can_never_work_are_refused():
    with pytest.raises(ConfigError, match="commit_policy is 'oracle'"):
        make_cache("paged", commit_policy="oracle")
    with pytest.raises(ConfigError, match="cap in pages is 0"):
        make_cache("paged", capacity_bytes=100)
    with pytest.raises(ConfigError, match="keep_free_pages is -1"):
        make_cache("paged").trim(-1)
    cache = make_cache("paged")
    hit = cache.match_prefix(A, "red")
    with pytest.raises(ConfigError, match=r"'red'.*'blue'"):
        cache.try_admit(SequenceGroupSpec((0,), 9, cache_salt="blue"), hit)


def test_books_that_do_not_balance_are_named():
    cache = make_cache("paged")
    admit(cache, 0, 10)
    cache._pool.refs[cache.block_ids(0)[1]] += 1
    with pytest.raises(InvariantError, match="references per block"):
        cache.check_invariants()


def test_pickling_says_what_to_do_instead():
    with pytest.raises(TypeError, match="send its config"):
        pickle.dumps(make_cache("paged"))


def test_the_factory_makes_what_it_is_asked_for():
    choice = choose_backend("paged")
    assert (choice.kind, choice.driver) == ("paged", "host")
    assert choice.reason
    assert create_kv_backend(make_config(), kind="paged").name == "paged"
    assert choose_backend("auto").kind == "virtual"
