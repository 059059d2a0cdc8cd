"""The page map says what every slot has, on every kind of backend, and agrees with the counts."""

import pytest

from .backends import BACKENDS, BASES, GIVE_BACK, KINDS, SHAPES, Engine
from .page_maps import check_page_map

VIRTUAL = [kind for kind in KINDS if BACKENDS[kind][0] == "virtual"]
TOKENS = BASES[0]


def page_map_of(engine):
    engine.cache.wait_worker()
    page_map = engine.cache.page_map()
    check_page_map(page_map, engine.cache.stats())
    return page_map


def slot_of(page_map, seq_id):
    (slot,) = [slot for slot in page_map.slots if slot.seq_id == seq_id]
    return slot


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sequences_are_live_pages(kind, shape):
    engine = Engine(kind, shape)
    assert page_map_of(engine).slots == ()
    engine.admit(3, TOKENS[:37])
    engine.admit(4, TOKENS[:5], salt=None)
    page_map = page_map_of(engine)
    assert page_map.backend == engine.cache.name
    assert not page_map.is_asleep
    assert [slot_of(page_map, seq_id).num_tokens for seq_id in (3, 4)] == [37, 5]
    for seq_id, num_tokens in ((3, 37), (4, 5)):
        slot = slot_of(page_map, seq_id)
        expected = [-(-num_tokens * row // page_map.page_bytes) for row in page_map.row_bytes]
        assert [[tuple(run) for run in runs] for runs in slot.runs] == [
            [("live", num_pages)] for num_pages in expected
        ]
    engine.cache.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forks_share_full_pages_and_own_their_ends(kind, shape):
    engine = Engine(kind, shape)
    engine.admit(0, TOKENS[:100], salt=None)
    assert engine.fork(0, 1, 2)
    engine.extend_all({1: [1], 2: [2]})
    page_map = page_map_of(engine)
    assert page_map.shared_refs > 0
    assert page_map.num_pages("shared") >= 3
    for seq_id in (0, 1, 2):
        for runs in slot_of(page_map, seq_id).runs:
            kinds = [run.kind for run in runs]
            assert kinds in (["shared", "live"], ["shared"], ["live"])
    engine.free(1, 2)
    assert {run.kind for runs in slot_of(page_map_of(engine), 0).runs for run in runs} == {"live"}
    engine.cache.close()


@pytest.mark.parametrize("kind", KINDS)
def test_what_only_the_prefix_index_has_is_in_no_slot(kind):
    engine = Engine(kind)
    engine.leave_prefix(0, TOKENS[:64])
    page_map = page_map_of(engine)
    assert page_map.cached_pages > 0
    assert page_map.num_pages("live") == page_map.num_pages("shared") == 0
    engine.admit(1, TOKENS[:64])
    before = page_map.cached_pages
    page_map = page_map_of(engine)
    # One sequence, and the index: that is not shared.
    assert page_map.cached_pages < before
    assert page_map.num_pages("shared") == 0
    engine.admit(2, TOKENS[:64])
    assert page_map_of(engine).num_pages("shared") > 0
    engine.cache.close()


@pytest.mark.parametrize("kind", VIRTUAL)
@pytest.mark.parametrize("shape", SHAPES)
def test_pages_ahead_and_parked(kind, shape):
    engine = Engine(kind, shape, commit_ahead_tokens=40)
    engine.admit(0, TOKENS[:9], salt=None)
    page_map = page_map_of(engine)
    assert page_map.num_pages("ahead") > 0
    assert slot_of(page_map, 0).runs[0][-1].kind == "ahead"
    engine.free(0)
    page_map = page_map_of(engine)
    assert page_map.num_pages("ahead") == page_map.num_pages("live") == 0
    (slot,) = page_map.slots
    assert (slot.seq_id, slot.num_tokens, slot.is_padding) == (None, 0, False)
    assert {run.kind for runs in slot.runs for run in runs} == {"parked"}
    engine.cache.close()


@pytest.mark.parametrize("kind", KINDS)
def test_padding_pins_and_swapped_groups_count(kind):
    engine = Engine(kind)
    engine.cache.batch_view([], [], pad_to=1)
    engine.leave_prefix(0, TOKENS[:40])
    assert engine.cache.pin_prefix(TOKENS[:40]) > 0
    assert page_map_of(engine).held_pages > 0
    engine.admit(1, TOKENS[:70])
    engine.fork(1, 2)
    assert engine.swap_out(2)  # what sequence 1 has too stays where it is
    page_map = page_map_of(engine)
    assert [slot.seq_id for slot in page_map.slots if not slot.is_padding] == [1]
    assert sum(slot.is_padding for slot in page_map.slots) == (engine.cache.name == "virtual")
    assert engine.swap_in(2)
    page_map_of(engine)
    engine.cache.close()


@pytest.mark.parametrize("kind", GIVE_BACK)
def test_a_sleeping_cache_shows_that_it_sleeps(kind):
    engine = Engine(kind)
    engine.admit(0, TOKENS[:40])
    assert engine.cache.try_sleep()
    page_map = engine.cache.page_map()
    check_page_map(page_map, engine.cache.stats())
    assert engine.cache.prefix_stats().num_lookups == 1
    assert page_map.is_asleep
    assert page_map.num_pages("live") == 0
    assert engine.cache.try_wake()
    page_map = page_map_of(engine)
    assert not page_map.is_asleep
    assert slot_of(page_map, 0).num_tokens == 40
    engine.cache.close()


@pytest.mark.parametrize("kind", KINDS)
def test_requests_and_json(kind):
    engine = Engine(kind)
    engine.admit(0, TOKENS[:40])
    engine.admit(7, TOKENS[:4])
    page_map = engine.cache.page_map().with_requests({0: "a"})
    assert {slot.seq_id: slot.request_id for slot in page_map.slots} == {0: "a", 7: None}
    engine.cache.close()
