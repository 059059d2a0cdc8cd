"""What it costs to get a preempted group back: computing it again, or copying it out and in.

Owns: two moving averages.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from typing import Literal

PreemptionKind = Literal["swap", "recompute"]

SMOOTHING = 0.2
"""Weight of the newest measurement in a moving average."""

FIRST_PREFILL_SECONDS = 1e-4
"""Seconds per prefilled token until one was measured: a model of about a billion weights on CPU
takes ten times as long, one of ten million a tenth."""

FIRST_SWAP_BANDWIDTH = 4e9
"""Bytes per second copied to host memory until a copy was measured: about one core's memcpy."""


class PreemptionCost:
    """Predicts both costs from what was measured; the numbers come in through ``observe_x``.

    A linear model, as in section 7.3 of the PagedAttention paper (SOSP 2023): recomputing costs by
    the token, swapping by the byte, each way.

    Args:
        prefill_seconds, swap_bandwidth: what holds until something was measured.

    Attributes:
        prefill_seconds: per token.
        swap_bandwidth: bytes per second, one way.
    """

    def __init__(
        self,
        prefill_seconds: float = FIRST_PREFILL_SECONDS,
        swap_bandwidth: float = FIRST_SWAP_BANDWIDTH,
    ) -> None:
        self.prefill_seconds = prefill_seconds
        self.swap_bandwidth = swap_bandwidth
        self._has_prefilled = False
        self._has_swapped = False

    def observe_prefill(self, num_tokens: int, seconds: float) -> None:
        """A step computed ``num_tokens`` in this time."""
        if num_tokens > 0 and seconds > 0.0:
            measured = seconds / num_tokens
            self.prefill_seconds = _mixed(self.prefill_seconds, measured, self._has_prefilled)
            self._has_prefilled = True

    def observe_swap(self, num_bytes: int, seconds: float) -> None:
        """``num_bytes`` were copied, out or in, in this time."""
        if num_bytes > 0 and seconds > 0.0:
            measured = num_bytes / seconds
            self.swap_bandwidth = _mixed(self.swap_bandwidth, measured, self._has_swapped)
            self._has_swapped = True

    def recompute_seconds(self, num_tokens: int) -> float:
        """Time to prefill ``num_tokens`` again."""
        return num_tokens * self.prefill_seconds

    def swap_seconds(self, num_bytes: int) -> float:
        """Time to copy ``num_bytes`` out and in again."""
        return 2 * num_bytes / self.swap_bandwidth

    def cheaper(self, num_tokens: int, num_bytes: int) -> PreemptionKind:
        """The kind that gets a group of this size back sooner."""
        if self.swap_seconds(num_bytes) < self.recompute_seconds(num_tokens):
            return "swap"
        return "recompute"


def _mixed(average: float, measured: float, has_average: bool) -> float:
    if not has_average:  # the first guess is no measurement
        return measured
    return average + SMOOTHING * (measured - average)
