"""Public names are a promise: they change on purpose or not at all."""

import inspect

import vmalloc
import vmalloc.engine

LIBRARY = [
    "BackendChoice",
    "ClosedError",
    "ConfigError",
    "DriverError",
    "ElasticTensor",
    "InvariantError",
    "KVBackend",
    "KVBatchBuffers",
    "KVBatchView",
    "KVCacheConfig",
    "KVCacheStats",
    "LayerKVSpec",
    "MISS_REASONS",
    "PAGE_KINDS",
    "PageMap",
    "PageRun",
    "PagedKVCache",
    "PrefixCacheStats",
    "PrefixHit",
    "Reservation",
    "SequenceGroupSpec",
    "SlotPages",
    "Step",
    "VirtualKVCache",
    "VmallocError",
    "choose_backend",
    "create_kv_backend",
    "elastic_tensor",
]

BACKEND = [
    "batch_view",
    "begin_step",
    "bytes_for",
    "can_admit",
    "check_invariants",
    "close",
    "config",
    "end_step",
    "flush_prefixes",
    "free",
    "layer_views",
    "match_prefix",
    "max_seq_tokens",
    "name",
    "page_map",
    "pin_prefix",
    "prefetch",
    "prefix_stats",
    "register_tokens",
    "resize",
    "stats",
    "trim",
    "truncate",
    "try_admit",
    "try_extend",
    "try_fork",
    "try_reorder",
    "try_sleep",
    "try_swap_in",
    "try_swap_out",
    "try_wake",
    "unpin_prefix",
    "wait_worker",
]


def public_members(cls):
    return sorted(name for name, _ in inspect.getmembers(cls) if not name.startswith("_"))


def test_library_names():
    assert sorted(vmalloc.__all__) == LIBRARY
    assert set(LIBRARY) <= set(dir(vmalloc))
    for name in LIBRARY:
        assert getattr(vmalloc, name).__doc__ or name in ("MISS_REASONS", "PAGE_KINDS")


def test_backend_protocol():
    assert public_members(vmalloc.KVBackend) == BACKEND


LEDGER = {"live_seq_ids", "page_table", "prefix_nodes", "swapped_seq_ids"}


def test_virtual_cache_offers_the_protocol_and_a_few_things_more():
    more = {"driver_name", "layout", "mapped_rows", "pause_worker", "run_worker", "seq_len"}
    more |= {"slot_of", "supply", "try_assign", *LEDGER}
    assert public_members(vmalloc.VirtualKVCache) == sorted({*BACKEND, *more})


def test_paged_cache_offers_the_protocol_and_a_few_things_more():
    more = {"block_ids", "driver_name", "seq_len", *LEDGER}
    assert public_members(vmalloc.PagedKVCache) == sorted({*BACKEND, *more})


def test_errors_form_one_tree():
    for name in ("ConfigError", "DriverError", "InvariantError", "ClosedError"):
        assert issubclass(getattr(vmalloc, name), vmalloc.VmallocError)
    assert issubclass(vmalloc.ConfigError, ValueError)


def test_unknown_name_is_an_attribute_error():
    assert not hasattr(vmalloc, "NoSuchName")


def test_every_public_function_and_class_has_a_docstring():
    for cls in (vmalloc.KVBackend, vmalloc.VirtualKVCache, vmalloc.PagedKVCache):
        for name in ("try_admit", "try_extend", "free", "layer_views", "batch_view"):
            documented = getattr(cls, name).__doc__ or getattr(vmalloc.KVBackend, name).__doc__
            assert documented, f"{cls.__name__}.{name}"
