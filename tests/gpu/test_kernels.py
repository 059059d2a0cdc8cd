"""Every installed kernel over a cache that is mapped in part: on a GPU, with the real driver.

Reading past what is mapped ends the process with error 700, and what is mapped past a sequence's
end holds NaN. Needs pytest, torch and vmalloc alone. Under ``TRITON_INTERPRET=1`` the same bodies
run on the CPU over the host driver, with those kernels that can; nothing is captured there.

Owns: one cache per test.  Thread-safety: single-threaded tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.kernels.paged import DEVICE, NAN, PagedBatch, assert_close, reference
from vmalloc import KVCacheConfig, LayerKVSpec, VirtualKVCache
from vmalloc.backend import KVBatchView, SequenceGroupSpec
from vmalloc.errors import ConfigError
from vmalloc.kernels.contiguous.dispatch import KERNELS, ContiguousKernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE is None, reason="torch sees no CUDA device"),
]

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 128
NUM_LAYERS, LAYER = 3, 1
MAX_SEQ_LEN = 2048
SETTINGS = {"softmax_scale": HEAD_DIM**-0.5}
INSTALLED = [name for name in KERNELS if KERNELS[name]().absence() is None]


@dataclass
class Filled:
    """A cache, and what its sequences should hold: ``[length, heads, dim]`` of layer ``LAYER``."""

    cache: VirtualKVCache
    kernels: ContiguousKernels
    dtype: torch.dtype
    poison: float
    keys: dict[int, Tensor]
    values: dict[int, Tensor]

    def views(self) -> tuple[Tensor, Tensor]:
        return self.cache.layer_views(LAYER)

    def admit(self, seq_id: int, num_tokens: int) -> None:
        group = SequenceGroupSpec(seq_ids=(seq_id,), num_tokens=num_tokens)
        assert self.cache.try_admit(group) is not None
        shape = (0, NUM_KV_HEADS, HEAD_DIM)
        self.keys[seq_id] = torch.empty(shape, dtype=self.dtype)
        self.values[seq_id] = torch.empty(shape, dtype=self.dtype)
        self.poison_from(seq_id, 0)

    def poison_from(self, seq_id: int, row: int) -> None:
        """Fill what is mapped from ``row`` on, of every layer."""
        slot, mapped = self.cache.slot_of(seq_id), self.cache.mapped_rows(seq_id)
        for layer in range(NUM_LAYERS):
            for view in self.cache.layer_views(layer):
                view[slot, row:mapped] = self.poison

    def draw(self, seq_ids: Sequence[int], num_new: Sequence[int]) -> tuple[Tensor, Tensor]:
        """New rows of each sequence, packed, noted as what it holds from now on."""
        packed: list[list[Tensor]] = [[], []]
        for seq_id, count in zip(seq_ids, num_new, strict=True):
            for rows, held in zip(packed, (self.keys, self.values), strict=True):
                rows.append(torch.randn(count, NUM_KV_HEADS, HEAD_DIM).to(self.dtype))
                held[seq_id] = torch.cat([held[seq_id], rows[-1]])
        key, value = (torch.cat(rows).to(DEVICE) for rows in packed)
        return key, value

    def expected(self, query: Tensor, seq_ids: Sequence[int], bounds: Sequence[int]) -> Tensor:
        view = KVBatchView(
            torch.empty(0), torch.tensor(bounds, dtype=torch.int32), torch.empty(0), 0, 0
        )
        keys, values = ([held[seq_id] for seq_id in seq_ids] for held in (self.keys, self.values))
        batch = PagedBatch(*self.views(), view, keys, values)
        return reference(query, batch, **SETTINGS)


@contextmanager
def filled_cache(name: str, dtype: torch.dtype, **settings: object) -> Iterator[Filled]:
    """An empty cache for that kernel; skips the test where it refuses such caches."""
    layer = LayerKVSpec(
        num_kv_heads=NUM_KV_HEADS,
        k_head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
        dtype=str(dtype).removeprefix("torch."),
    )
    kernels = ContiguousKernels([layer], DEVICE or "cpu", num_heads=NUM_HEADS, prefer=[name])
    config = KVCacheConfig(
        layers=(layer,) * NUM_LAYERS,
        max_num_seqs=8,
        max_seq_len=MAX_SEQ_LEN,
        capacity_bytes=1 << 30,
        device=DEVICE or "cpu",
        commit_ahead_tokens=0,
        lookahead_tokens=kernels.lookahead_rows,
        **settings,  # type: ignore[arg-type]
    )
    # Whole tiles meet the rows behind the end with a weight of 0: those must be finite there.
    poison = 0.0 if kernels.lookahead_rows else NAN
    with VirtualKVCache(config) as cache:
        yield Filled(cache, kernels, dtype, poison, {}, {})


def step(
    filled: Filled, seq_ids: Sequence[int], num_new: Sequence[int], padding_rows: int = 0
) -> tuple[Tensor, Tensor]:
    """Write new rows of every sequence and attend them; what came out and what should have."""
    key, value = filled.draw(seq_ids, num_new)
    query = torch.randn(key.shape[0] + padding_rows, NUM_HEADS, HEAD_DIM).to(filled.dtype)
    opened = filled.cache.begin_step()
    view = filled.cache.batch_view(seq_ids, num_new)
    k_cache, v_cache = filled.views()
    filled.kernels.append_kv(key, value, k_cache, v_cache, view)
    try:
        out = filled.kernels.varlen_attention(query.to(DEVICE), k_cache, v_cache, view, **SETTINGS)
    except ConfigError as refusal:
        pytest.skip(str(refusal))
    filled.cache.end_step(opened)
    bounds = torch.tensor([0, *num_new]).cumsum(0).tolist()
    return out, filled.expected(query, seq_ids, bounds)


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layout", [{}, {"layers_per_group": 1}, {"kv_split": True}])
def test_prefill_then_decode_over_partly_mapped_slots(
    name: str, dtype: torch.dtype, layout: dict[str, object]
) -> None:
    torch.manual_seed(0)
    lengths = [1, 17, 100, 127, 128, 300] if DEVICE == "cpu" else [1, 17, 100, 128, 1000, 2047]
    with filled_cache(name, dtype, **layout) as filled:
        seq_ids = list(range(len(lengths)))
        for seq_id, length in zip(seq_ids, lengths, strict=True):
            filled.admit(seq_id, length)
        assert filled.cache.mapped_rows(0) < MAX_SEQ_LEN
        if name != "fa2":  # it decodes only
            out, expected = step(filled, seq_ids, lengths, padding_rows=3)
            assert_close(out, expected)
        else:
            for seq_id, length in zip(seq_ids, lengths, strict=True):
                key, value = filled.draw([seq_id], [length])
                k_cache, v_cache = filled.views()
                slot = filled.cache.slot_of(seq_id)
                k_cache[slot, :length], v_cache[slot, :length] = key, value
        for seq_id, length in zip(seq_ids, lengths, strict=True):
            filled.poison_from(seq_id, length)
        assert filled.cache.try_extend(seq_ids, [length + 1 for length in lengths])
        for seq_id, length in zip(seq_ids, lengths, strict=True):
            filled.poison_from(seq_id, length)
        out, expected = step(filled, seq_ids, [1] * len(seq_ids), padding_rows=2)
        assert_close(out, expected)


@pytest.mark.parametrize("name", [name for name in INSTALLED if name != "fa2"])
def test_chunks_and_decodes_in_one_batch(name: str) -> None:
    torch.manual_seed(1)
    with filled_cache(name, torch.bfloat16) as filled:
        for seq_id in range(3):
            filled.admit(seq_id, 40)
        out, expected = step(filled, [0, 1, 2], [40, 40, 40])
        assert_close(out, expected)
        assert filled.cache.try_extend([0, 1, 2], [41, 90, 42])
        out, expected = step(filled, [0, 1, 2], [1, 50, 2], padding_rows=5)
        assert_close(out, expected)


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """``work`` as a CUDA graph; run once before, as capture asks. On the CPU, ``work`` itself."""
    if DEVICE == "cpu":
        return work
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # thread_local: the cache's worker may call the driver meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


@pytest.mark.parametrize("name", [name for name in INSTALLED if KERNELS[name]().is_graph_safe])
def test_a_graph_follows_lengths_slots_and_mappings(name: str) -> None:
    """One capture; then other sequences, longer ones, and pages mapped between the replays."""
    from vmalloc.backend import KVBatchBuffers

    torch.manual_seed(2)
    batch, bucket = 4, 1024
    with filled_cache(name, torch.bfloat16) as filled:
        cache = filled.cache
        buffers = KVBatchBuffers.allocate(batch, 0, DEVICE or "cpu")
        shape = (batch, NUM_KV_HEADS, HEAD_DIM)
        key, value = (torch.zeros(shape, dtype=filled.dtype, device=DEVICE) for _ in range(2))
        query = torch.zeros(batch, NUM_HEADS, HEAD_DIM, dtype=filled.dtype, device=DEVICE)
        out = torch.zeros_like(query)
        k_cache, v_cache = filled.views()
        view = cache.batch_view((), (), out=buffers, pad_to=batch, max_seqlen_k=bucket)

        def decode() -> None:
            filled.kernels.append_kv(key, value, k_cache, v_cache, view)
            filled.kernels.varlen_attention(query, k_cache, v_cache, view, out=out, **SETTINGS)

        replay = captured(decode)
        mapped = []
        for seq_ids, num_tokens in (
            ([0], 1),
            ([0, 1], 16),
            ([2, 0, 1], 40),
            ([1], 130),
            ([0], 400),
        ):
            for seq_id in seq_ids:
                if seq_id not in filled.keys:
                    filled.admit(seq_id, 1)
                held = len(filled.keys[seq_id])
                assert cache.try_extend([seq_id], [max(num_tokens, held + 1)])
                filled.poison_from(seq_id, held)
                grown = cache.seq_len(seq_id) - held - 1
                rows = filled.draw([seq_id], [grown])
                slot = cache.slot_of(seq_id)
                for cached, new in zip((k_cache, v_cache), rows, strict=True):
                    cached[slot, held : held + grown] = new
            new_key, new_value = filled.draw(seq_ids, [1] * len(seq_ids))
            count = len(seq_ids)
            key[:count], value[:count] = new_key, new_value
            query.copy_(torch.randn(query.shape))
            opened = cache.begin_step()
            cache.batch_view(seq_ids, [1] * count, out=buffers, pad_to=batch, max_seqlen_k=bucket)
            replay()
            cache.end_step(opened)
            bounds = list(range(count + 1))
            assert_close(out[:count], filled.expected(query[:count].cpu(), seq_ids, bounds))
            mapped.append(sum(cache.mapped_rows(seq_id) for seq_id in filled.keys))
        assert len(set(mapped)) > 2, "no page was mapped between the replays"
