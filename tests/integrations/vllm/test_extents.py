"""Which bytes a block is in vLLM's layouts, and what committing it costs."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmalloc import ConfigError
from vmalloc.integrations.vllm.extents import Extents

MIB = 1 << 20
PAGE = 4096


def layer_outer(num_blocks, num_layers, stride):
    """vLLM's LBNHC and LBHNC: one run of blocks a layer."""
    size = num_blocks * num_layers * stride
    return config(num_blocks, size, num_layers, stride * num_blocks, stride)


def block_outer(num_blocks, num_layers, layer_bytes):
    """vLLM's BLNHC and BLHNC: all layers within the block."""
    stride = num_layers * layer_bytes
    return config(num_blocks, num_blocks * stride, num_layers, layer_bytes, stride)


def config(num_blocks, size, num_layers, layer_stride, block_stride):
    tensor = SimpleNamespace(
        size=size,
        layers=[f"layer.{idx}" for idx in range(num_layers)],
        layer_stride=layer_stride,
        block_stride=block_stride,
        offset=0,
    )
    return SimpleNamespace(num_blocks=num_blocks, kv_cache_tensors=[tensor])


def test_on_the_cpu_a_page_is_what_a_block_takes_in_a_layer():
    extents = Extents.of(layer_outer(100, 4, 128 * 1024), "cpu", None)
    assert (extents.page_bytes, extents.blocks_per_extent) == (128 * 1024, 1)
    assert extents.max_extent_pages == 4


def test_small_blocks_share_a_page_of_whole_blocks():
    extents = Extents.of(layer_outer(96, 4, 12 * 1024), "cpu", None)
    assert (extents.page_bytes, extents.blocks_per_extent) == (72 * 1024, 6)
    assert extents.max_extent_pages == 4


def test_on_cuda_an_8b_model_commits_32_blocks_of_each_layer():
    extents = Extents.of(layer_outer(1024, 32, 64 * 1024), "cuda", None)
    assert (extents.page_bytes, extents.blocks_per_extent) == (2 * MIB, 32)
    assert extents.max_extent_pages == 32


def test_on_cuda_with_blocks_outermost_it_commits_one_block_and_one_page():
    extents = Extents.of(block_outer(1024, 32, 64 * 1024), "cuda", None)
    assert (extents.page_bytes, extents.blocks_per_extent) == (2 * MIB, 1)
    assert extents.max_extent_pages == 1
    assert extents.byte_ranges([3, 4, 9]) == [
        range(6 * MIB, 10 * MIB),
        range(18 * MIB, 20 * MIB),
    ]


def test_heads_outside_the_blocks_are_refused():
    with pytest.raises(ConfigError, match="LBNHC"):
        Extents.of(config(64, 64 * 4 * 2 * 1024, 4, 64 * 2 * 1024, 1024), "cuda", None)


def test_a_model_without_a_cache_is_refused():
    with pytest.raises(ConfigError, match="no KV cache"):
        Extents.of(SimpleNamespace(num_blocks=1, kv_cache_tensors=[]), "cpu", None)


@given(
    num_blocks=st.integers(1, 60),
    num_layers=st.integers(1, 4),
    stride=st.integers(1, 9000),
    page=st.sampled_from([PAGE, 3 * PAGE]),
    is_outer=st.booleans(),
    data=st.data(),
)
def test_extents_cover_their_blocks_and_no_others(
    num_blocks, num_layers, stride, page, is_outer, data
):
    make = block_outer if is_outer else layer_outer
    made = make(num_blocks, num_layers, stride)
    extents = Extents.of(made, "cpu", page)
    chosen = data.draw(st.sets(st.integers(0, extents.num_extents - 1)))
    covered = [byte for part in extents.byte_ranges(chosen) for byte in part]
    tensor = made.kv_cache_tensors[0]
    expected = {
        layer * tensor.layer_stride + block_id * tensor.block_stride + byte
        for idx in chosen
        for block_id in extents.blocks(idx)
        for layer in range(num_layers)
        for byte in range(stride)
    }
    assert len(covered) == len(expected)
    assert set(covered) == expected
    for idx in chosen:
        parts = extents.byte_ranges([idx])
        num_pages = sum(part[-1] // page - part[0] // page + 1 for part in parts)
        assert num_pages <= extents.max_extent_pages
