"""How many replicas there should be, by requests and by pages.

Owns: nothing.  Thread-safety: none; Serve's controller calls it.

Serve copies this module into its controller by value: it imports nothing of ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class PagePolicy:
    """As many replicas as the busier one of two signals asks for.

    Requests: those that run or wait in the engines, over ``target_requests``. Pages: the mean share
    of KV pages that running requests hold, over ``target_page_usage``. Serve keeps the result
    between the least and the most, and waits its delays before it acts.
    """

    def __init__(self, target_requests: float, target_page_usage: float) -> None:
        self._target_requests = target_requests
        self._target_page_usage = target_page_usage

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """For Serve: the number, and nothing to remember."""
        metrics: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
        num_replicas = context.current_num_replicas
        wanted = self.wanted(
            num_replicas,
            sum(metrics.get("num_requests", {}).values()),
            sum(metrics.get("page_usage", {}).values()),
        )
        return (wanted if metrics.get("num_requests") else context.target_num_replicas), {}

    def wanted(self, num_replicas: int, num_requests: float, page_usage: float) -> int:
        """For sums over all replicas."""
        by_requests = num_requests / self._target_requests
        by_pages = page_usage / self._target_page_usage
        # Float noise is no reason for one more.
        return max(1, math.ceil(max(by_requests, by_pages) - 1e-9))
