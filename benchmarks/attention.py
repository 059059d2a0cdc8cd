"""CPU attention kernel against the best that torch's SDPA does on the same ragged batch.

Decode: 32 sequences of lognormal lengths (mean 400), one new token each, one layer. Between timed
calls the layers of a cache larger than the CPU's own caches take turns, as they do in a model.
Prefill: one prompt. The same rows also lie in shuffled blocks, for our kernel by block table.
Contenders run in rounds, each round in another order: drift hits all of them alike, and none always
runs right after another's code has left the caches.

Owns: nothing.  Thread-safety: single-threaded; sets torch's and the core's thread counts.
"""

from __future__ import annotations

import os

# libgomp reads this once, when torch loads it: its spinning workers would steal the core that the
# other contender needs.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vmalloc import _core
from vmalloc.backend import KVBatchView
from vmalloc.kernels.cpu import varlen_attention
from vmalloc.measuring.provenance import provenance, write_json

BATCH = 32
MEAN_LENGTH = 400
ROWS = 1024
HEAD_DIM = 64
SHAPES = [(12, 4), (4, 2)]  # query heads, KV heads
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPTS = [512, 1024]
BLOCK_SIZES = [16, 128]
# Cache bytes that a round of decode calls walks through: more than the last-level cache holds.
COLD_BYTES = 128 << 20

Contender = Callable[[int], Tensor]  # takes the layer's index
Layers = list[tuple[Tensor, Tensor]]  # K and V of each


@dataclass(frozen=True)
class Timing:
    """Microseconds per call of one contender."""

    name: str
    median_us: float
    min_us: float
    max_us: float


@dataclass(frozen=True)
class Result:
    """One workload; ``speedup`` is the best SDPA variant's median over ours.

    ``block_table`` is, by block size, the block-table kernel's median over the contiguous one's.
    ``speedup_of_minima`` compares the fastest calls: on a busy machine the medians of calls longer
    than a scheduler slice also count the time of other programs.
    """

    phase: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    threads: int
    tokens: int
    num_layers: int
    max_error: float
    timings: list[Timing]
    best_sdpa: str
    speedup: float
    speedup_of_minima: float
    block_table: dict[int, float]


def main() -> None:
    arguments = parse_arguments()
    results = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        _core.set_num_threads(threads)
        for num_heads, num_kv_heads in SHAPES:
            for dtype in DTYPES:
                shape = (num_heads, num_kv_heads, dtype, threads, arguments)
                results.append(bench_decode(*shape))
                results += [bench_prefill(length, *shape) for length in PROMPTS]
    Console(width=140).print(make_table(results))
    if arguments.json:
        machine = {**provenance(arguments.seed), "isa": _core.attention_isa()}
        write_json(arguments.json, {"provenance": machine, "results": list(map(asdict, results))})


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=40, help="timed rounds per workload")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="thread counts")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and values")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here too")
    return parser.parse_args()


def bench_decode(
    num_heads: int, num_kv_heads: int, dtype: str, threads: int, arguments: argparse.Namespace
) -> Result:
    """One new token for each of 32 sequences, all contenders on the same caches."""
    torch.manual_seed(arguments.seed)
    lengths = ragged_lengths(arguments.seed)
    element = DTYPES[dtype].itemsize
    layer_bytes = 2 * sum(lengths) * num_kv_heads * HEAD_DIM * element
    num_layers = max(2, -(-COLD_BYTES // layer_bytes))
    layers = make_layers(num_layers, BATCH, num_kv_heads, DTYPES[dtype])
    query = torch.randn(BATCH, num_heads, HEAD_DIM).to(DTYPES[dtype])
    view = make_view([1] * BATCH, lengths)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])[:, None, None]
    group = num_heads // num_kv_heads
    scale = HEAD_DIM**-0.5

    def ours(layer: int) -> Tensor:
        return varlen_attention(query, *layers[layer], view, softmax_scale=scale)

    def row_loop(layer: int, heads: tuple[int, int]) -> Tensor:
        k_cache, v_cache = layers[layer]
        rows = [
            F.scaled_dot_product_attention(
                query[i].view(1, *heads, HEAD_DIM),
                k_cache[i, :length].transpose(0, 1)[None],
                v_cache[i, :length].transpose(0, 1)[None],
                scale=scale,
                enable_gqa=heads[0] != num_kv_heads,
            )
            for i, length in enumerate(lengths)
        ]
        return torch.cat(rows).view(BATCH, num_heads, HEAD_DIM)

    def padded(layer: int, heads: tuple[int, int]) -> Tensor:
        k_cache, v_cache = layers[layer]
        return F.scaled_dot_product_attention(
            query.view(BATCH, *heads, HEAD_DIM),
            k_cache[:, : max(lengths)].transpose(1, 2),
            v_cache[:, : max(lengths)].transpose(1, 2),
            attn_mask=mask,
            scale=scale,
            enable_gqa=heads[0] != num_kv_heads,
        ).view(BATCH, num_heads, HEAD_DIM)

    plain, folded = (num_heads, 1), (num_kv_heads, group)
    contenders: dict[str, Contender] = {
        "vmalloc": ours,
        **block_contenders(query, layers, view, scale),
        "sdpa row loop, enable_gqa": lambda layer: row_loop(layer, plain),
        "sdpa row loop, folded": lambda layer: row_loop(layer, folded),
        "sdpa padded, enable_gqa": lambda layer: padded(layer, plain),
        "sdpa padded, folded": lambda layer: padded(layer, folded),
    }
    shape = (num_heads, num_kv_heads, HEAD_DIM, dtype, threads, sum(lengths))
    return measure("decode", shape, contenders, num_layers, arguments.repeats)


def bench_prefill(
    length: int,
    num_heads: int,
    num_kv_heads: int,
    dtype: str,
    threads: int,
    arguments: argparse.Namespace,
) -> Result:
    """One prompt of ``length`` tokens against its own keys, causal."""
    torch.manual_seed(arguments.seed)
    layers = make_layers(1, 1, num_kv_heads, DTYPES[dtype])
    [(k_cache, v_cache)] = layers
    query = torch.randn(length, num_heads, HEAD_DIM).to(DTYPES[dtype])
    view = make_view([length], [length])
    scale = HEAD_DIM**-0.5

    def ours(_layer: int) -> Tensor:
        return varlen_attention(query, k_cache, v_cache, view, softmax_scale=scale)

    def sdpa(_layer: int) -> Tensor:
        return F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            k_cache[:, :length].transpose(1, 2),
            v_cache[:, :length].transpose(1, 2),
            is_causal=True,
            enable_gqa=True,
        )[0].transpose(0, 1)

    contenders: dict[str, Contender] = {
        "vmalloc": ours,
        **block_contenders(query, layers, view, scale),
        "sdpa causal, enable_gqa": sdpa,
    }
    shape = (num_heads, num_kv_heads, HEAD_DIM, dtype, threads, length)
    return measure("prefill", shape, contenders, 1, max(5, arguments.repeats // 2))


def block_name(block_size: int) -> str:
    return f"vmalloc, blocks of {block_size}"


def block_contenders(
    query: Tensor, layers: Layers, view: KVBatchView, scale: float
) -> dict[str, Contender]:
    """Our kernel by block table over copies of the same rows, one contender per block size."""

    def contender(block_size: int) -> Contender:
        copies, by_table = in_blocks(layers, view, block_size)
        return lambda layer: varlen_attention(query, *copies[layer], by_table, softmax_scale=scale)

    return {block_name(size): contender(size) for size in BLOCK_SIZES}


def in_blocks(layers: Layers, view: KVBatchView, block_size: int) -> tuple[Layers, KVBatchView]:
    """Every sequence's rows in blocks taken from a pool in random order."""
    counts = [-(-length // block_size) for length in view.seqused_k.tolist()]
    pool = torch.randperm(sum(counts))
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for row, blocks in zip(table, pool.split(counts), strict=True):
        row[: len(blocks)] = blocks

    def copied(cache: Tensor) -> Tensor:
        blocks = cache.unflatten(1, (ROWS // block_size, block_size))
        used = torch.cat([rows[:count] for rows, count in zip(blocks, counts, strict=True)])
        return torch.empty_like(used).index_copy_(0, pool, used)

    copies = [(copied(k_cache), copied(v_cache)) for k_cache, v_cache in layers]
    return copies, replace(view, block_table=table)


def measure(
    phase: str,
    shape: tuple[int, int, int, str, int, int],
    contenders: dict[str, Contender],
    num_layers: int,
    repeats: int,
) -> Result:
    """Time the contenders in rounds, each on the next layer, after one call of each to compare."""
    ours, *others = [call(0).float() for call in contenders.values()]
    max_error = max((ours - other).abs().max().item() for other in others)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    layer = 0
    order = random.Random(0)
    for _ in range(repeats):
        for name in order.sample(list(contenders), len(contenders)):
            layer = (layer + 1) % num_layers
            start = time.perf_counter()
            contenders[name](layer)
            samples[name].append((time.perf_counter() - start) * 1e6)
    timings = [
        Timing(name, statistics.median(times), min(times), max(times))
        for name, times in samples.items()
    ]
    of_sdpa = [timing for timing in timings if timing.name.startswith("sdpa")]
    best = min(of_sdpa, key=lambda timing: timing.median_us)
    medians = {timing.name: timing.median_us for timing in timings}
    num_heads, num_kv_heads, head_dim, dtype, threads, tokens = shape
    return Result(
        phase,
        num_heads,
        num_kv_heads,
        head_dim,
        dtype,
        threads,
        tokens,
        num_layers,
        max_error,
        timings,
        best.name,
        best.median_us / timings[0].median_us,
        min(timing.min_us for timing in of_sdpa) / timings[0].min_us,
        {size: medians[block_name(size)] / timings[0].median_us for size in BLOCK_SIZES},
    )


def make_layers(num: int, batch: int, num_kv_heads: int, dtype: torch.dtype) -> Layers:
    def cache() -> Tensor:
        return torch.randn(batch, ROWS, num_kv_heads, HEAD_DIM, dtype=dtype)

    return [(cache(), cache()) for _ in range(num)]


def ragged_lengths(seed: int) -> list[int]:
    """Lognormal with the given mean, as chat lengths are."""
    sigma = 0.5
    draw = np.random.default_rng(seed).lognormal(np.log(MEAN_LENGTH) - sigma**2 / 2, sigma, BATCH)
    return [int(length) for length in draw.clip(16, ROWS)]


def make_view(q_lens: list[int], used: list[int]) -> KVBatchView:
    bounds = np.concatenate([[0], np.cumsum(q_lens)])

    def int32(values: object) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int32))

    return KVBatchView(
        int32(np.arange(len(used))), int32(bounds), int32(used), max(q_lens), max(used)
    )


def make_table(results: list[Result]) -> Table:
    table = Table(title=f"us per call, median (min..max); kernel: {_core.attention_isa()}")
    for column in (
        "workload",
        "heads",
        "dtype",
        "threads",
        "contender",
        "us",
        "block table / contiguous",
        "best SDPA / ours",
        "of minima",
    ):
        left = column in ("workload", "heads", "dtype", "contender")
        table.add_column(column, justify="left" if left else "right")
    for result in results:
        over_contiguous = {block_name(size): x for size, x in result.block_table.items()}
        for i, timing in enumerate(result.timings):
            first = i == 0
            table.add_row(
                f"{result.phase} {result.tokens} tokens" if first else "",
                f"{result.num_heads}/{result.num_kv_heads}" if first else "",
                result.dtype if first else "",
                str(result.threads) if first else "",
                timing.name + (" *" if timing.name == result.best_sdpa else ""),
                f"{timing.median_us:.0f} ({timing.min_us:.0f}..{timing.max_us:.0f})",
                f"{over_contiguous[timing.name]:.2f}" if timing.name in over_contiguous else "",
                f"{result.speedup:.2f}" if first else "",
                f"{result.speedup_of_minima:.2f}" if first else "",
                end_section=i + 1 == len(result.timings),
            )
    return table


if __name__ == "__main__":
    main()
