"""The layout that nobody asked for: a layer a row, pages of a block, mappings within limits."""

from __future__ import annotations

import pytest

from vmalloc.config import LayerKVSpec
from vmalloc.engine.cpu_layout import MAX_PAGES, PAGE_TOKENS, choose_layout

KIB = 1 << 10


def layers(count: int, row_bytes: int) -> list[LayerKVSpec]:
    width = row_bytes // 8  # K and V of one head, four bytes each
    return [LayerKVSpec(num_kv_heads=1, k_head_dim=width, v_head_dim=width)] * count


@pytest.mark.parametrize(
    ("row_bytes", "cap_bytes", "expected"),
    [
        (1 * KIB, 256 << 20, (16 * KIB, 1)),
        (2 * KIB, 256 << 20, (32 * KIB, 1)),
        (4 * KIB, 256 << 20, (64 * KIB, 1)),
        (32 * KIB, 256 << 20, (64 * KIB, 1)),  # one page holds two tokens
        (256, 256 << 20, (16 * KIB, 4)),
        (64, 256 << 20, (16 * KIB, 6)),  # there are no more layers
        (1 * KIB, 513 << 20, (32 * KIB, 2)),
        (1 * KIB, 64 << 30, (64 * KIB, 4)),
    ],
)
def test_rows_and_pages_follow_from_a_layer_and_the_cap(row_bytes, cap_bytes, expected):
    layout = choose_layout(layers(6, row_bytes), cap_bytes)
    assert (layout.page_bytes, layout.layers_per_group) == expected
    if layout.page_bytes < 64 * KIB:
        assert cap_bytes // layout.page_bytes <= MAX_PAGES


def test_what_is_given_stays_and_the_other_dial_follows():
    assert choose_layout(layers(6, KIB), 1 << 30, page_bytes=4 * KIB).layers_per_group == 1
    wide = choose_layout(layers(6, KIB), 1 << 30, page_bytes=256 * KIB)
    assert (wide.page_bytes, wide.layers_per_group) == (256 * KIB, 6)
    grouped = choose_layout(layers(6, KIB), 1 << 20, layers_per_group=4)
    assert (grouped.page_bytes, grouped.layers_per_group) == (64 * KIB, 4)
    assert grouped.page_bytes // (4 * KIB) == PAGE_TOKENS
