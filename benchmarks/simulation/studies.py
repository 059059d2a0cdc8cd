"""The questions that the simulation answers, each as a list of runs.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .hardware import DEVICES
from .models import MODELS, Deployment
from .setting import Setting
from .trace import LENGTHS, Trace, draw_trace

SMALL = Deployment(MODELS["Llama-3.1-8B"], DEVICES["H200"])
SMALL_SPLIT = Deployment(MODELS["Llama-3.1-8B"], DEVICES["H200"], 8)
LARGE = Deployment(MODELS["Llama-3.1-70B"], DEVICES["H200"], 8)

BACKENDS: dict[str, dict[str, Any]] = {
    "paged": {"kind": "paged"},
    "virtual": {"kind": "virtual"},
    "virtual, per layer": {"kind": "virtual", "layers_per_group": 1},
}
NUM_SEQS = (16, 64, 256, 1024, 4096, 10_000)
LATENCY_FACTORS = (1, 2, 4, 8, 16)
AHEAD_TOKENS = (0, 1, 4, 16)
WATERMARKS = (0.0, 0.01, 0.05)
PAGE_BYTES = (1 << 18, 1 << 21, 1 << 22, 1 << 24)
GROUP_SIZES = {"Llama-3.1-8B": (1, 4, 16, 32), "Llama-3.1-70B": (1, 5, 20, 80)}
SHARED_TOKENS = (0, 256, 1024)
NUM_SAMPLES = 4
MANY_SEQS = 10_000
STEP_TOKENS = 16_384


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        names: what tells it from the others of its study.
        make_trace: draws its requests.
    """

    names: dict[str, Any]
    setting: Setting
    make_trace: Callable[[], Trace]


Scale = Callable[[int], int]


def million_cases(scale: Scale, seed: int) -> list[Case]:
    """A million requests at up to 10,000 sequences at once, on both backends."""
    count = scale(1_000_000)
    return [
        Case(
            {"lengths": LENGTHS[lengths].name, "backend": backend},
            Setting(
                **BACKENDS[backend],
                deployment=deployment,
                max_num_seqs=MANY_SEQS,
                max_num_batched_tokens=STEP_TOKENS,
            ),
            lambda lengths=lengths: draw_trace(LENGTHS[lengths], count, seed),
        )
        for lengths, deployment in (("alpaca", SMALL), ("sharegpt", SMALL_SPLIT))
        for backend in ("virtual", "paged")
    ]


def scale_cases(scale: Scale, seed: int) -> list[Case]:
    """How the backends do with ever more sequences at once."""
    return [
        Case(
            {"backend": name, "max_num_seqs": num_seqs},
            Setting(
                **backend,
                deployment=SMALL,
                max_num_seqs=num_seqs,
                max_num_batched_tokens=STEP_TOKENS,
            ),
            lambda num_seqs=num_seqs: draw_trace(
                LENGTHS["alpaca"], scale(max(2_000, 5 * num_seqs)), seed
            ),
        )
        for num_seqs in NUM_SEQS
        for name, backend in BACKENDS.items()
    ]


def stall_cases(scale: Scale, seed: int) -> list[Case]:
    """When the engine waits for pages: by the driver's pace, commit-ahead, and room to spare."""

    def make_trace() -> Trace:
        return draw_trace(LENGTHS["sharegpt"], scale(8_000), seed)

    base = Setting(deployment=SMALL)
    cases = []
    for room, max_num_seqs in (("room to spare", 1_024), ("full", 4_096)):
        setting = replace(base, max_num_seqs=max_num_seqs)
        cases += [
            Case(
                {"room": room, "latency": factor, "ahead": 4},
                replace(setting, latency=base.latency.times(factor)),
                make_trace,
            )
            for factor in LATENCY_FACTORS
        ]
        cases += [
            Case(
                {"room": room, "latency": 1, "ahead": ahead},
                replace(setting, commit_ahead_tokens=ahead),
                make_trace,
            )
            for ahead in AHEAD_TOKENS
            if ahead != base.commit_ahead_tokens
        ]
    cases += [
        Case(
            {"room": "full", "latency": 1, "ahead": 4, "low_watermark": watermark},
            replace(base, max_num_seqs=4_096, low_watermark=watermark),
            make_trace,
        )
        for watermark in WATERMARKS
        if watermark != base.low_watermark
    ]
    return cases


def layout_cases(scale: Scale, seed: int) -> list[Case]:
    """What page size and layer grouping come to, with memory full."""
    cases = []
    for deployment, num_requests in ((SMALL, 6_000), (LARGE, 8_000)):
        name = deployment.model.name
        max_num_seqs = 4_096 if deployment is SMALL else 8_192
        base = Setting(
            deployment=deployment, max_num_seqs=max_num_seqs, max_num_batched_tokens=STEP_TOKENS
        )

        def make_trace(num_requests: int = num_requests) -> Trace:
            return draw_trace(LENGTHS["sharegpt"], scale(num_requests), seed)

        cases.append(
            Case({"model": name, "backend": "paged"}, replace(base, kind="paged"), make_trace)
        )
        cases += [
            Case(
                {
                    "model": name,
                    "backend": "virtual",
                    "page_bytes": page_bytes,
                    "layers_per_group": group_size,
                },
                replace(base, page_bytes=page_bytes, layers_per_group=group_size),
                make_trace,
            )
            for page_bytes in PAGE_BYTES
            for group_size in GROUP_SIZES[name]
        ]
    return cases


def sharing_cases(scale: Scale, seed: int) -> list[Case]:
    """What sharing gives: a common start of prompts, and several samples of one prompt."""
    cases = []
    for name in ("virtual", "paged"):
        base = Setting(**BACKENDS[name], deployment=SMALL, max_num_seqs=8_192)
        cases += [
            Case(
                {"backend": name, "shared_tokens": shared, "shares": shares},
                replace(base, prefix_caching=shares),
                lambda shared=shared: draw_trace(
                    LENGTHS["sharegpt"], scale(8_000), seed, shared_tokens=shared, num_groups=8
                ),
            )
            for shared in SHARED_TOKENS
            for shares in (False, True)
        ]
        cases += [
            Case(
                {"backend": name, "samples": NUM_SAMPLES, "shares": shares},
                base,
                lambda shares=shares: _samples(scale(2_000), seed, shares=shares),
            )
            for shares in (False, True)
        ]
    return cases


def _samples(num_prompts: int, seed: int, *, shares: bool) -> Trace:
    """Samples of the same prompts: as one request each, or one for every sample."""
    if shares:
        return draw_trace(LENGTHS["sharegpt"], num_prompts, seed, width=NUM_SAMPLES)
    return draw_trace(LENGTHS["sharegpt"], num_prompts, seed).repeated(NUM_SAMPLES)


STUDIES: dict[str, Callable[[Scale, int], list[Case]]] = {
    "million": million_cases,
    "scale": scale_cases,
    "stalls": stall_cases,
    "layout": layout_cases,
    "sharing": sharing_cases,
}
