"""A comparison as plain values: what goes into the JSON file, and what all reports are made of.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from .arms import ARMS
from .experiment import ABResult, ABSettings, WorkloadResult
from .metrics import METRICS, Metric, format_range_end, format_value
from .statistics import Comparison, Spread, chance_of_no_tie, compare, spread

SCHEMA = 1


def summarize(result: ABResult, provenance: dict[str, Any]) -> dict[str, Any]:
    """Everything that was measured; numbers with the text that tables show for them."""
    first, *others = result.settings.backends
    num_ranks = result.settings.config.tensor_parallel_size
    workloads = [_workload(one, result.settings.backends, num_ranks) for one in result.workloads]
    equality = result.equality
    return {
        "schema": SCHEMA,
        "provenance": provenance,
        "settings": _settings(result.settings),
        "facts": result.facts,
        "backends": {name: ARMS[name].summary for name in (first, *others)},
        "equality": {
            "is_equal": equality.is_equal,
            "words": equality.words,
            "num_sequences": equality.num_sequences,
            "num_compared": equality.num_compared,
            "num_unserved": equality.num_unserved,
            "num_logprobs": equality.num_logprobs,
            "max_logprob_difference": equality.max_logprob_difference,
            "differences": [str(one) for one in equality.differences],
        },
        "stopped": _stopped(result),
        "ranks": _rank_words(num_ranks),
        "score": {other: _score(workloads, other) for other in others},
        "metrics": [asdict(metric) for metric in METRICS],
        "workloads": workloads,
    }


def _stopped(result: ABResult) -> str:
    """What broke the comparison off, in words; empty if nothing did."""
    error = result.error
    if error is None:
        return ""
    what = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    return f"Broken off in {result.where}: {what}. Whole rounds until then are shown."


def _rank_words(num_ranks: int) -> str:
    """Whose figures the report has, where there are several ranks; else empty."""
    if num_ranks == 1:
        return ""
    return (
        f"{num_ranks} ranks: KV memory and its cap are those of all of them together; CPU time and "
        "the times of allocator, views, swapping and worker are those of rank 0."
    )


def chance_words(num_runs: int) -> str:
    """How far a verdict over so many runs of each side can be trusted."""
    if num_runs < 2:
        return "One run a side has no range, and so no verdict."
    share = chance_of_no_tie(num_runs)
    return f"With {num_runs} runs a side, {share:.1%} of equals would look ahead by chance."


def fewest_runs(summary: dict[str, Any]) -> int:
    """Timed runs of each side, in the workload that had the fewest."""
    return min(int(workload["num_runs"]) for workload in summary["workloads"])


def _settings(settings: ABSettings) -> dict[str, Any]:
    values = asdict(settings)
    for name in ("kv_backend", "commit_policy", "kv_cache_memory_bytes", "max_model_len"):
        del values["config"][name]  # each run has its own
    values["traces"] = [path.name for path in settings.traces]
    values["repeats"] = settings.num_repeats
    return values


def _workload(measured: WorkloadResult, arms: tuple[str, ...], num_ranks: int) -> dict[str, Any]:
    first, *others = arms
    checked = measured.checked
    return {
        **measured.workload.describe(),
        "cap_bytes": num_ranks * measured.cap.num_bytes,
        "cap_words": measured.cap.words,
        "demand_bytes": num_ranks * measured.cap.demand_bytes,
        "max_model_len": measured.max_model_len,
        "num_runs": len(measured.runs[first]),
        "unserved": _unserved(measured, arms),
        "kernels": {arm: checked[arm].kernel for arm in arms},
        "drivers": {arm: checked[arm].driver for arm in arms},
        "table": [_line(metric, measured, first, others) for metric in METRICS],
        # Of the first timed run of each side.
        "memory": {arm: measured.runs[arm][0].memory for arm in arms},
        "calls": {arm: measured.runs[arm][0].calls for arm in arms},
    }


def _unserved(measured: WorkloadResult, arms: tuple[str, ...]) -> str:
    """Which sides did less than the others, in words; empty if all served everything."""
    counts = {
        arm: max(int(run.values["failed_requests"] or 0) for run in measured.runs[arm])
        for arm in arms
    }
    if not any(counts.values()):
        return ""
    words = ", ".join(f"{count} with {arm}" for arm, count in counts.items() if count)
    rule = "Sides that served different ones are not ranked."
    return f"Requests that do not fit under the cap: {words}. {rule}"


def _line(
    metric: Metric, measured: WorkloadResult, first: str, others: list[str]
) -> dict[str, Any]:
    """One metric of a workload: values by side, ratios by the other side."""
    values = {
        arm: [run.values[metric.name] for run in measured.runs[arm]] for arm in (first, *others)
    }
    failed = {arm: [run.values["failed_requests"] for run in measured.runs[arm]] for arm in values}
    # Whoever served fewer requests is not ahead for being done sooner, or for holding less.
    directions = {
        other: metric.better
        if failed[first] == failed[other] or metric.name == "failed_requests"
        else "neither"
        for other in others
    }
    return {
        "metric": metric.name,
        "values": {
            arm: {"runs": runs, **_spread_values(spread(runs), metric)}
            for arm, runs in values.items()
        },
        "ratios": {
            other: _ratio_values(compare(values[first], values[other], directions[other]))
            for other in others
        },
    }


def _spread_values(found: Spread | None, metric: Metric) -> dict[str, Any]:
    if found is None:
        return {"median": None, "low": None, "high": None, "text": "-", "spread_text": ""}
    low, high = (format_range_end(value, metric.unit) for value in (found.low, found.high))
    return {
        "median": found.median,
        "low": found.low,
        "high": found.high,
        "text": format_value(found.median, metric.unit),
        "spread_text": "" if low == high else f"{low}..{high}",
    }


def _ratio_values(compared: Comparison) -> dict[str, Any]:
    ratio = compared.ratio
    if ratio is None:
        empty = {"median": None, "low": None, "high": None, "text": "-", "spread_text": ""}
        return {**empty, "verdict": compared.verdict}
    low, high = f"{ratio.low:.2f}", f"{ratio.high:.2f}"
    return {
        "median": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "text": f"{ratio.median:.2f}",
        "spread_text": "" if low == high else f"{low}..{high}",
        "verdict": compared.verdict,
    }


def _score(workloads: list[dict[str, Any]], other: str) -> dict[str, int]:
    """How often the first side was ahead of another, tied, or behind, over all lines."""
    verdicts = [line["ratios"][other]["verdict"] for one in workloads for line in one["table"]]
    return {verdict: verdicts.count(verdict) for verdict in ("better", "tie", "worse")}
