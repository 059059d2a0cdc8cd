"""VirtualKVCache as an engine meets it: views, batch views, errors, lifetime."""

import gc
import pickle
from pathlib import Path

import pytest
import torch

from vmalloc import (
    ClosedError,
    ConfigError,
    KVCacheConfig,
    LayerKVSpec,
    SequenceGroupSpec,
    VirtualKVCache,
    choose_backend,
    create_kv_backend,
)


def make_cache(**changes):
    layer = LayerKVSpec(num_kv_heads=3, k_head_dim=40, v_head_dim=24)
    settings = {
        "layers": (layer,) * 5,
        "max_num_seqs": 4,
        "max_seq_len": 200,
        "capacity_bytes": 4 << 20,
        "page_bytes": 4096,
        "commit_ahead_tokens": 0,
        **changes,
    }
    return VirtualKVCache(KVCacheConfig(**settings))


def num_page_mappings():
    return Path("/proc/self/maps").read_text().count("memfd:vmalloc")


def admit(cache, seq_id, num_tokens):
    reservation = cache.try_admit(SequenceGroupSpec((seq_id,), num_tokens))
    return None if reservation is None else reservation.slots[0]


@pytest.mark.parametrize("layers_per_group", [1, 2, 5])
@pytest.mark.parametrize("kv_split", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_views_of_all_layers_are_disjoint_and_keep_what_is_written(
    layers_per_group, kv_split, dtype
):
    layer = LayerKVSpec(num_kv_heads=3, k_head_dim=40, v_head_dim=24, dtype=dtype)
    cache = make_cache(layers=(layer,) * 5, layers_per_group=layers_per_group, kv_split=kv_split)
    slot = admit(cache, 0, 100)
    views = [view for i in range(5) for view in cache.layer_views(i)]
    for i, view in enumerate(views):
        assert view.shape == (8, 200, 3, 40 if i % 2 == 0 else 24)
        assert view.dtype == getattr(torch, dtype)
        view[slot, :100] = i + 1
    for i, view in enumerate(views):
        assert (view[slot, :100] == i + 1).all()
        assert (view[slot, 104:] == 0).all()  # uncommitted rows read zeros and cost nothing


def test_contiguous_rows_feed_an_unmodified_kernel():
    cache = make_cache(layers=(LayerKVSpec(num_kv_heads=2, k_head_dim=16, v_head_dim=16),) * 3)
    slot = admit(cache, 7, 50)
    k, v = cache.layer_views(1)
    generator = torch.Generator().manual_seed(0)
    k[slot, :50] = torch.randn(50, 2, 16, generator=generator)
    v[slot, :50] = torch.randn(50, 2, 16, generator=generator)
    q = torch.randn(1, 2, 1, 16, generator=generator)
    strided = torch.nn.functional.scaled_dot_product_attention(
        q, k[slot, :50].transpose(0, 1)[None], v[slot, :50].transpose(0, 1)[None]
    )
    copied = torch.nn.functional.scaled_dot_product_attention(
        q,
        k[slot, :50].transpose(0, 1)[None].contiguous(),
        v[slot, :50].transpose(0, 1)[None].contiguous(),
    )
    assert torch.allclose(strided, copied, atol=1e-6)


def test_batch_view_names_slots_lengths_and_new_rows():
    cache = make_cache()
    slots = [admit(cache, seq_id, 10 * seq_id) for seq_id in (1, 2, 3)]
    assert cache.try_extend([1, 3], [11, 36])
    view = cache.batch_view([3, 1], [6, 1])
    assert view.cache_batch_idx.tolist() == [slots[2], slots[0]]
    assert view.seqused_k.tolist() == [36, 11]
    assert view.cu_seqlens_q.tolist() == [0, 6, 7]
    assert (view.max_seqlen_q, view.max_seqlen_k) == (6, 36)
    assert view.block_table is None
    assert {view.cache_batch_idx.dtype, view.seqused_k.dtype, view.cu_seqlens_q.dtype} == {
        torch.int32
    }


def test_misuse_names_the_value_and_changes_nothing():
    cache = make_cache()
    admit(cache, 0, 10)
    bad_calls = [
        (lambda: cache.try_admit(SequenceGroupSpec((0,), 1)), "seq_id 0 is live already"),
        (lambda: cache.try_admit(SequenceGroupSpec((1, 1), 1)), "twice"),
        (lambda: cache.try_admit(SequenceGroupSpec((1,), 201)), "201.*200"),
        (lambda: cache.try_extend([5], [1]), "seq_id 5 is not live; 1 sequences are"),
        (lambda: cache.try_extend([0], [9]), "between the current 10 and the maximum, 200"),
        (lambda: cache.truncate(0, 11), "11.*10"),
        (lambda: cache.free([5]), "seq_id 5 is not live"),
        (lambda: cache.layer_views(5), "layer_idx is 5; it must be below 5"),
        (lambda: cache.resize(1), "new cap in pages is 0"),
    ]
    for call, words in bad_calls:
        with pytest.raises(ConfigError, match=words):
            call()
        cache.check_invariants()
        assert cache.seq_len(0) == 10
        assert cache.stats().num_live_seqs == 1


def test_running_out_is_a_value_that_changes_nothing():
    cache = make_cache(capacity_bytes=20 * 4096)
    assert cache.max_seq_tokens() == 20 * 4096 // (5 * 3 * (40 + 24) * 4)
    admit(cache, 0, 10)
    assert admit(cache, 1, 12) is None
    assert not cache.try_extend([0], [30])
    assert cache.seq_len(0) == 10
    assert cache.try_extend([0], [21])


def test_most_live_sequences_is_max_num_seqs_though_there_are_more_slots():
    cache = make_cache()
    for seq_id in range(4):
        assert admit(cache, seq_id, 1) is not None
    assert admit(cache, 4, 1) is None
    cache.free([2])
    assert admit(cache, 4, 1) is not None


def test_bytes_for_counts_whole_pages():
    cache = make_cache(page_bytes=65536)
    assert cache.bytes_for(0) == 0
    assert cache.bytes_for(1) == 65536
    assert cache.bytes_for(200) == -(-200 * 3840 // 65536) * 65536


def test_null_driver_counts_but_has_no_tensors():
    cache = make_cache(driver="null")
    assert cache.driver_name == "null"
    assert admit(cache, 0, 100) is not None
    assert cache.stats().live_bytes == 100 * 3840
    with pytest.raises(ConfigError, match="null driver"):
        cache.layer_views(0)


def test_closing_gives_memory_back_and_is_idempotent():
    cache = make_cache()
    slot = admit(cache, 0, 50)
    k, _ = cache.layer_views(0)
    k[slot, :50] = 1.0
    cache.close()
    cache.close()
    assert k.sum() == 0
    with pytest.raises(ClosedError):
        cache.stats()


def test_what_nobody_closed_goes_with_the_last_view():
    """By reference counting alone; until then the view shows what was written."""
    before = num_page_mappings()
    gc.disable()
    try:
        cache = make_cache()
        slot = admit(cache, 0, 50)
        part = cache.layer_views(3)[1][slot, 20:50]
        part.fill_(2.0)
        del cache
        assert (part == 2.0).all()
        assert num_page_mappings() > before
        del part
        assert num_page_mappings() == before
    finally:
        gc.enable()


def test_pickling_says_what_to_do_instead():
    with pytest.raises(TypeError, match="send its config"):
        pickle.dumps(make_cache())


def test_mixed_dtypes_are_scrubbed_between_sequences():
    layers = tuple(
        LayerKVSpec(num_kv_heads=1, k_head_dim=64, v_head_dim=64, dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    cache = make_cache(layers=layers, num_slots=4)
    slot = admit(cache, 0, 100)
    cache.layer_views(0)[0][slot, :100] = float("nan")
    cache.free([0])
    assert admit(cache, 1, 100) == slot
    assert (cache.layer_views(0)[0][slot, :100] == 0).all()


def test_auto_names_its_choice_and_reason():
    choice = choose_backend("auto")
    assert (choice.kind, choice.driver) == ("virtual", "host")
    assert choice.reason
    assert create_kv_backend(make_cache().config).name == "virtual"


@pytest.mark.parametrize("kind", ["contiguous", "block"])
def test_unknown_backend_is_refused_by_name(kind):
    with pytest.raises(ConfigError, match=kind):
        create_kv_backend(make_cache().config, kind=kind)
