"""Reads ``/metrics`` as Prometheus would."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.server.running import DEADLINE_SECONDS, RunningServer
from vmalloc.engine import LLMEngine

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(text: str) -> Samples:
    """Every sample by name and labels, without the labels that all of vLLM's have."""
    return {
        (sample.name, _labels(sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scrape(server: RunningServer) -> Samples:
    """What ``/metrics`` shows now."""
    response = server.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return parse(response.text)


def settled(server: RunningServer) -> Samples:
    """What ``/metrics`` shows once nothing runs and the latest snapshot says so."""
    server.wait_idle()
    tokens = server.on_engine(LLMEngine.token_stats)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        snapshot = server.state.engine.snapshot
        if snapshot is not None and snapshot.tokens == tokens and not snapshot.num_live_requests:
            return scrape(server)
        assert time.monotonic() < deadline, "the snapshot is old"
        time.sleep(0.005)


def value(samples: Samples, name: str, **labels: str) -> float:
    """One sample; 0.0 where there is none yet."""
    return samples.get((name, frozenset(labels.items())), 0.0)


def wait_for(server: RunningServer, name: str, expected: float, **labels: str) -> None:
    """Scrape until a sample has a value."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while (seen := value(scrape(server), name, **labels)) != expected:
        assert time.monotonic() < deadline, f"{name} is {seen}, not {expected}"
        time.sleep(0.02)


def _labels(labels: dict[str, Any]) -> frozenset[tuple[str, str]]:
    common = {("model_name", "demo"), ("engine", "0")}
    return frozenset(labels.items()) - common
