"""What every KV backend does, whatever its memory looks like: contents, sharing, values of failure.

Written against the protocol alone; rows are read and written through ``batch_view`` and
``layer_views``.
"""

import pytest
import torch

from vmalloc import ClosedError, ConfigError, SequenceGroupSpec

from .backends import BASES, GIVE_BACK, KINDS, Engine, books

A, B, C = BASES

each_kind = pytest.mark.parametrize("kind", KINDS)
each_that_gives_back = pytest.mark.parametrize("kind", GIVE_BACK)
each_shape = pytest.mark.parametrize(
    "shape", ["odd", "odd, per layer", "split, uneven dims, pairs", "power of two"]
)


@each_kind
@each_shape
def test_rows_hold_what_was_written_while_sequences_come_and_go(kind, shape):
    engine = Engine(kind, shape)
    for seq_id, length in enumerate((1, 7, 16, 50)):
        assert engine.admit(seq_id, B[:length]) == 0
    for token in range(30):
        assert engine.extend_all({seq_id: [token] for seq_id in range(4)})
    engine.check()
    engine.free(1, 3, keep_prefix=False)
    assert engine.admit(5, C[:70]) == 0
    assert engine.extend(0, *A[:80])
    engine.check()


@each_kind
def test_batch_view_speaks_of_the_batch_in_its_order(kind):
    engine = Engine(kind)
    for seq_id in (1, 2, 3):
        engine.admit(seq_id, A[: 10 * seq_id])
    engine.extend_all({1: [0], 3: [1, 2, 3, 4, 5, 6]})
    view = engine.cache.batch_view([3, 1], [6, 1])
    assert view.seqused_k.tolist() == [36, 11]
    assert view.cu_seqlens_q.tolist() == [0, 6, 7]
    assert (view.max_seqlen_q, view.max_seqlen_k) == (6, 36)
    tensors = [view.cache_batch_idx, view.cu_seqlens_q, view.seqused_k]
    if view.block_table is not None:
        tensors.append(view.block_table)
        assert view.cache_batch_idx.tolist() == [0, 0]
    assert all(tensor.dtype == torch.int32 for tensor in tensors)


@each_kind
def test_batch_view_is_a_snapshot(kind):
    engine = Engine(kind)
    engine.admit(0, A[:10])
    view = engine.cache.batch_view([0], [10])
    before = [view.seqused_k.clone(), view.block_table]
    before[1] = None if before[1] is None else before[1].clone()
    engine.extend(0, *B[:40])
    engine.free(0)
    assert torch.equal(view.seqused_k, before[0])
    assert before[1] is None or torch.equal(view.block_table, before[1])


@each_kind
def test_rows_that_were_never_written_read_as_zeros(kind):
    engine = Engine(kind)
    assert engine.cache.try_admit(SequenceGroupSpec((0,), 20)) is not None
    for rows in engine.contents.rows(0, 20):
        assert (rows == 0).all()


# Sharing between live sequences


@each_kind
@each_shape
@pytest.mark.parametrize("length", [1, 15, 16, 33])
def test_a_fork_holds_what_its_parent_held_and_both_write_their_own(kind, shape, length):
    engine = Engine(kind, shape)
    engine.admit(0, A[:length])
    assert engine.fork(0, 1, 2)
    engine.check()
    assert engine.extend(1, 5)
    assert engine.extend_all({0: [6], 2: [7]})
    engine.check()
    engine.free(0)
    assert engine.extend_all({1: B[:20], 2: C[:20]})
    engine.check()
    stats = engine.cache.stats()
    assert stats.aliased_pages > 0 or length < 4 or engine.rows_per_page() > length
    # Each of three may have had to leave its parent's last page.
    assert stats.cow_copies > 0 or length % 4 == 0


@each_kind
@each_shape
def test_a_fork_of_part_of_the_parent_drops_the_rest(kind, shape):
    engine = Engine(kind, shape)
    engine.admit(0, A[:37])
    for child_id, num_tokens in ((1, 0), (2, 18), (3, 37)):
        assert engine.fork(0, child_id, num_tokens=num_tokens)
    assert engine.extend_all({0: [9], 1: B[:9], 2: B[:30], 3: [8]})
    engine.check()


@each_kind
@each_shape
def test_what_is_truncated_and_written_again_stays_private(kind, shape):
    engine = Engine(kind, shape)
    engine.admit(0, A[:40])
    engine.fork(0, 1)
    engine.truncate(1, 21)
    engine.check()
    assert engine.extend(1, *B[:30])
    engine.check()
    engine.truncate(0, 3)
    assert engine.extend(0, *C[:50])
    engine.check()
    assert engine.cache.stats().cow_copies > 0


@each_kind
@each_shape
@pytest.mark.parametrize(
    "parent_idx", [[0, 1, 2, 3], [1, 0, 3, 2], [3, 0, 1, 2], [2, 2, 2, 2], [0, 0, 1, 1]]
)
def test_beams_go_on_from_the_parents_they_were_given(kind, shape, parent_idx):
    engine = Engine(kind, shape)
    engine.admit(0, A[:18])
    engine.fork(0, 1, 2, 3)
    for step in range(9):
        assert engine.extend_all({beam: [10 * step + beam] for beam in range(4)})
        assert engine.reorder([0, 1, 2, 3], parent_idx)
        engine.check()
    assert engine.cache.stats().num_live_seqs == 4


@each_kind
def test_shared_rows_count_once_as_live_and_each_time_as_logical(kind):
    engine = Engine(kind, "power of two")
    token_bytes = engine.cache.config.token_bytes
    engine.admit(0, A[:32])
    engine.fork(0, 1, 2)
    stats = engine.cache.stats()
    assert stats.live_bytes == 32 * token_bytes
    assert stats.logical_bytes == 3 * 32 * token_bytes
    assert stats.shared_bytes == 2 * 32 * token_bytes  # whole pages here
    assert stats.committed_bytes == engine.cache.bytes_for(32)
    engine.free(0, 1, 2)
    assert engine.cache.stats().shared_bytes == 0


# Prefixes


@each_kind
@each_shape
def test_an_ended_sequence_leaves_its_prefix_to_the_token(kind, shape):
    engine = Engine(kind, shape)
    engine.leave_prefix(0, A[:45])
    for seq_id, common in enumerate((45, 44, 37, 32, 17, 4, 1), start=1):
        tokens = [*A[:common], *[99] * 20]
        assert engine.cache.match_prefix(tokens).num_tokens == common
        assert engine.admit(seq_id, tokens) in engine.may_cache(common)
    engine.check()
    assert engine.cache.stats().aliased_pages > 0
    assert engine.cache.stats().cow_copies > 0


@each_kind
@each_shape
def test_a_live_sequence_shares_its_full_pages_while_it_writes_on(kind, shape):
    engine = Engine(kind, shape)
    engine.admit(0, A[:70])
    engine.register(0)
    cached = engine.admit(1, [*A[:70], *B[:20]])
    assert 0 < cached <= 70
    assert engine.extend_all({0: C[:20], 1: C[:20]})
    engine.register(0)
    engine.register(1)
    assert engine.cache.match_prefix([*A[:70], *C[:20]]).num_tokens > 70
    engine.check()
    engine.free(0)
    engine.check(1)
    assert engine.cache.stats().aliased_pages > 0


@each_kind
def test_at_least_the_last_token_is_left_to_compute(kind):
    engine = Engine(kind)
    engine.leave_prefix(0, A[:32])
    assert engine.cache.match_prefix(A[:32]).num_tokens == 32
    assert engine.admit(1, A[:32]) == 31
    assert engine.admit(2, A[:9]) == 8
    assert engine.admit(3, A[:1]) == 0
    engine.check()


@each_kind
def test_a_group_is_admitted_with_the_same_prefix(kind):
    engine = Engine(kind)
    engine.leave_prefix(0, A[:30])
    hit = engine.cache.match_prefix(A[:40])
    group = SequenceGroupSpec((1, 2, 3), 40)
    num_cached = engine.cache.try_admit(group, hit).num_cached_tokens
    assert num_cached in engine.may_cache(30)
    engine.cache.check_invariants()
    for seq_id in (1, 2, 3):
        engine.contents.check(seq_id, A[:num_cached])
        engine.contents.write(seq_id, A[:40], num_cached)
        engine.tokens[seq_id], engine.salts[seq_id] = A[:40], ""
    engine.check()
    assert engine.cache.prefix_stats().num_lookups == 4
    assert engine.cache.prefix_stats().hit_tokens == 3 * num_cached


@each_kind
def test_a_stale_hit_is_looked_up_again(kind):
    engine = Engine(kind)
    engine.leave_prefix(0, A[:30])
    hit = engine.cache.match_prefix(A[:40])
    assert hit.num_tokens == 30
    engine.cache.flush_prefixes()
    assert engine.cache.try_admit(SequenceGroupSpec((1,), 40), hit).num_cached_tokens == 0


@each_kind
def test_matching_changes_and_counts_nothing(kind):
    engine = Engine(kind)
    engine.leave_prefix(0, A[:30])
    before = books(engine.cache), engine.cache.prefix_stats()
    assert engine.cache.match_prefix(A[:30]).num_tokens == 30
    assert engine.cache.match_prefix(B[:30], "no such salt").num_tokens == 0
    assert (books(engine.cache), engine.cache.prefix_stats()) == before


@each_kind
def test_salts_keep_tenants_apart(kind):
    engine = Engine(kind)
    engine.leave_prefix(0, A[:40], "red")
    assert engine.cache.match_prefix(A[:60], "blue").num_tokens == 0
    assert engine.cache.match_prefix(A[:60], "blue").miss_reason == "other_salt"
    assert engine.admit(1, A[:60], "blue") == 0
    assert engine.admit(2, A[:60], "red") in engine.may_cache(40)
    engine.check()


@each_kind
def test_a_sequence_without_salt_neither_leaves_nor_finds_a_prefix(kind):
    engine = Engine(kind)
    engine.leave_prefix(0, A[:40], None)
    assert engine.cache.match_prefix(A[:40]).num_tokens == 0
    engine.leave_prefix(1, A[:40])
    assert engine.admit(2, A[:40], None) == 0
    engine.check()


@each_kind
def test_prefix_caching_can_be_turned_off(kind):
    engine = Engine(kind, prefix_caching=False)
    engine.leave_prefix(0, A[:40])
    assert engine.cache.match_prefix(A[:40]).num_tokens == 0
    assert engine.cache.prefix_stats().cached_pages == 0
    assert engine.cache.stats().committed_bytes == 0


@each_kind
def test_only_registered_rows_are_found(kind):
    engine = Engine(kind)
    engine.admit(0, A[:60])
    assert engine.cache.match_prefix(A[:60]).num_tokens == 0
    engine.register(0, 25)
    engine.free(0)
    assert engine.cache.match_prefix(A[:60]).num_tokens == 25


@each_kind
def test_freeing_without_keeping_leaves_full_pages_only(kind):
    engine = Engine(kind, "power of two")
    engine.admit(0, A[:30])
    engine.register(0)
    engine.free(0, keep_prefix=False)
    assert engine.cache.match_prefix(A[:30]).num_tokens == 28


@each_kind
@each_shape
def test_a_truncated_sequence_takes_another_way_and_leaves_both(kind, shape):
    engine = Engine(kind, shape)
    engine.admit(0, A[:40])
    engine.register(0)
    engine.truncate(0, 18)
    assert engine.extend(0, *B[:30])
    engine.register(0)
    engine.free(0)
    assert engine.admit(1, [*A[:18], *B[:30], 1]) in engine.may_cache(48)
    assert engine.cache.match_prefix(A[:40]).num_tokens >= 18
    engine.check()


@each_kind
def test_misses_are_counted_by_reason(kind):
    engine = Engine(kind, "power of two")
    engine.leave_prefix(0, A[:40])
    engine.admit(1, A[:41])
    engine.admit(2, [*A[:40], *B[:40]])
    engine.admit(3, C[:40])
    stats = engine.cache.prefix_stats()
    assert (stats.num_lookups, stats.queried_tokens) == (4, 40 + 41 + 80 + 40)
    assert stats.hit_tokens == 80
    assert stats.misses["never_seen"] == 3  # the first of all was one
    assert stats.misses["shorter_than_page"] == 1
    assert sum(stats.misses.values()) == 4


@each_kind
def test_pinned_prefixes_outlive_flush_and_pressure(kind):
    engine = Engine(kind, "power of two", capacity_bytes=64 * 4096)
    engine.leave_prefix(0, A[:30])
    engine.leave_prefix(1, B[:30])
    assert engine.cache.pin_prefix(A[:30]) == 30
    assert engine.cache.prefix_stats().pinned_pages == 8
    assert engine.cache.stats().committed_bytes == 8 * 4096
    assert engine.cache.flush_prefixes() > 0
    assert engine.cache.match_prefix(A[:30]).num_tokens == 30
    assert engine.cache.match_prefix(B[:30]).num_tokens == 0
    for i in range(6):
        engine.leave_prefix(2 + i, [50 + i] * 110)
    engine.cache.check_invariants()
    assert engine.cache.match_prefix(A[:30]).num_tokens == 30
    assert engine.cache.unpin_prefix(A[:30]) == 30
    assert engine.cache.unpin_prefix(A[:30]) == 0
    assert engine.cache.prefix_stats().pinned_pages == 0
    engine.cache.flush_prefixes()
    assert engine.cache.match_prefix(A[:30]).num_tokens == 0
    assert engine.cache.stats().cached_bytes == 0
    engine.cache.check_invariants()


@each_kind
def test_flushing_leaves_what_is_in_use(kind):
    engine = Engine(kind)
    engine.admit(0, A[:60])
    engine.register(0)
    engine.leave_prefix(1, B[:60])
    engine.cache.flush_prefixes()
    engine.check()
    assert engine.cache.match_prefix(B[:60]).num_tokens == 0
    assert engine.cache.match_prefix(A[:60]).num_tokens > 0


@each_kind
@each_shape
def test_pressure_evicts_the_coldest_prefix_and_nothing_in_use(kind, shape):
    engine = Engine(kind, shape)
    page = engine.cache.stats().page_bytes
    engine.cache.resize(-(-49 * engine.cache.bytes_for(60) // 10 // page) * page)
    engine.admit(0, A[:60])
    engine.register(0)
    engine.leave_prefix(1, B[:60])
    engine.leave_prefix(2, C[:60])
    engine.leave_prefix(3, [*B[:60], 7])  # B is warm again
    for i in range(2):
        assert engine.admit(10 + i, [60 + i] * 60) == 0
        engine.check()
    found_b = engine.cache.match_prefix(B[:60])
    found_c = engine.cache.match_prefix(C[:60])
    assert found_b.num_tokens > found_c.num_tokens
    assert found_c.num_tokens < 60
    assert engine.cache.prefix_stats().evicted_pages > 0
    assert engine.cache.match_prefix(A[:60]).num_tokens > 0
    while engine.admit(20, [70] * 30) is not None:
        engine.register(20)
        engine.free(20)
        engine.admit(len(engine.tokens) + 30, [len(engine.tokens) + 80] * 30)
        engine.check()
    engine.check()


@each_kind
def test_evicted_prefixes_are_told_from_those_never_seen(kind):
    engine = Engine(kind, "power of two", capacity_bytes=32 * 4096)
    engine.leave_prefix(0, A[:120])
    engine.leave_prefix(1, B[:120])
    assert engine.cache.match_prefix(A[:120]).miss_reason == "evicted"
    assert engine.cache.match_prefix(C[:120]).miss_reason == "never_seen"


@each_kind
def test_a_shared_prompt_costs_its_pages_once(kind):
    engine = Engine(kind, "power of two", max_num_seqs=32, max_seq_len=600, capacity_bytes=16 << 20)
    prefix = [i % 97 for i in range(512)]
    cache = engine.cache
    own_bytes = cache.bytes_for(532) - cache.bytes_for(512)
    assert cache.bytes_for(512) == 512 * cache.config.token_bytes
    for seq_id in range(32):
        cached = engine.admit(seq_id, [*prefix, *[100 + seq_id] * 20])
        assert cached == (512 if seq_id else 0)
        engine.register(seq_id)
        assert cache.stats().committed_bytes == cache.bytes_for(512) + (seq_id + 1) * own_bytes
    stats = cache.stats()
    assert stats.live_bytes == (512 + 32 * 20) * cache.config.token_bytes
    assert stats.logical_bytes == 32 * 532 * cache.config.token_bytes
    assert stats.shared_bytes == 31 * cache.bytes_for(512)
    engine.check()


# Swap and sleep


@each_kind
@each_shape
def test_a_group_comes_back_as_it_was_with_what_it_shared(kind, shape):
    engine = Engine(kind, shape)
    engine.admit(0, A[:50])
    engine.fork(0, 1, 2)
    engine.extend_all({0: [1], 1: [2, 3], 2: [4]})
    before = books(engine.cache)
    swapped_tokens = dict(engine.tokens)
    assert engine.swap_out(0, 1, 2)
    stats = engine.cache.stats()
    assert stats.num_live_seqs == 0
    assert stats.committed_bytes == 0
    # Every page once, whoever shares it.
    assert stats.swapped_bytes == before[2]
    assert engine.admit(5, C[:60]) == 0
    assert engine.swap_in(2, 0, 1)
    engine.free(5, keep_prefix=False)
    assert engine.tokens == swapped_tokens
    engine.check()
    assert books(engine.cache)[2:] == before[2:]
    assert engine.extend_all({0: [1], 1: [2, 3], 2: [4]})
    engine.check()
    stats = engine.cache.stats()
    assert stats.swap_out_pages == stats.swap_in_pages > 0
    assert stats.swapped_bytes == 0


@each_kind
@each_shape
def test_pages_shared_outside_the_group_stay_where_they_are(kind, shape):
    engine = Engine(kind, shape)
    engine.admit(0, A[:64])
    engine.fork(0, 1)
    engine.extend_all({0: B[:20], 1: C[:20]})
    assert engine.swap_out(1)
    assert 0 < engine.cache.stats().swapped_bytes < engine.cache.bytes_for(84)
    engine.check(0)
    engine.free(0)
    assert engine.admit(2, B[:64]) == 0
    assert engine.swap_in(1)
    engine.check()
    assert engine.extend(1, 9)
    engine.check()


@each_kind
def test_a_swapped_sequence_keeps_what_it_registered(kind):
    engine = Engine(kind)
    engine.admit(0, A[:50])
    engine.register(0)
    assert engine.swap_out(0)
    engine.cache.flush_prefixes()
    assert engine.cache.match_prefix(A[:50]).num_tokens == 0
    assert engine.swap_in(0)
    engine.free(0)
    assert engine.admit(1, A[:60]) in engine.may_cache(50)
    engine.check()


@each_kind
def test_a_prefix_that_only_the_index_shares_survives_a_swap(kind):
    engine = Engine(kind)
    engine.leave_prefix(0, A[:50])
    assert engine.admit(1, A[:60]) in engine.may_cache(50)
    assert engine.swap_out(1)
    assert engine.admit(2, A[:60]) >= 45
    assert engine.swap_in(1)
    engine.check()


@each_kind
def test_a_swap_that_does_not_fit_changes_nothing(kind):
    engine = Engine(kind, swap_bytes=20_000)
    engine.admit(0, A[:50])
    before = books(engine.cache)
    assert not engine.swap_out(0)
    assert books(engine.cache) == before
    engine.check()
    small = Engine(kind, swap_bytes=0)
    small.admit(0, A[:5])
    assert not small.swap_out(0)
    small.check()


@each_kind
def test_swapping_in_waits_for_room(kind):
    engine = Engine(kind, "power of two", capacity_bytes=20 * 4096)
    engine.admit(0, A[:48])
    assert engine.swap_out(0)
    engine.admit(1, B[:40])
    before = books(engine.cache)
    assert not engine.swap_in(0)
    assert books(engine.cache) == before
    engine.free(1)  # its prefix is only cached
    assert engine.swap_in(0)
    engine.check()


@each_kind
def test_swapped_sequences_can_be_freed_one_by_one(kind):
    engine = Engine(kind)
    engine.admit(0, A[:50])
    engine.fork(0, 1, 2)
    engine.extend_all({0: [1] * 9, 1: [2] * 20, 2: [3]})
    engine.admit(3, B[:40])
    engine.swap_out(0, 1, 2)
    swapped = engine.cache.stats().swapped_bytes
    engine.free(1)
    assert engine.cache.stats().swapped_bytes < swapped
    assert engine.swap_in(0, 2)
    engine.check()
    engine.swap_out(0, 2)
    engine.free(0, 2)
    assert engine.cache.stats().swapped_bytes == 0
    engine.check()


@each_kind
def test_a_swapped_sequence_can_only_be_freed_or_swapped_in(kind):
    engine = Engine(kind)
    engine.admit(0, A[:20])
    engine.fork(0, 1)
    engine.swap_out(0, 1)
    cache = engine.cache
    calls = [
        lambda: cache.try_extend([0], [21]),
        lambda: cache.truncate(0, 3),
        lambda: cache.try_fork(0, [7]),
        lambda: cache.try_reorder([0, 1], [1, 0]),
        lambda: cache.register_tokens(0, A, 20),
        lambda: cache.try_swap_out([0]),
        lambda: cache.batch_view([0], [1]),
        lambda: cache.try_admit(SequenceGroupSpec((0,), 1)),
        lambda: cache.try_swap_in([0]),  # not without the rest of its group
    ]
    for call in calls:
        with pytest.raises(ConfigError):
            call()
        cache.check_invariants()
    assert engine.swap_in(0, 1)
    engine.check()


@each_that_gives_back
@each_shape
def test_sleep_gives_all_memory_back_and_waking_restores_it(kind, shape):
    engine = Engine(kind, shape)
    engine.admit(0, A[:50])
    engine.register(0)
    engine.fork(0, 1)
    engine.extend(1, 3)
    engine.leave_prefix(2, B[:50])
    addresses = [view.data_ptr() for view in engine.contents.views]
    before = books(engine.cache)
    assert engine.cache.try_sleep()
    stats = engine.cache.stats()
    assert (stats.created_pages, stats.in_use_pages, stats.committed_bytes) == (0, 0, 0)
    assert stats.swapped_bytes > 0
    for call in (
        lambda: engine.cache.try_extend([0], [51]),
        lambda: engine.cache.match_prefix(A),
        lambda: engine.cache.begin_step(),
        lambda: engine.cache.check_invariants(),
        lambda: engine.cache.free([0]),
        lambda: engine.cache.try_sleep(),
    ):
        with pytest.raises(ConfigError, match="asleep"):
            call()
    assert engine.cache.try_wake()
    engine.check()
    assert books(engine.cache)[4:] == before[4:]
    assert addresses == [view.data_ptr() for i in range(len(engine.cache.config.layers))
                         for view in engine.cache.layer_views(i)]  # fmt: skip
    assert engine.cache.match_prefix(B[:50]).num_tokens == 0
    assert engine.cache.match_prefix(A[:50]).num_tokens > 0
    assert engine.extend_all({0: [8], 1: [9]})
    engine.check()


@each_that_gives_back
def test_sleep_is_refused_where_swap_space_does_not_hold_the_live(kind):
    engine = Engine(kind, swap_bytes=20_000)
    engine.admit(0, A[:50])
    engine.leave_prefix(1, B[:50])
    before = books(engine.cache)
    assert not engine.cache.try_sleep()
    assert books(engine.cache) == before
    engine.check()
    engine.free(0)
    assert engine.cache.try_sleep()  # what is merely cached needs no space
    assert engine.cache.try_wake()
    assert engine.admit(2, A[:50]) == 0
    engine.check()


@each_that_gives_back
def test_swapped_groups_sleep_too(kind):
    engine = Engine(kind)
    engine.admit(0, A[:50])
    engine.fork(0, 1)
    engine.extend(1, 5)
    assert engine.swap_out(1)
    assert engine.cache.try_sleep()
    assert engine.cache.try_wake()
    engine.check(0)
    assert engine.swap_in(1)
    engine.check()


# Limits


@each_kind
def test_running_out_is_a_value_that_changes_nothing(kind):
    engine = Engine(kind, "power of two", capacity_bytes=20 * 4096)
    assert engine.cache.max_seq_tokens() == 80
    engine.admit(0, A[:40])
    engine.fork(0, 1)
    before = books(engine.cache)
    assert not engine.cache.can_admit(60)
    assert engine.admit(2, B[:60]) is None
    assert not engine.extend_all({0: [1], 1: B[:60]})
    assert not engine.extend(0, *B[:48])
    assert books(engine.cache) == before
    engine.check()
    assert engine.cache.can_admit(30)
    assert engine.extend(0, *B[:40])
    engine.check()


@each_kind
def test_a_group_is_admitted_whole_or_not_at_all(kind):
    engine = Engine(kind, "power of two", capacity_bytes=20 * 4096)
    before = books(engine.cache)
    assert not engine.cache.can_admit(30, 3)
    assert engine.cache.try_admit(SequenceGroupSpec((0, 1, 2), 30)) is None
    assert books(engine.cache) == before
    assert engine.cache.can_admit(30, 2)
    assert engine.cache.try_admit(SequenceGroupSpec((0, 1), 30)) is not None
    engine.cache.check_invariants()


@each_kind
def test_most_live_sequences_is_max_num_seqs(kind):
    engine = Engine(kind, max_num_seqs=3)
    engine.admit(0, A[:9])
    assert not engine.fork(0, 1, 2, 3)
    assert engine.fork(0, 1, 2)
    assert engine.admit(3, A[:9]) is None
    assert not engine.cache.can_admit(9)
    engine.swap_out(1, 2)
    assert engine.admit(3, B[:9]) == 0
    assert not engine.swap_in(1, 2)
    engine.free(3)
    assert engine.swap_in(1, 2)
    engine.check()


@each_kind
def test_admission_stops_below_the_low_watermark_while_others_run(kind):
    engine = Engine(kind, "power of two", capacity_bytes=20 * 4096, low_watermark=0.25)
    assert engine.cache.can_admit(72)  # with nothing running the watermark must not deadlock
    engine.admit(0, A[:40])
    assert engine.admit(1, B[:24]) is None
    assert engine.admit(1, B[:20]) == 0
    assert engine.extend(0, *C[:20])
    engine.check()


@each_that_gives_back
def test_trim_gives_free_pages_back(kind):
    engine = Engine(kind)
    engine.admit(0, A[:60])
    engine.admit(1, B[:60])
    engine.free(0, keep_prefix=False)
    cache = engine.cache
    in_use = cache.stats().committed_bytes // cache.stats().page_bytes
    cache.trim()
    stats = cache.stats()
    assert stats.free_pages == 0
    assert stats.created_pages >= in_use
    engine.check()
    assert engine.admit(2, C[:100]) == 0
    engine.check()


@each_that_gives_back
@each_shape
def test_the_cap_moves_both_ways(kind, shape):
    engine = Engine(kind, shape)
    cache = engine.cache
    capacity = cache.stats().capacity_bytes
    engine.admit(0, A[:60])
    engine.leave_prefix(1, B[:60])
    cap = max(cache.bytes_for(60) // 2, 7 * cache.stats().page_bytes)
    cache.resize(cap)
    cache.check_invariants()
    assert cache.match_prefix(B[:60]).num_tokens < 60
    assert not engine.extend(0, *C[:20])
    assert engine.admit(2, C[:30]) is None
    engine.check()
    engine.free(0, keep_prefix=False)
    assert cache.stats().created_pages * cache.stats().page_bytes <= cap
    cache.resize(capacity)
    assert engine.admit(3, C[:100]) == 0
    engine.check()


# Steps, misuse, lifetime


@each_kind
def test_steps_average_live_over_committed(kind):
    engine = Engine(kind, "power of two")
    engine.admit(0, A[:10])
    step = engine.cache.begin_step()
    with pytest.raises(ConfigError, match="still open"):
        engine.cache.begin_step()
    engine.cache.end_step(step)
    with pytest.raises(ConfigError, match="not open"):
        engine.cache.end_step(step)
    stats = engine.cache.stats()
    assert stats.num_steps == 1
    assert stats.utilisation == pytest.approx(10 / 12)


@each_kind
def test_misuse_names_the_value_and_changes_nothing(kind):
    engine = Engine(kind)
    engine.admit(0, A[:10])
    engine.admit(1, A[:12])
    cache = engine.cache
    before = books(cache)
    bad_calls = [
        (lambda: cache.try_admit(SequenceGroupSpec((0,), 1)), "seq_id 0 is live already"),
        (lambda: cache.try_admit(SequenceGroupSpec((2, 2), 1)), "twice"),
        (lambda: cache.try_admit(SequenceGroupSpec((2,), 129)), "129.*128"),
        (lambda: cache.try_admit(SequenceGroupSpec((2,), -1)), "-1"),
        (lambda: cache.try_extend([5], [1]), "seq_id 5 is not live; 2 sequences are"),
        (lambda: cache.try_extend([0, 0], [11, 11]), "twice"),
        (lambda: cache.try_extend([0], [9]), "between the current 10 and the maximum, 128"),
        (lambda: cache.try_extend([0], [129]), "129.*128"),
        (lambda: cache.truncate(0, 11), "11.*10"),
        (lambda: cache.truncate(5, 1), "seq_id 5 is not live"),
        (lambda: cache.try_fork(5, [6]), "seq_id 5 is not live"),
        (lambda: cache.try_fork(0, [1]), "seq_id 1 is live already"),
        (lambda: cache.try_fork(0, [6, 6]), "twice"),
        (lambda: cache.try_fork(0, [6], 11), "11.*10"),
        (lambda: cache.try_reorder([0, 1], [1, 0]), "equal"),
        (lambda: cache.try_reorder([0], [1]), "parent_idx"),
        (lambda: cache.register_tokens(0, A, 11), "11.*10"),
        (lambda: cache.register_tokens(0, A[:3], 4), "4.*3"),
        (lambda: cache.free([0, 5]), "seq_id 5 is not live"),
        (lambda: cache.free([0, 0]), "twice"),
        (lambda: cache.try_swap_out([0, 5]), "seq_id 5 is not live"),
        (lambda: cache.try_swap_in([0]), "seq_id 0 is not swapped out"),
        (lambda: cache.layer_views(5), "layer_idx is 5; it must be below 5"),
        (lambda: cache.resize(1), "new cap in pages is 0"),
    ]
    for call, words in bad_calls:
        with pytest.raises(ConfigError, match=words):
            call()
        assert books(cache) == before
        engine.check()


@each_that_gives_back
def test_closing_gives_memory_back_and_is_idempotent(kind):
    engine = Engine(kind)
    engine.admit(0, A[:50])
    with engine.cache as cache:
        key, _ = cache.layer_views(0)
    cache.close()
    if kind != "virtual(cuda)":  # where addresses without memory cannot be read
        assert key.sum() == 0
    with pytest.raises(ClosedError):
        cache.stats()
    with pytest.raises(ClosedError):
        cache.try_wake()
