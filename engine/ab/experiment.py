"""The comparison itself: every workload through every side, in turns, over one model.

Owns: the model while it runs.  Thread-safety: none; one run at a time.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...errors import ConfigError
from ..cache_setup import resolve_max_model_len
from ..config import EngineConfig
from ..devices import choose_device
from ..llm_engine import LLMEngine
from ..loading import load_engine
from ..model_loader import load_model, resolve_model_name, vocab_size
from .arms import DEFAULT_ARMS, Arm, choose_arms
from .caps import Cap, choose_cap
from .equality import Equality, compare_outputs
from .replay import ServedRequest
from .run import MakeEngine, Run, run_once
from .trace_file import read_trace
from .workload import KINDS, Workload, make_workload

DEFAULT_REPEATS = 5
QUICK_REPEATS = 4
QUICK_SCALE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ABSettings:
    """What to compare, on what.

    Attributes:
        model: ``"demo"``, a local folder or a hub id.
        backends: names of ``ARMS``; ratios are the first over each of the others.
        workloads: names of ``KINDS``.
        traces: files that ``read_trace`` reads, compared after the workloads.
        repeats: timed runs of each side; None: 5, in a quick comparison 4.
        is_quick: smaller workloads.
        kv_cache_memory_bytes: cap of every run; None: ``choose_cap`` chooses one a workload.
        seed: of the workloads.
        config: what all sides have in common; its backend, commit policy and cap are not used.
    """

    model: str = "demo"
    backends: tuple[str, ...] = DEFAULT_ARMS
    workloads: tuple[str, ...] = tuple(KINDS)
    traces: tuple[Path, ...] = ()
    repeats: int | None = None
    is_quick: bool = False
    kv_cache_memory_bytes: int | None = None
    seed: int = 0
    config: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        choose_arms(self.backends)
        for name in self.workloads:
            if name not in KINDS:
                raise ConfigError(f"workload is {name!r}; supported: {', '.join(KINDS)}")
        for what, names in (("workload", self.workloads), ("trace", self.traces)):
            if len(set(names)) != len(names):
                raise ConfigError(f"{what} is {', '.join(map(str, names))}; each can be named once")
        if not self.workloads and not self.traces:
            raise ConfigError("workload is empty; name at least one, or a trace")
        for what, value in (("repeats", self.repeats), ("seed", self.seed)):
            least = 1 if what == "repeats" else 0
            if value is not None and value < least:
                raise ConfigError(f"{what} is {value}; it must be at least {least}")

    @property
    def num_repeats(self) -> int:
        """``repeats``, or its default."""
        if self.repeats is not None:
            return self.repeats
        return QUICK_REPEATS if self.is_quick else DEFAULT_REPEATS

    @property
    def num_runs(self) -> int:
        """Runs in all, those that only check outputs included."""
        num_workloads = len(self.workloads) + len(self.traces)
        return num_workloads * len(self.backends) * (1 + self.num_repeats)


@dataclass(slots=True)
class WorkloadResult:
    """What a workload gave.

    Attributes:
        workload: what was served.
        cap: the KV memory that every side had.
        max_model_len: most tokens of a sequence; the length of the longest request.
        runs: timed ones by side, in order; those of one place belong to one round.
        checked: the untimed run of each side, whose log-probabilities were compared.
        reference: what each request got from the first run that served it.
    """

    workload: Workload
    cap: Cap
    max_model_len: int
    runs: dict[str, list[Run]] = field(default_factory=dict)
    checked: dict[str, Run] = field(default_factory=dict)
    reference: list[ServedRequest] = field(default_factory=list)


@dataclass(slots=True)
class ABResult:
    """What a comparison gave.

    Attributes:
        settings: what was asked for.
        workloads: in the order they ran.
        equality: whether all runs gave the same outputs.
        facts: of the model and the process: context, vocabulary, bytes of a token, threads.
        error: what broke it off; ``workloads`` are then those with at least one whole round.
        where: in which run that was, in words.
    """

    settings: ABSettings
    workloads: list[WorkloadResult]
    equality: Equality
    facts: dict[str, Any]
    error: BaseException | None = None
    where: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """Which run is next, for a progress bar.

    Attributes:
        workload, arm: names.
        round_idx: from 1; 0 is the run that only checks outputs.
    """

    workload: str
    arm: str
    round_idx: int


def run_experiment(
    settings: ABSettings,
    model: torch.nn.Module | None = None,
    *,
    before_run: Callable[[Turn], None] = lambda turn: None,
) -> ABResult:
    """Compare; ``model``: an already loaded one instead of ``settings.model``.

    Each side first serves a workload once untimed: that warms up, and its outputs and
    log-probabilities are compared. Then come rounds in which every side runs once, in a fresh
    engine; every other round turns the order round.

    Raises ``ConfigError`` for what cannot be compared, ``UnsupportedModelError`` for a model that
    no engine takes. Once a round is whole, what breaks a run off is kept in ``error`` instead.
    """
    # What takes a moment to find out should not come after minutes of work.
    arms = choose_arms(settings.backends)
    num_ranks = settings.config.tensor_parallel_size
    if model is not None and num_ranks > 1:
        raise ConfigError(
            f"tensor_parallel_size is {num_ranks} and the model is loaded already; name it, so "
            "that every rank loads its share"
        )
    if model is None:
        model = _load(settings)
    workloads = _make_workloads(settings, model)
    result = ABResult(settings, [], Equality(), _facts(settings, model))
    gc.collect()
    gc.freeze()  # so that no run pays for looking through all that was imported
    try:
        for workload in workloads:
            _measure(result, model, arms, workload, before_run)
    except (Exception, KeyboardInterrupt) as error:
        _keep_whole_rounds(result)
        if not result.workloads:
            raise
        result.error = error
    finally:
        gc.unfreeze()
    return result


def _keep_whole_rounds(result: ABResult) -> None:
    """Forget the runs of the last workload that not every side had its turn beside."""
    if not result.workloads:
        return
    runs = result.workloads[-1].runs
    num_rounds = min(len(runs.get(name, ())) for name in result.settings.backends)
    for name in runs:
        del runs[name][num_rounds:]
    if num_rounds == 0:
        result.workloads.pop()


def _measure(
    result: ABResult,
    model: torch.nn.Module,
    arms: tuple[Arm, ...],
    workload: Workload,
    before_run: Callable[[Turn], None],
) -> None:
    """Every run of one workload."""
    settings = result.settings
    max_model_len = max(one.num_tokens for one in workload.requests)
    config = replace(settings.config, max_model_len=max_model_len)
    make_engine = _engine_maker(settings, model)
    cap = _find_cap(settings, make_engine, config, arms[0], workload)
    config = replace(config, kv_cache_memory_bytes=cap.num_bytes)
    measured = WorkloadResult(workload, cap, max_model_len)
    result.workloads.append(measured)
    for round_idx, arm in _turns(arms, settings.num_repeats):
        what = f"run {round_idx}" if round_idx else "untimed run"
        result.where = f"{workload.name}, {arm.name}, {what}"
        before_run(Turn(workload.name, arm.name, round_idx))
        run = run_once(make_engine, arm.configure(config), workload, has_logprobs=round_idx == 0)
        _note(result, measured, model, arm, round_idx, run)


def _turns(arms: tuple[Arm, ...], repeats: int) -> Iterator[tuple[int, Arm]]:
    for round_idx in range(repeats + 1):
        for arm in arms if round_idx % 2 else reversed(arms):
            yield round_idx, arm


def _note(
    result: ABResult,
    measured: WorkloadResult,
    model: torch.nn.Module,
    arm: Arm,
    round_idx: int,
    run: Run,
) -> None:
    """Keep a run, and compare its outputs with those of the runs before it."""
    workload, reference = measured.workload, measured.reference
    if not reference:
        result.equality.num_sequences += sum(one.num_completions for one in workload.requests)
        reference.extend(run.requests)
    else:
        name = f"{arm.name}, run {round_idx}" if round_idx else f"{arm.name}, untimed run"
        compare_outputs(result.equality, model, workload, reference, run.requests, name)
    for idx, served in enumerate(run.requests):
        if reference[idx].error is not None:
            reference[idx] = served
    if round_idx == 0:
        measured.checked[arm.name] = run
    else:
        measured.runs.setdefault(arm.name, []).append(run)


def _load(settings: ABSettings) -> torch.nn.Module:
    name = resolve_model_name(settings.model)
    config = settings.config
    return load_model(name, config.dtype, choose_device(config.device))


def _engine_maker(settings: ABSettings, model: torch.nn.Module) -> MakeEngine:
    """Engines over the loaded model, one at a time; every rank of several loads its share anew."""
    if settings.config.tensor_parallel_size == 1:
        return lambda config: LLMEngine(model, None, config)
    return lambda config: load_engine(settings.model, None, config, skip_tokenizer_init=True)


def _make_workloads(settings: ABSettings, model: torch.nn.Module) -> list[Workload]:
    context = resolve_max_model_len(model, settings.config)
    vocab = vocab_size(model)
    workloads = []
    for name in settings.workloads:
        count = KINDS[name].num_quick_requests if settings.is_quick else None
        workloads.append(
            make_workload(
                name,
                vocab_size=vocab,
                context_tokens=context,
                num_requests=count,
                seed=settings.seed,
                scale=QUICK_SCALE if settings.is_quick else 1.0,
            )
        )
    for path in settings.traces:
        trace = read_trace(path, vocab_size=vocab, context_tokens=context, seed=settings.seed)
        if any(one.name == trace.name for one in workloads):  # of another folder
            trace = replace(trace, name=str(path))
        workloads.append(trace)
    return workloads


def _find_cap(
    settings: ABSettings,
    make_engine: MakeEngine,
    config: EngineConfig,
    arm: Arm,
    workload: Workload,
) -> Cap:
    with make_engine(arm.configure(config)) as engine:
        return choose_cap(workload, engine.backend, settings.kv_cache_memory_bytes)


def _facts(settings: ABSettings, model: torch.nn.Module) -> dict[str, Any]:
    parameter = next(model.parameters())
    return {
        "model": settings.model,
        "architecture": type(model).__name__,
        "parameters": sum(one.numel() for one in model.parameters()),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": str(parameter.device),
        "vocab_size": vocab_size(model),
        "context_tokens": resolve_max_model_len(model, settings.config),
        "ranks": settings.config.tensor_parallel_size,
        "torch_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
    }
