"""Serves a workload with an engine, and notes which token came when.

Owns: nothing beyond a run.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..llm_engine import LLMEngine
from ..outputs import CompletionOutput, RequestOutput
from ..sampling_params import RequestOutputKind, SamplingParams
from .workload import Workload, WorkloadRequest


@dataclass(slots=True)
class ServedCompletion:
    """One completion.

    Attributes:
        token_ids: its tokens.
        times_s: when each came; empty for beams, which come at the end.
        logprobs: of its tokens, where they were asked for.
        cumulative_logprob: of a beam.
    """

    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    cumulative_logprob: float | None = None


@dataclass(slots=True)
class ServedRequest:
    """What a request got. Times are seconds of ``time.monotonic()``.

    Attributes:
        arrival_s: when it was due.
        is_beam: whether it is a beam search, which has nothing to show before its end.
        completions: by number; with beams the best come first.
        first_token_s, last_token_s: when its first and its latest token came; None without any.
        num_cached_tokens: prompt tokens that were not computed.
        num_preemptions: times it gave up its memory.
        error: what went wrong, or None.
    """

    arrival_s: float
    is_beam: bool
    completions: list[ServedCompletion]
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    error: str | None = None


@dataclass(slots=True)
class Served:
    """A workload that was served.

    Attributes:
        started_s, ended_s: seconds of ``time.monotonic()``.
        requests: in the workload's order.
        num_steps: calls of the engine.
    """

    started_s: float
    ended_s: float
    requests: list[ServedRequest]
    num_steps: int


def sampling_params(request: WorkloadRequest, *, has_logprobs: bool = False) -> SamplingParams:
    """What a request asks of the engine; ``has_logprobs``: of its tokens too, but for beams."""
    is_beam = request.method == "beam"
    return SamplingParams(
        n=request.num_completions,
        use_beam_search=is_beam,
        temperature=1.0 if request.method == "sample" else 0.0,
        seed=request.seed if request.method == "sample" else None,
        max_tokens=request.num_output_tokens,
        ignore_eos=True,
        detokenize=False,
        logprobs=0 if has_logprobs and not is_beam else None,
        output_kind=RequestOutputKind.FINAL_ONLY if is_beam else RequestOutputKind.DELTA,
    )


def replay(
    engine: LLMEngine,
    workload: Workload,
    *,
    has_logprobs: bool = False,
    observe: Callable[[], None] = lambda: None,
) -> Served:
    """Serve all requests, each from when it is due, and return when the last one ended.

    ``observe`` is called after every pause in which nothing was there to do. What the KV cache
    cannot hold ends with an error, alone.
    """
    due = [one.arrival_s if workload.is_realtime else 0.0 for one in workload.requests]
    started = time.monotonic()
    requests = [
        ServedRequest(
            started + due_s,
            one.method == "beam",
            [ServedCompletion() for _ in range(one.num_completions)],
        )
        for due_s, one in zip(due, workload.requests, strict=True)
    ]
    num_added = num_steps = 0
    while num_added < len(requests) or engine.has_unfinished_requests():
        now = time.monotonic() - started
        while num_added < len(requests) and due[num_added] <= now:
            one = workload.requests[num_added]
            params = sampling_params(one, has_logprobs=has_logprobs)
            engine.add_request(str(num_added), list(one.prompt_token_ids), params)
            num_added += 1
        if engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.monotonic()
            num_steps += 1
            for output in outputs:
                _take(requests[int(output.request_id)], output, now)
        else:
            time.sleep(max(0.0, due[num_added] - now))
            observe()
    return Served(started, time.monotonic(), requests, num_steps)


def _take(served: ServedRequest, output: RequestOutput, now: float) -> None:
    """Note what a step brought a request."""
    metrics = output.metrics
    served.num_cached_tokens = output.num_cached_tokens or 0
    served.num_preemptions = metrics.num_preemptions
    served.error = output.error
    for completion in output.outputs:
        _extend(served.completions[completion.index], completion)
    if served.is_beam:  # only the engine knows when they grew
        served.first_token_s = metrics.first_token_time
        served.last_token_s = metrics.last_token_time
        return
    for completion in output.outputs:
        served.completions[completion.index].times_s += [now] * len(completion.token_ids)
        if completion.token_ids:
            served.first_token_s = served.first_token_s or now
            served.last_token_s = now


def _extend(served: ServedCompletion, completion: CompletionOutput) -> None:
    served.token_ids += completion.token_ids
    served.cumulative_logprob = completion.cumulative_logprob
    if completion.logprobs is not None:
        served.logprobs += [
            entry[token_id].logprob
            for entry, token_id in zip(completion.logprobs, completion.token_ids, strict=True)
        ]
