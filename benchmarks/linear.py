"""Products of rows with Linear weights: ours against torch's F.linear, beside the FMA peak.

Two ways to run each shape: ``warm``, one weight again and again; ``stream``, the weights of as
many layers as ``--stream-mib`` holds, one after the other, as a decode step reads them. Both
contenders read the same tensors, in rounds, each first in every other round. Times are wall-clock
and, with one thread, also the thread's CPU time, which a busy machine disturbs less.

Owns: nothing.  Thread-safety: single-threaded; sets torch's and the core's thread counts.
"""

from __future__ import annotations

import os

# libgomp reads this once, when torch loads it: its spinning workers would steal the core that the
# other contender needs.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import ctypes
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vmalloc import _core
from vmalloc.measuring.provenance import provenance, write_json

SHAPES = [  # in_features, out_features
    (256, 256),
    (256, 512),
    (256, 704),
    (704, 256),
    (768, 768),
    (768, 2048),
    (2048, 768),
    (768, 8192),
]
ROWS = [1, 4, 16, 32, 64, 256]
MIN_SAMPLE_S = 0.002
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
}

Clock = Callable[[], float]
Contender = Callable[[int], None]  # takes the layer's index


@dataclass(frozen=True)
class Timing:
    """GFLOP/s of one contender: median, lowest and highest of the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """One shape; ``speedup`` is the median over rounds of torch's time over ours."""

    in_features: int
    out_features: int
    rows: int
    threads: int
    mode: str
    layers: int
    ours: Timing
    torch: Timing
    speedup: float
    share_of_peak: float


def main(
    repeats: Annotated[int, typer.Option(min=1, help="timed rounds per shape")] = 15,
    threads: Annotated[list[int] | None, typer.Option(help="thread counts; 1 and 2")] = None,
    rows: Annotated[list[int] | None, typer.Option(help="rows of x; 1 to 256")] = None,
    stream_mib: Annotated[int, typer.Option(min=1, help="weights that a round walks through")] = 24,
    seed: Annotated[int, typer.Option(help="of all values")] = 0,
    json: Annotated[Path | None, typer.Option(help="write the results here too")] = None,
) -> None:
    """Print GFLOP/s of both, with their spread, and the share of the peak that ours reaches."""
    torch.manual_seed(seed)
    results = []
    peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        library = compile_peak(Path(folder))
    for count in threads or [1, 2]:
        torch.set_num_threads(count)
        _core.set_num_threads(count)
        clock = time.thread_time if count == 1 else time.perf_counter
        peaks[count] = peak = measure_peak(library, count)
        for shape in SHAPES:
            for mode in ("warm", "stream"):
                results += bench_shape(
                    *shape, mode, stream_mib, rows or ROWS, count, repeats, clock, peak
                )
        Console(width=120).print(make_table([r for r in results if r.threads == count], peak))
    if json:
        machine = {**provenance(seed), "isa": _core.attention_isa(), "peak_gflops": peaks}
        write_json(json, {"provenance": machine, "results": [asdict(r) for r in results]})


def compile_peak(folder: Path) -> ctypes.CDLL:
    """The loop of multiply-adds, for the instruction set that our kernel uses."""
    library = folder / "fma_peak.so"
    compiler = os.environ.get("CXX", "c++")
    source = Path(__file__).parent / "fma_peak.cpp"
    flags = ["-O3", "-std=c++17", "-shared", "-fPIC", *ISA_FLAGS[_core.attention_isa()]]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.multiply_adds.restype = ctypes.c_double
    loaded.multiply_adds.argtypes = [ctypes.c_long, ctypes.c_void_p]
    return loaded


def measure_peak(library: ctypes.CDLL, threads: int) -> float:
    """GFLOP/s of multiply-adds in registers: the threads' best runs, added up.

    Each by its own CPU time, while all run.
    """
    bests = [0.0] * threads

    def run(thread: int) -> None:
        sink = torch.ones(16)
        for _ in range(30):
            start = time.thread_time()
            flops = library.multiply_adds(200_000, sink.data_ptr())
            bests[thread] = max(bests[thread], flops / (time.thread_time() - start) / 1e9)

    workers = [threading.Thread(target=run, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return sum(bests)


def bench_shape(
    in_features: int,
    out_features: int,
    mode: str,
    stream_mib: int,
    rows: list[int],
    threads: int,
    repeats: int,
    clock: Clock,
    peak: float,
) -> list[Result]:
    """One weight's shape for every count of rows."""
    weight_bytes = 4 * in_features * out_features
    layers = 1 if mode == "warm" else max(2, (stream_mib << 20) // weight_bytes)
    weights = [torch.randn(out_features, in_features) for _ in range(layers)]
    results = []
    for num_rows in rows:
        x = torch.randn(num_rows, in_features)
        out = torch.empty(num_rows, out_features)
        contenders = [our_linear(x, weights, out), torch_linear(x, weights)]
        gflop = 2e-9 * num_rows * in_features * out_features
        times = measure(contenders, layers, repeats, clock)
        ours, theirs = (timing([gflop / t for t in samples]) for samples in times)
        ratios = [other / own for own, other in zip(*times, strict=True)]
        results.append(
            Result(
                in_features,
                out_features,
                num_rows,
                threads,
                mode,
                layers,
                ours,
                theirs,
                statistics.median(ratios),
                ours.median / peak,
            )
        )
    return results


def our_linear(x: Tensor, weights: list[Tensor], out: Tensor) -> Contender:
    calls = [
        [
            (
                (x.data_ptr(), x.stride(0)),
                (weight.data_ptr(), weight.stride(0), 0, *weight.shape),
                None,
                (out.data_ptr(), out.stride(0)),
                0,
                1.0,
            )
        ]
        for weight in weights
    ]
    num_rows = x.shape[0]
    return lambda layer: _core.linear(calls[layer], num_rows)


def torch_linear(x: Tensor, weights: list[Tensor]) -> Contender:
    @torch.inference_mode()
    def run(layer: int) -> None:
        F.linear(x, weights[layer])

    return run


def measure(
    contenders: list[Contender], layers: int, repeats: int, clock: Clock
) -> list[list[float]]:
    """Seconds per call of each contender, by round."""
    calls = layers
    for contender in contenders:  # warm up, and see how many calls make a sample
        start = clock()
        for i in range(layers):
            contender(i)
        seconds = (clock() - start) / layers
        calls = max(calls, layers * int(MIN_SAMPLE_S / max(seconds, 1e-7) / layers))
    times: list[list[float]] = [[] for _ in contenders]
    for turn in range(repeats):
        for which in range(len(contenders)) if turn % 2 == 0 else (1, 0):
            start = clock()
            for i in range(calls):
                contenders[which](i % layers)
            times[which].append((clock() - start) / calls)
    return times


def timing(rates: list[float]) -> Timing:
    return Timing(statistics.median(rates), min(rates), max(rates))


def make_table(results: list[Result], peak: float) -> Table:
    threads = results[0].threads
    title = f"GFLOP/s, {threads} thread(s), {_core.attention_isa()}, FMA peak {peak:.0f}"
    table = Table(title=title)
    for column in ("in x out", "mode", "rows", "ours", "torch", "ours / torch", "of peak"):
        table.add_column(column, justify="left" if column in ("in x out", "mode") else "right")
    for result in results:
        table.add_row(
            f"{result.in_features} x {result.out_features}",
            f"{result.mode} ({result.layers})",
            str(result.rows),
            spelled(result.ours),
            spelled(result.torch),
            f"{result.speedup:.2f}",
            f"{result.share_of_peak:.0%}",
        )
    return table


def spelled(rate: Timing) -> str:
    return f"{rate.median:.0f} ({rate.low:.0f}..{rate.high:.0f})"


if __name__ == "__main__":
    typer.run(main)
