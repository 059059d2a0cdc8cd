"""The ranks of a tensor-parallel engine, as Prometheus reads them.

Owns: nothing but the tables of names.  Thread-safety: pure functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from ..engine import EngineSnapshot, RankReport

RANK_GAUGES = {
    "created_pages": "Pages that the driver of a rank holds",
    "free_pages": "Created pages of a rank that nothing uses",
    "in_use_pages": "Created pages of a rank that something uses",
    "committed_bytes": "Pages of a rank that hold rows of live sequences",
    "ahead_bytes": "Pages of a rank mapped before they are needed",
    "parked_bytes": "Pages of a rank still mapped in free slots",
}
"""``KVCacheStats`` fields that are exported as ``vmalloc_rank_kv_FIELD``."""

RANK_COUNTERS = {
    "critical_pages": "Pages of a rank mapped while it waited",
    "background_pages": "Pages of a rank mapped by its worker",
}
"""``KVCacheStats`` fields that are exported as ``vmalloc_rank_kv_FIELD_total``."""

PLAN_COUNTERS = {
    "num_steps": ("steps", "Steps that all ranks computed"),
    "num_bytes": ("bytes", "Bytes of the messages that planned these steps, for one rank"),
    "send_s": ("send_seconds", "Time in which rank 0 handed plans over"),
    "wait_s": ("wait_seconds", "Time in which rank 0 waited for the votes on a plan"),
    "lag_s": ("lag_seconds", "By how much the slowest rank ended its steps later than rank 0"),
    "num_grants": ("grants", "Rounds in which pages were granted on all ranks"),
    "grant_s": ("grant_seconds", "Time of these rounds"),
    "num_void": ("void", "Plans that a rank could not carry out, so that none did"),
}
"""``PlanTimes`` fields that are exported as ``vmalloc_plan_NAME_total``."""


def plan_families(snapshot: EngineSnapshot) -> Iterator[Metric]:
    """What it takes to have all ranks do the same; nothing for one alone."""
    if snapshot.plan_times is not None:
        for field, (name, help) in PLAN_COUNTERS.items():
            value = getattr(snapshot.plan_times, field)
            yield CounterMetricFamily(f"vmalloc_plan_{name}", help, value=value)


def rank_families(reports: Sequence[RankReport]) -> Iterator[Metric]:
    """What may differ from rank to rank."""
    if not reports:
        return
    ranks = [str(report.rank) for report in reports]
    all_stats = [report.kv_stats for report in reports]
    for field, help in RANK_GAUGES.items():
        gauge = GaugeMetricFamily(f"vmalloc_rank_kv_{field}", help, labels=["rank"])
        for rank, stats in zip(ranks, all_stats, strict=True):
            gauge.add_metric([rank], getattr(stats, field))
        yield gauge
    for field, help in RANK_COUNTERS.items():
        counter = CounterMetricFamily(f"vmalloc_rank_kv_{field}", help, labels=["rank"])
        for rank, stats in zip(ranks, all_stats, strict=True):
            counter.add_metric([rank], getattr(stats, field))
        yield counter
    stalls = CounterMetricFamily(
        "vmalloc_rank_kv_stall_seconds", "Time a rank waited for pages", labels=["rank"]
    )
    peaks = GaugeMetricFamily(
        "vmalloc_rank_peak_resident_memory_bytes",
        "Most memory that a rank's process had so far",
        labels=["rank"],
    )
    for rank, report in zip(ranks, reports, strict=True):
        stalls.add_metric([rank], report.kv_stats.stall_us / 1e6)
        peaks.add_metric([rank], report.peak_rss_bytes)
    yield stalls
    yield peaks
