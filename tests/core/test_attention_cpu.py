"""CPU attention against a float64 reference, and the bitwise promises it makes.

Owns: nothing.  Thread-safety: single-threaded tests; they set the core's own thread count.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.attention_batches import (
    DTYPES,
    NAN,
    RAGGED_Q,
    RAGGED_SLOTS,
    RAGGED_USED,
    assert_close,
    make_caches,
    make_view,
    reference,
    run_on_isa,
)
from vmalloc import _core
from vmalloc.backend import KVBatchView
from vmalloc.errors import ConfigError
from vmalloc.kernels.cpu import append_kv, varlen_attention


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Tests leave the thread count as they found it."""
    before = _core.num_threads()
    _core.set_num_threads(2)
    yield
    _core.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (4, 2), (6, 2), (8, 1), (14, 2)])
def test_ragged_batch_matches_float64(
    dtype: torch.dtype, head_dim: int, num_heads: int, num_kv_heads: int
) -> None:
    torch.manual_seed(head_dim + num_heads)
    k_cache, v_cache = make_caches(10, 200, num_kv_heads, head_dim, dtype)
    view = make_view(RAGGED_Q, RAGGED_USED, RAGGED_SLOTS)
    query = torch.randn(sum(RAGGED_Q), num_heads, head_dim).to(dtype)
    scale = head_dim**-0.5
    out = varlen_attention(query, k_cache, v_cache, view, softmax_scale=scale)
    assert out.dtype == dtype
    assert_close(out, reference(query, k_cache, v_cache, view, softmax_scale=scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("window_left", "softcap", "use_sinks"),
    [(0, 0.0, False), (15, 0.0, False), (63, 0.0, True), (64, 20.0, False), (-1, 1.5, True)],
)
def test_window_softcap_and_sinks_match_float64(
    dtype: torch.dtype, window_left: int, softcap: float, use_sinks: bool
) -> None:
    torch.manual_seed(window_left)
    k_cache, v_cache = make_caches(10, 200, 2, 64, dtype)
    view = make_view(RAGGED_Q, RAGGED_USED, RAGGED_SLOTS)
    query = torch.randn(sum(RAGGED_Q), 6, 64).to(dtype)
    sinks = torch.tensor([0.5, -3.0, 9.0, 0.0, -torch.inf, 2.0]) if use_sinks else None
    settings = {"softmax_scale": 0.25, "window_left": window_left, "softcap": softcap}
    out = varlen_attention(query, k_cache, v_cache, view, sinks=sinks, **settings)
    assert_close(out, reference(query, k_cache, v_cache, view, sinks=sinks, **settings))


@pytest.mark.parametrize("dtype", DTYPES)
def test_five_layers_of_three_heads_of_forty_keep_apart(dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    view = make_view([20, 1, 3], [20, 90, 50], [2, 0, 1])
    query = torch.randn(24, 6, 40).to(dtype)
    for layer in range(5):
        k_cache, v_cache = make_caches(3, 96, 3, 40, dtype, num_layers=5, layer=layer)
        out = varlen_attention(query, k_cache, v_cache, view, softmax_scale=0.2)
        assert_close(out, reference(query, k_cache, v_cache, view, softmax_scale=0.2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k_dim", "v_dim"), [(192, 128), (64, 40), (24, 256)])
def test_k_and_v_head_dims_may_differ(dtype: torch.dtype, k_dim: int, v_dim: int) -> None:
    torch.manual_seed(k_dim)
    k_cache, v_cache = make_caches(4, 130, 2, k_dim, dtype, v_head_dim=v_dim)
    view = make_view([1, 40, 1], [130, 100, 3], [3, 0, 1])
    query = torch.randn(42, 4, k_dim).to(dtype)
    out = varlen_attention(query, k_cache, v_cache, view, softmax_scale=0.1)
    assert out.shape == (42, 4, v_dim)
    assert_close(out, reference(query, k_cache, v_cache, view, softmax_scale=0.1))


def test_large_scores_neither_overflow_nor_lose_the_maximum() -> None:
    torch.manual_seed(6)
    k_cache, v_cache = make_caches(2, 200, 1, 64, torch.float32)
    query = 30 * torch.randn(200, 2, 64)
    view = make_view([200], [200], [1])
    out = varlen_attention(query, k_cache, v_cache, view, softmax_scale=1.0)
    expected = reference(query, k_cache, v_cache, view, softmax_scale=1.0)
    # Scores of a few hundred carry an error of a few 1e-5 themselves.
    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=0)


def test_query_and_out_may_be_strided_and_padding_rows_give_zero() -> None:
    torch.manual_seed(7)
    k_cache, v_cache = make_caches(2, 80, 2, 64, torch.float32)
    view = make_view([3, 1], [40, 80], [0, 1])
    packed = torch.randn(7, 3, 4, 64)
    query = packed[:, 1]
    storage = torch.full((7, 4, 2, 64), NAN)
    out = storage[:, :, 0]
    result = varlen_attention(query, k_cache, v_cache, view, softmax_scale=0.125, out=out)
    assert result is out
    assert_close(out, reference(query, k_cache, v_cache, view, softmax_scale=0.125))
    assert torch.equal(out[4:], torch.zeros(3, 4, 64))
    assert storage[:, :, 1].isnan().all()


def test_empty_batch_and_empty_sequences_are_fine() -> None:
    k_cache, v_cache = make_caches(2, 16, 1, 8, torch.float32)
    nothing = torch.empty(0, 2, 8)
    for view in (make_view([], [], []), make_view([0, 0], [0, 9], [0, 1])):
        append_kv(nothing[:, :1], nothing[:, :1], k_cache, v_cache, view)
        assert varlen_attention(nothing, k_cache, v_cache, view, softmax_scale=1.0).shape[0] == 0


# ---- the same bits, however a sequence is computed

BITWISE_SETTINGS = [
    {},
    {"window_left": 37},
    {"window_left": 100, "softcap": 5.0, "sinks": torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5, 4.0])},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [40, 64])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("settings", BITWISE_SETTINGS)
def test_bits_do_not_depend_on_chunking(
    dtype: torch.dtype, head_dim: int, num_kv_heads: int, settings: dict[str, object]
) -> None:
    torch.manual_seed(head_dim)
    total = 210
    k_cache, v_cache = make_caches(1, total, num_kv_heads, head_dim, dtype)
    query = torch.randn(total, 6, head_dim).to(dtype)

    def chunked(*sizes: int) -> Tensor:
        parts, done = [], 0
        for size in sizes:
            view = make_view([size], [done + size], [0])
            chunk = query[done : done + size]
            parts.append(
                varlen_attention(chunk, k_cache, v_cache, view, softmax_scale=0.2, **settings)  # type: ignore[arg-type]
            )
            done += size
        assert done == total
        return torch.cat(parts)

    whole = chunked(total)
    assert torch.equal(whole, chunked(*[1] * total))
    assert torch.equal(whole, chunked(64, 64, 64, 18))
    assert torch.equal(whole, chunked(1, 2, 3, 5, 7, 11, 13, 100, 68))
    assert torch.equal(whole, chunked(*[6] * 35))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_do_not_depend_on_batch_mates_slots_or_threads(
    dtype: torch.dtype, threads: int
) -> None:
    torch.manual_seed(8)
    k_cache, v_cache = make_caches(10, 700, 2, 64, dtype)
    q_lens, used = [1, 300, 1, 5, 64, 1, 200, 1], [700, 300, 9, 333, 64, 65, 650, 128]
    query = torch.randn(sum(q_lens), 6, 64).to(dtype)
    slots = [4, 1, 7, 0, 9, 2, 5, 3]
    view = make_view(q_lens, used, slots)
    _core.set_num_threads(threads)
    together = varlen_attention(query, k_cache, v_cache, view, softmax_scale=0.125)
    start = 0
    for q_len, length, slot in zip(q_lens, used, slots, strict=True):
        k_alone, v_alone = make_caches(2, length, 2, 64, dtype, num_layers=1, layer=0)
        k_alone[1], v_alone[1] = k_cache[slot, :length], v_cache[slot, :length]
        alone = varlen_attention(
            query[start : start + q_len],
            k_alone,
            v_alone,
            make_view([q_len], [length], [1]),
            softmax_scale=0.125,
        )
        assert torch.equal(together[start : start + q_len], alone)
        start += q_len


# ---- what lies outside a row's keys


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [40, 64])
@pytest.mark.parametrize("poison", [NAN, float("inf"), -float("inf")])
@pytest.mark.parametrize("window_left", [-1, 20])
def test_poison_outside_the_visible_keys_changes_nothing(
    dtype: torch.dtype, head_dim: int, poison: float, window_left: int
) -> None:
    torch.manual_seed(9)
    k_cache, v_cache = make_caches(4, 200, 2, head_dim, dtype)
    q_lens, used, slots = [1, 30, 5, 1], [150, 130, 70, 64], [3, 0, 2, 1]
    view = make_view(q_lens, used, slots)
    query = torch.randn(sum(q_lens), 4, head_dim).to(dtype)
    kwargs = {"softmax_scale": 0.2, "window_left": window_left}
    clean = varlen_attention(query, k_cache, v_cache, view, **kwargs)  # type: ignore[arg-type]
    for q_len, length, slot in zip(q_lens, used, slots, strict=True):
        k_cache[slot, length:], v_cache[slot, length:] = poison, poison
        if window_left >= 0:
            oldest = length - q_len - window_left
            k_cache[slot, :oldest], v_cache[slot, :oldest] = poison, poison
    poisoned = varlen_attention(query, k_cache, v_cache, view, **kwargs)  # type: ignore[arg-type]
    assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads", [2, 8])
def test_infinite_later_row_spoils_only_the_queries_that_see_it(
    dtype: torch.dtype, num_heads: int
) -> None:
    torch.manual_seed(10)
    k_cache, v_cache = make_caches(1, 100, 1, 64, dtype)
    query = torch.randn(100, num_heads, 64).to(dtype)
    view = make_view([100], [100], [0])
    clean = varlen_attention(query, k_cache, v_cache, view, softmax_scale=0.125)
    k_cache[0, 77], v_cache[0, 77] = NAN, float("inf")
    spoiled = varlen_attention(query, k_cache, v_cache, view, softmax_scale=0.125)
    assert torch.equal(clean[:77], spoiled[:77])
    assert not spoiled[77:].isfinite().any()


# ---- writing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_append_kv_writes_the_new_rows_and_no_others(dtype: torch.dtype, threads: int) -> None:
    torch.manual_seed(11)
    _core.set_num_threads(threads)
    k_cache, v_cache = make_caches(6, 400, 3, 40, dtype, v_head_dim=64)
    k_expected, v_expected = k_cache.clone(), v_cache.clone()
    q_lens, used, slots = [300, 1, 0, 17], [400, 5, 9, 17], [4, 0, 2, 5]
    key = torch.randn(320, 3, 40).to(dtype)  # two rows of padding
    value = torch.randn(320, 2, 3, 64).to(dtype)[:, 1]
    start = 0
    for q_len, length, slot in zip(q_lens, used, slots, strict=True):
        k_expected[slot, length - q_len : length] = key[start : start + q_len]
        v_expected[slot, length - q_len : length] = value[start : start + q_len]
        start += q_len
    append_kv(key, value, k_cache, v_cache, make_view(q_lens, used, slots))
    assert torch.equal(k_cache, k_expected)
    assert torch.equal(v_cache, v_expected)


# ---- threads, processes, instruction sets


def test_forked_child_computes_the_same_without_threads() -> None:
    torch.manual_seed(12)
    k_cache, v_cache = make_caches(4, 600, 2, 64, torch.float32)
    view = make_view([600, 1, 1], [600, 600, 300], [0, 1, 2])
    query = torch.randn(602, 4, 64)
    expected = varlen_attention(query, k_cache, v_cache, view, softmax_scale=0.125)
    child = os.fork()
    if child == 0:
        same = False
        try:
            signal.alarm(30)
            # Compared by numpy: torch's own parallel loops hang in a forked child.
            out = varlen_attention(query, k_cache, v_cache, view, softmax_scale=0.125)
            same = np.array_equal(out.numpy(), expected.numpy()) and _core.num_threads() == 1
            _core.set_num_threads(2)  # a child may start threads of its own
            out = varlen_attention(query, k_cache, v_cache, view, softmax_scale=0.125)
            same = same and np.array_equal(out.numpy(), expected.numpy())
        finally:
            os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


ISA_SCRIPT = """
from tests.core import test_attention_cpu as cases
from vmalloc import _core
for dtype in cases.DTYPES:
    for head_dim in (40, 64):
        cases.test_ragged_batch_matches_float64(dtype, head_dim, 6, 2)
        cases.test_bits_do_not_depend_on_chunking(dtype, head_dim, 2, cases.BITWISE_SETTINGS[2])
    cases.test_window_softcap_and_sinks_match_float64(dtype, 63, 1.5, True)
    cases.test_infinite_later_row_spoils_only_the_queries_that_see_it(dtype, 8)
print(_core.attention_isa())
"""


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_lower_instruction_sets_agree_with_the_reference(isa: str) -> None:
    result = run_on_isa(ISA_SCRIPT, isa)
    assert result.returncode == 0, result.stderr
    if result.stdout.strip() != isa:
        pytest.skip(f"this CPU has no {isa}")


def test_unknown_instruction_set_is_refused_by_name() -> None:
    result = run_on_isa("from vmalloc import _core; _core.attention_isa()", "sse9")
    assert result.returncode != 0
    assert 'VMALLOC_CPU_ISA is "sse9"' in result.stderr


@pytest.mark.parametrize("count", [0, 1025])
def test_set_num_threads_refuses_what_it_cannot_start(count: int) -> None:
    with pytest.raises(ConfigError, match=f"num_threads is {count}"):
        _core.set_num_threads(count)


# ---- bad arguments

GOOD = make_view([2, 1], [5, 8], [1, 0])


@pytest.mark.parametrize(
    ("view", "message"),
    [
        (make_view([2, 1], [5, 8], [1, 4]), r"cache_batch_idx\[1\] is 4, must be in \[0, 2\]"),
        (make_view([2, 1], [5, 8], [-1, 0]), r"cache_batch_idx\[0\] is -1"),
        (make_view([2, 1], [5, 17], [1, 0]), r"seqused_k\[1\] is 17, must be in \[1, 16\]"),
        (make_view([2, 1], [1, 8], [1, 0]), r"seqused_k\[0\] is 1, must be in \[2, 16\]"),
        (make_view([3, -1], [5, 8], [1, 0]), r"cu_seqlens_q\[2\] is 2, must be at least .* 3"),
        (make_view([2, 2], [5, 8], [1, 0]), r"cu_seqlens_q\[2\] is 4, must be at most .* 3"),
        (make_view([2, 1], [5, 8], [1]), r"cache_batch_idx 1, must be 3 and 2"),
    ],
)
def test_bad_indices_are_named_and_nothing_is_written(view: KVBatchView, message: str) -> None:
    k_cache, v_cache = make_caches(3, 16, 2, 8, torch.float32)
    before = k_cache.clone()
    with pytest.raises(ConfigError, match=message):
        append_kv(torch.randn(3, 2, 8), torch.randn(3, 2, 8), k_cache, v_cache, view)
    assert torch.equal(k_cache, before)
    out = torch.full((3, 4, 8), NAN)
    with pytest.raises(ConfigError, match=message):
        varlen_attention(torch.randn(3, 4, 8), k_cache, v_cache, view, softmax_scale=1.0, out=out)
    assert out.isnan().all()


@pytest.mark.parametrize(
    ("query", "caches", "kwargs", "message"),
    [
        (torch.randn(3, 4, 12), make_caches(3, 16, 2, 12, torch.float32), {}, "head_dim is 12"),
        (torch.randn(3, 4, 264), make_caches(3, 16, 2, 264, torch.float32), {}, "head_dim is 264"),
        (torch.randn(3, 5, 8), make_caches(3, 16, 2, 8, torch.float32), {}, "num_heads is 5"),
        (torch.randn(3, 4, 16), make_caches(3, 16, 2, 8, torch.float32), {}, "head_dim 16"),
        (torch.randn(3, 32), make_caches(3, 16, 2, 8, torch.float32), {}, "3 dimensions"),
        (torch.randn(3, 4, 8).half(), make_caches(3, 16, 2, 8, torch.float16), {}, "float16"),
        (torch.randn(3, 4, 8), make_caches(3, 16, 2, 8, torch.bfloat16), {}, "float32, must be"),
        (
            torch.randn(3, 8, 4).transpose(1, 2),
            make_caches(3, 16, 2, 8, torch.float32),
            {},
            "query has stride 4",
        ),
        (
            torch.randn(3, 4, 8, device="meta"),
            make_caches(3, 16, 2, 8, torch.float32),
            {},
            "query is on meta",
        ),
        (
            torch.randn(3, 4, 8),
            make_caches(3, 16, 2, 8, torch.float32),
            {"window_left": -2},
            "window_left is -2",
        ),
        (
            torch.randn(3, 4, 8),
            make_caches(3, 16, 2, 8, torch.float32),
            {"softcap": -1.0},
            "softcap is -1",
        ),
        (
            torch.randn(3, 4, 8),
            make_caches(3, 16, 2, 8, torch.float32),
            {"sinks": torch.zeros(3)},
            r"sinks is torch.float32 \(3,\)",
        ),
        (
            torch.randn(3, 4, 8),
            make_caches(3, 16, 2, 8, torch.float32),
            {"out": torch.empty(3, 4, 16)},
            r"out is torch.float32 \(3, 4, 16\)",
        ),
    ],
)
def test_bad_arguments_raise_config_error_naming_the_value(
    query: Tensor, caches: tuple[Tensor, Tensor], kwargs: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        varlen_attention(query, *caches, GOOD, softmax_scale=1.0, **kwargs)  # type: ignore[arg-type]


def test_wrong_index_dtype_is_refused() -> None:
    k_cache, v_cache = make_caches(3, 16, 2, 8, torch.float32)
    view = KVBatchView(GOOD.cache_batch_idx.long(), GOOD.cu_seqlens_q, GOOD.seqused_k, 2, 8)
    with pytest.raises(ConfigError, match=r"cache_batch_idx is torch.int64"):
        varlen_attention(torch.randn(3, 4, 8), k_cache, v_cache, view, softmax_scale=1.0)


def test_mismatched_key_and_value_are_refused() -> None:
    k_cache, v_cache = make_caches(3, 16, 2, 8, torch.float32)
    with pytest.raises(ConfigError, match=r"key has shape \(3, 1, 8\)"):
        append_kv(torch.randn(3, 1, 8), torch.randn(3, 2, 8), k_cache, v_cache, GOOD)
    with pytest.raises(ConfigError, match=r"value has shape \(2, 2, 8\)"):
        append_kv(torch.randn(3, 2, 8), torch.randn(2, 2, 8), k_cache, v_cache, GOOD)
    with pytest.raises(ConfigError, match=r"v_cache has shape \(3, 16, 1, 8\)"):
        append_kv(torch.randn(3, 2, 8), torch.randn(3, 2, 8), k_cache, v_cache[:, :, :1], GOOD)
