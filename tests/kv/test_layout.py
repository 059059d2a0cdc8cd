"""Layout arithmetic against the core's, and by properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmalloc import ConfigError, KVCacheConfig, LayerKVSpec, VirtualKVCache
from vmalloc.layout import plan_layout

specs = st.builds(
    LayerKVSpec,
    num_kv_heads=st.integers(1, 8),
    k_head_dim=st.integers(1, 20).map(lambda n: 8 * n),
    v_head_dim=st.integers(1, 20).map(lambda n: 8 * n),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)


@st.composite
def configs(draw):
    layers = tuple(draw(st.lists(specs, min_size=1, max_size=7)))
    return KVCacheConfig(
        layers=layers,
        max_num_seqs=draw(st.integers(1, 4)),
        max_seq_len=draw(st.integers(1, 3000)),
        capacity_bytes=1 << 30,
        driver="null",
        page_bytes=draw(st.sampled_from([4096, 12288, 65536, 2 << 20])),
        layers_per_group=draw(st.integers(1, len(layers)) | st.none()),
        kv_split=draw(st.booleans()),
    )


@given(configs())
def test_layout_agrees_with_the_core(config):
    cache = VirtualKVCache(config)
    arena = cache._arena
    layout = cache.layout
    regions = range(arena.num_regions)
    assert layout.row_bytes == tuple(arena.region_row_bytes(i) for i in regions)
    assert layout.slot_bytes == tuple(arena.region_slot_bytes(i) for i in regions)
    assert layout.reserved_bytes == cache.stats().reserved_bytes
    assert layout.token_bytes == config.token_bytes


@given(configs())
def test_slots_hold_all_rows_on_page_and_row_boundaries(config):
    layout = plan_layout(config, config.page_bytes)
    for row, slot in zip(layout.row_bytes, layout.slot_bytes, strict=True):
        assert slot % row == 0
        assert slot % config.page_bytes == 0
        assert slot >= config.max_seq_len * row


@given(configs())
def test_layers_fill_rows_without_overlap_or_gap(config):
    layout = plan_layout(config, config.page_bytes)
    spans = [[] for _ in layout.row_bytes]
    for spec, place in zip(config.layers, layout.placements, strict=True):
        spans[place.k_region].append((place.k_offset, spec.k_bytes))
        spans[place.v_region].append((place.v_offset, spec.v_bytes))
    for row, parts in zip(layout.row_bytes, spans, strict=True):
        end = 0
        for offset, size in sorted(parts):
            assert offset == end
            end += size
        assert end == row


@given(configs(), st.integers(0, 3000))
def test_pages_are_the_fewest_that_hold_the_tokens(config, num_tokens):
    layout = plan_layout(config, config.page_bytes)
    pages = layout.pages_for(num_tokens)
    live = num_tokens * layout.token_bytes
    assert live <= pages * config.page_bytes < live + len(layout.row_bytes) * config.page_bytes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": ()}, "layers is empty"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_seq_len": 0}, "max_seq_len is 0"),
        ({"capacity_bytes": 0}, "capacity_bytes is 0"),
        ({"capacity_bytes": 65536}, "holds 1 pages of 65536.*at least 2"),
        ({"driver": "tpu"}, "driver is 'tpu'"),
        ({"page_bytes": 5000}, "page_bytes is 5000.*granularity, 4096"),
        ({"page_bytes": -1}, "page_bytes is -1"),
        ({"layers_per_group": 3}, "layers_per_group is 3.*number of layers, 2"),
        ({"num_slots": 3}, "num_slots is 3.*max_num_seqs, 4"),
        (
            {"max_num_seqs": 1 << 22, "max_seq_len": 1 << 22},
            "address space cannot hold 8388608 slots",
        ),
        ({"commit_ahead_tokens": -1}, "commit_ahead_tokens is -1"),
        ({"lookahead_tokens": -1}, "lookahead_tokens is -1"),
        ({"low_watermark": 1.5}, "low_watermark is 1.5"),
        ({"low_watermark": 0.9, "high_watermark": 0.5}, "must not exceed high_watermark, 0.5"),
    ],
)
def test_bad_settings_name_the_value_and_the_limit(changes, words):
    layer = LayerKVSpec(num_kv_heads=2, k_head_dim=64, v_head_dim=64)
    settings = {
        "layers": (layer, layer),
        "max_num_seqs": 4,
        "max_seq_len": 128,
        "capacity_bytes": 1 << 24,
        **changes,
    }
    with pytest.raises(ConfigError, match=words):
        VirtualKVCache(KVCacheConfig(**settings))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_kv_heads": 0}, "num_kv_heads is 0"),
        ({"k_head_dim": -8}, "k_head_dim is -8"),
        ({"dtype": "int3"}, "dtype is 'int3'; supported: float32, bfloat16, float16"),
        ({"window": 0}, "window is 0"),
    ],
)
def test_bad_layers_name_the_value_and_the_limit(changes, words):
    with pytest.raises(ConfigError, match=words):
        LayerKVSpec(**{"num_kv_heads": 2, "k_head_dim": 64, "v_head_dim": 64, **changes})
