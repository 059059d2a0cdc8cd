"""What a load run measured, in vLLM's terms.

Owns: nothing.  Thread-safety: plain values and pure functions.

TTFT is the time to the first event with a token; ITL the time between such events; TPOT the mean
time of a request's tokens after the first; E2EL the time to the last. Means and percentiles are
over requests, those of ITL over all gaps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from .bench_load import BenchSettings

PERCENTILES = (50, 90, 99)
_METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}


@dataclass(slots=True)
class RequestResult:
    """One request.

    Attributes:
        num_input_tokens, num_output_tokens: as the server counted them.
        ttft_s, e2el_s: since it was sent; None where nothing came.
        gaps_s: between its events.
        failure: its class of failure, or None.
    """

    num_input_tokens: int = 0
    num_output_tokens: int = 0
    ttft_s: float | None = None
    e2el_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds of the tokens after the first; None for fewer than two."""
        if self.ttft_s is None or self.e2el_s is None or self.num_output_tokens < 2:
            return None
        return (self.e2el_s - self.ttft_s) / (self.num_output_tokens - 1)


@dataclass(slots=True)
class BenchResult:
    """A run.

    Attributes:
        settings: what was asked for.
        model: who answered.
        prompts: how prompts were made, in words.
        duration_s: from the first request to the last answer.
        requests: those that ended.
        num_unfinished: requests that had not ended, or not begun, when the run was stopped.
    """

    settings: BenchSettings
    model: str
    prompts: str
    duration_s: float = 0.0
    requests: list[RequestResult] = field(default_factory=list)
    num_unfinished: int = 0

    @property
    def completed(self) -> list[RequestResult]:
        """Requests that got their whole answer."""
        return [one for one in self.requests if one.failure is None]

    @property
    def failures(self) -> Counter[str]:
        """How many failed, by class."""
        return Counter(one.failure for one in self.requests if one.failure is not None)

    @property
    def num_good(self) -> int:
        """Completed requests within every limit of ``settings.goodput``."""
        return sum(_is_good(one, self.settings.goodput) for one in self.completed)

    def values_s(self, metric: str) -> list[float]:
        """All measurements of ``"ttft"``, ``"tpot"``, ``"itl"`` or ``"e2el"``."""
        if metric == "itl":
            return [gap for one in self.completed for gap in one.gaps_s]
        values = [getattr(one, f"{metric}_s") for one in self.completed]
        return [value for value in values if value is not None]

    def summary(self) -> dict[str, Any]:
        """Everything as plain values, named as vLLM's ``--save-result`` does."""
        completed, seconds = self.completed, max(self.duration_s, 1e-9)
        num_input = sum(one.num_input_tokens for one in completed)
        num_output = sum(one.num_output_tokens for one in completed)
        settings = self.settings
        result: dict[str, Any] = {
            "url": settings.url,
            "endpoint": settings.endpoint,
            "model": self.model,
            "prompts": self.prompts,
            "num_prompts": settings.num_prompts,
            "request_rate": settings.request_rate
            if math.isfinite(settings.request_rate)
            else "inf",
            "max_concurrency": settings.max_concurrency,
            "seed": settings.seed,
            "duration": self.duration_s,
            "completed": len(completed),
            "failed": sum(self.failures.values()),
            "unfinished": self.num_unfinished,
            "failures": dict(self.failures),
            "total_input_tokens": num_input,
            "total_output_tokens": num_output,
            "request_throughput": len(completed) / seconds,
            "output_throughput": num_output / seconds,
            "total_token_throughput": (num_input + num_output) / seconds,
        }
        if settings.goodput:
            result["goodput_limits_ms"] = dict(settings.goodput)
            result["num_good"] = self.num_good
            result["request_goodput"] = self.num_good / seconds
        for metric in _METRICS:
            values = self.values_s(metric)
            for name, value in statistics_ms(values).items():
                result[f"{name}_{metric}_ms"] = value
        return result


def statistics_ms(values_s: Sequence[float]) -> dict[str, float | None]:
    """Mean and percentiles in milliseconds; None where there is nothing."""
    result: dict[str, float | None] = {"mean": None}
    result |= {f"p{percent}": None for percent in PERCENTILES}
    if values_s:
        ordered = sorted(values_s)
        result["mean"] = 1000 * math.fsum(ordered) / len(ordered)
        for percent in PERCENTILES:
            result[f"p{percent}"] = 1000 * percentile(ordered, percent)
    return result


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Linear between the two nearest, as numpy's."""
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def bench_report(result: BenchResult) -> Table:
    """The figures as a table for people."""
    summary = result.summary()
    table = Table(
        title=f"{result.model} at {result.settings.url}", title_justify="left", pad_edge=False
    )
    table.add_column("", no_wrap=True)
    for name in ("mean", *(f"p{percent}" for percent in PERCENTILES)):
        table.add_column(name, justify="right")
    for metric, words in _METRICS.items():
        cells = [
            _milliseconds(summary[f"{name}_{metric}_ms"])
            for name in ("mean", *(f"p{percent}" for percent in PERCENTILES))
        ]
        table.add_row(f"{words} ({metric.upper()}), ms", *cells)
    table.add_section()
    for words, value in _totals(result, summary):
        table.add_row(words, value)
    return table


def _totals(result: BenchResult, summary: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("Completed requests", f"{summary['completed']} of {summary['num_prompts']}"),
        ("Duration, s", f"{summary['duration']:.2f}"),
        ("Requests a second", f"{summary['request_throughput']:.2f}"),
        ("Tokens written a second", f"{summary['output_throughput']:.1f}"),
        ("Tokens in all a second", f"{summary['total_token_throughput']:.1f}"),
        ("Tokens of prompts", f"{summary['total_input_tokens']}"),
        ("Tokens written", f"{summary['total_output_tokens']}"),
    ]
    if result.settings.goodput:
        limits = " ".join(f"{metric}:{limit:g}" for metric, limit in result.settings.goodput)
        rows.append((f"Goodput ({limits}), a second", f"{summary['request_goodput']:.2f}"))
    if result.num_unfinished:
        rows.append(("Not finished when it stopped", str(result.num_unfinished)))
    rows += [(f"Failed: {reason}", str(count)) for reason, count in result.failures.most_common()]
    return rows


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _is_good(one: RequestResult, limits: Sequence[tuple[str, float]]) -> bool:
    for metric, limit_ms in limits:
        value = getattr(one, f"{metric}_s")
        # One token has no TPOT, and so breaks no limit on it.
        if value is not None and 1000 * value > limit_ms:
            return False
    return True
