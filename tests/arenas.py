"""Small arenas for tests, and helpers to look into them."""

from tests.drivers import make_driver
from vmalloc import _core

ROW = 512  # bytes: 8 rows a page


def make_arena(driver=None, *, row_bytes=ROW, num_layers=1, **settings):
    """An arena whose layers each store ``row_bytes`` a token: one KV head of float32."""
    head_dim = row_bytes // 8
    assert head_dim * 8 == row_bytes
    layer = _core.LayerKVSpec(
        num_kv_heads=1, k_head_dim=head_dim, v_head_dim=head_dim, element_bytes=4
    )
    defaults = {
        "layers": [layer] * num_layers,
        "layers_per_group": num_layers,
        "num_slots": 4,
        "max_rows": 64,
        "max_pages": 16,
    }
    return _core.KVArena(driver or make_driver(), **{**defaults, **settings})


def admit(arena, num_rows):
    """Admit one sequence; its slot, or None."""
    slots = arena.try_admit(1, num_rows)
    arena.check_invariants()
    return None if slots is None else slots[0]


def extend(arena, slot, num_rows):
    ok = arena.try_extend([slot], [num_rows])
    arena.check_invariants()
    return ok


def free(arena, *slots):
    arena.free(list(slots))
    arena.check_invariants()


def pages(arena):
    """(committed, ahead, parked, free, retired)."""
    stats = arena.stats()
    assert stats["in_use_pages"] == (
        stats["committed_pages"]
        + stats["ahead_pages"]
        + stats["parked_pages"]
        + stats["cached_pages"]
    )
    return tuple(
        stats[name]
        for name in (
            "committed_pages",
            "ahead_pages",
            "parked_pages",
            "free_pages",
            "retired_pages",
        )
    )
