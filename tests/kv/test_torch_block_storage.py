"""Blocks in torch tensors: all memory at start, contents that move, and nothing given back."""

import gc
import weakref

import numpy as np
import pytest
import torch

from vmalloc import ClosedError, ConfigError, torch_block_storage

from .backends import BASES, Engine, books, make_cache

A, B, C = BASES


def test_all_blocks_of_the_cap_are_there_from_the_start():
    cache = make_cache("paged(torch)", "power of two", capacity_bytes=20 * 4096)
    stats = cache.stats()
    assert cache.driver_name == "torch"
    assert stats.reserved_bytes == stats.capacity_bytes == 20 * 4096
    assert (stats.created_pages, stats.free_pages, stats.in_use_pages) == (20, 20, 0)
    key, value = cache.layer_views(0)
    assert len(key) == len(value) == 20
    assert (key == 0).all()  # a kernel may read what nobody wrote: it must be finite


def test_nothing_goes_back_and_the_books_say_so():
    engine = Engine("paged(torch)", "power of two", capacity_bytes=20 * 4096, high_watermark=0.1)
    engine.admit(0, A[:60])
    engine.admit(1, B[:10])
    engine.free(0, keep_prefix=False)
    before = books(engine.cache)
    assert engine.cache.trim() == 0
    assert not engine.cache.try_sleep()
    assert books(engine.cache) == before
    assert engine.cache.stats().created_pages == 20
    assert engine.cache.stats().unmap_calls == 0
    assert engine.admit(2, C[:68]) == 0
    engine.check()


def test_the_cap_moves_within_what_was_taken():
    engine = Engine("paged(torch)", "power of two", capacity_bytes=20 * 4096)
    cache = engine.cache
    engine.admit(0, A[:40])
    cache.resize(10 * 4096)
    assert not engine.extend(0, 1)
    assert cache.stats().created_pages == 20
    cache.resize(20 * 4096)
    assert engine.extend(0, 1)
    with pytest.raises(ConfigError, match="cap in pages is 21"):
        cache.resize(21 * 4096)
    engine.check()


@pytest.mark.parametrize("staging_bytes", [1, 10_000, 1 << 20])
def test_swapping_moves_contents_whatever_fits_the_staging_memory(monkeypatch, staging_bytes):
    monkeypatch.setattr(torch_block_storage, "STAGING_BYTES", staging_bytes)
    engine = Engine("paged(torch)", "odd, per layer")
    engine.admit(0, A[:50])
    engine.fork(0, 1)
    engine.extend_all({0: [1, 2], 1: [3]})
    assert engine.swap_out(0, 1)
    engine.admit(2, B[:100])
    assert engine.swap_in(1, 0)
    engine.check()


def test_a_cap_that_the_device_does_not_have_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"capacity_bytes is 1125899906842624.*all of it"):
        make_cache("paged(torch)", capacity_bytes=1 << 50, block_size=1 << 24)


def test_closing_lets_go_of_the_memory_with_the_last_tensor():
    engine = Engine("paged(torch)")
    engine.admit(0, A[:50])
    cache = engine.cache
    storage = weakref.ref(cache._storage._regions[0])
    key, _ = cache.layer_views(0)
    cache.close()
    cache.close()
    with pytest.raises(ClosedError):
        cache.layer_views(0)
    assert key.sum() != 0  # who still has a tensor has its memory
    del key, engine
    gc.collect()
    assert storage() is None


def test_copies_of_one_call_leave_in_one_batch():
    engine = Engine("paged(torch)")
    engine.admit(0, A[:10])
    engine.fork(0, 1, 2, 3)
    batches = []
    storage = engine.cache._storage
    copy_rows = storage.copy_rows
    storage.copy_rows = lambda copies: (batches.append(list(copies)), copy_rows(copies))
    assert engine.extend_all({i: [i] for i in range(4)})
    assert [len(batch) for batch in batches] == [3]
    assert {(source, rows) for source, _, rows in batches[0]} == {(batches[0][0][0], 2)}
    engine.check()


def test_bytes_read_are_bytes_written():
    cache = make_cache("paged(torch)", "odd, per layer")
    storage = cache._storage
    generator = np.random.default_rng(0)
    blocks = np.array([7, 0, 3], np.int32)
    data = [
        generator.integers(0, 256, contents.shape, np.uint8) for contents in storage.read(blocks)
    ]
    storage.write(blocks, data)
    for one, other in zip(storage.read(blocks[::-1].copy()), data, strict=True):
        assert np.array_equal(one, other[::-1])
    storage.clear(blocks[:1])
    key, _ = cache.layer_views(0)
    assert (key[7].view(torch.int32) == 0).all()
    assert np.array_equal(storage.read(blocks[1:])[2], data[2][1:])
