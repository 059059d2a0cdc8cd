"""What is compared: names, words, units, and which way is better.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .statistics import Better

Unit = Literal["rate", "ms", "us", "bytes", "share", "count"]
Group = Literal["Throughput", "Latency", "KV memory", "Batches", "Allocator"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the tables.

    Attributes:
        name: key of ``Run.values``.
        words: what tables call it.
        explanation: what it is exactly.
        is_headline: whether it stands in the overview and in the terminal.
    """

    name: str
    words: str
    group: Group
    unit: Unit
    better: Better
    explanation: str
    is_headline: bool = False


# fmt: off
METRICS: tuple[Metric, ...] = (
    Metric("output_tokens_per_s", "Output tokens/s", "Throughput", "rate", "higher",
           "tokens of all completions over wall-clock time, from the first arrival to the last "
           "token; where requests arrive in real time, they set the pace", is_headline=True),
    Metric("output_tokens_per_cpu_s", "Output tokens per CPU s", "Throughput", "rate", "higher",
           "the same over CPU time of the process, all threads: what a busy machine does not "
           "disturb", is_headline=True),

    Metric("ttft_p50_ms", "TTFT p50", "Latency", "ms", "lower",
           "from when a request is due to its first token", is_headline=True),
    Metric("ttft_p90_ms", "TTFT p90", "Latency", "ms", "lower", "its percentile 90"),
    Metric("ttft_p99_ms", "TTFT p99", "Latency", "ms", "lower", "its percentile 99",
           is_headline=True),
    Metric("tpot_p50_ms", "TPOT p50", "Latency", "ms", "lower",
           "mean time of a completion's tokens after the first", is_headline=True),
    Metric("tpot_p90_ms", "TPOT p90", "Latency", "ms", "lower", "its percentile 90"),
    Metric("tpot_p99_ms", "TPOT p99", "Latency", "ms", "lower", "its percentile 99"),
    Metric("itl_p50_ms", "ITL p50", "Latency", "ms", "lower",
           "time between two tokens of a completion; beams have none to show"),
    Metric("itl_p90_ms", "ITL p90", "Latency", "ms", "lower", "its percentile 90"),
    Metric("itl_p99_ms", "ITL p99", "Latency", "ms", "lower", "its percentile 99",
           is_headline=True),

    Metric("peak_held_bytes", "Held, peak", "KV memory", "bytes", "lower",
           "physical KV memory of the process, free pages included", is_headline=True),
    Metric("mean_held_bytes", "Held, mean", "KV memory", "bytes", "lower",
           "the same, averaged over time", is_headline=True),
    Metric("peak_live_bytes", "Live, peak", "KV memory", "bytes", "neither",
           "K and V of tokens that exist"),
    Metric("mean_live_bytes", "Live, mean", "KV memory", "bytes", "neither",
           "the same, averaged over time"),
    Metric("peak_committed_bytes", "Committed, peak", "KV memory", "bytes", "neither",
           "pages that hold live rows"),
    Metric("mean_committed_bytes", "Committed, mean", "KV memory", "bytes", "neither",
           "the same, averaged over time"),
    Metric("mean_ahead_bytes", "Ahead, mean", "KV memory", "bytes", "lower",
           "pages mapped past the ends of sequences"),
    Metric("mean_parked_bytes", "Parked, mean", "KV memory", "bytes", "lower",
           "pages still mapped in free slots"),
    Metric("mean_cached_bytes", "Cached, mean", "KV memory", "bytes", "neither",
           "pages that only the prefix cache has"),
    Metric("mean_retired_bytes", "Retired, mean", "KV memory", "bytes", "lower",
           "pages that wait for the end of a step"),
    Metric("mean_free_bytes", "Free, mean", "KV memory", "bytes", "neither",
           "pages that the driver keeps for later"),
    Metric("mean_shared_bytes", "Saved by sharing, mean", "KV memory", "bytes", "neither",
           "a page for each further reference to one"),
    Metric("waste", "Waste", "KV memory", "share", "lower",
           "committed memory that holds no live row, over all steps", is_headline=True),
    Metric("waste_all", "Waste, all taken", "KV memory", "share", "lower",
           "the same where pages ahead, parked and retired count as committed", is_headline=True),

    Metric("largest_batch", "Largest batch", "Batches", "count", "higher",
           "most sequences with memory at once under the cap", is_headline=True),
    Metric("mean_batch", "Mean batch", "Batches", "count", "higher",
           "sequences with memory, averaged over time"),
    Metric("preemptions", "Preemptions", "Batches", "count", "lower",
           "requests that had to give up their memory", is_headline=True),
    Metric("preempt_swap", "Preempted by swap", "Batches", "count", "neither",
           "copied to host memory"),
    Metric("preempt_recompute", "Preempted by recompute", "Batches", "count", "neither",
           "dropped, to be computed again"),
    Metric("recomputed_tokens", "Tokens computed twice", "Batches", "count", "lower",
           "computed tokens that were dropped"),
    Metric("cached_tokens", "Prompt tokens from the cache", "Batches", "count", "higher",
           "not computed, as their K and V were there"),
    Metric("cow_copies", "Pages copied before a write", "Batches", "count", "neither",
           "whole or in part; a page, or a block"),
    Metric("failed_requests", "Requests that do not fit", "Batches", "count", "lower",
           "ended with an error, alone"),

    Metric("allocator_ms", "On the critical path", "Allocator", "ms", "lower",
           "wall-clock time of the engine in the backend's calls: lookup, admission, growth, "
           "forks, release; over the run", is_headline=True),
    Metric("allocator_cpu_ms", "On the critical path, CPU", "Allocator", "ms", "lower",
           "CPU time of the engine's thread in these calls"),
    Metric("allocator_step_us", "CPU of a step", "Allocator", "us", "lower",
           "the same over the number of steps", is_headline=True),
    Metric("worker_cpu_ms", "Off the critical path, CPU", "Allocator", "ms", "neither",
           "CPU time of the commit worker's thread; paged has none", is_headline=True),
    Metric("views_cpu_ms", "Batch views, CPU", "Allocator", "ms", "lower",
           "telling kernels where the memory is: slots, or block tables"),
    Metric("stall_ms", "Stalls", "Allocator", "ms", "neither",
           "of the critical path, waiting for pages to be mapped; paged counts none"),
    Metric("swap_ms", "Swaps", "Allocator", "ms", "lower", "copies to host memory and back"),
    Metric("critical_pages", "Pages taken on the critical path", "Allocator", "count", "neither",
           "pages, or blocks"),
    Metric("background_pages", "Pages mapped by the worker", "Allocator", "count", "neither",
           "before they were needed"),
)
# fmt: on
HEADLINES = tuple(metric for metric in METRICS if metric.is_headline)


def format_value(value: float | None, unit: Unit) -> str:
    """A value for people, e.g. ``"1,234"``, ``"12.3 MiB"``, ``"4.5%"``; ``"-"`` for None."""
    if value is None:
        return "-"
    if unit == "bytes":
        return f"{value / 2**20:,.2f} MiB"
    if unit == "share":
        return f"{100 * value:.1f}%"
    if unit == "count" and value == round(value):
        return f"{value:,.0f}"
    return _short(value)


def format_range_end(value: float, unit: Unit) -> str:
    """The same without the unit, for a range behind a value that has it."""
    return format_value(value, unit).removesuffix(" MiB").removesuffix("%")


def _short(value: float) -> str:
    """Three digits or more, never in powers of ten."""
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 or value == 0 else f"{value:.3f}"
