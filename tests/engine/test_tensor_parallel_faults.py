"""A rank that runs out, fails, is late or dies: what the others do, and what is left."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.engine import faulty_follower
from tests.engine.agreement import (
    BLOCK,
    SHAPES,
    Reference,
    assert_agree,
    make_reference,
    run,
    workload,
)
from tests.engine.ranks import assert_nothing_is_left, footprint
from tests.engine.running import PAGE
from vmalloc.engine import EngineConfig, LLMEngine, RankLostError, RankMismatchError
from vmalloc.engine.startup import StartupPhases
from vmalloc.engine.tensor_parallel.leader import MAX_VOID_PLANS
from vmalloc.engine.tensor_parallel.loading import load_parallel_engine
from vmalloc.errors import DriverError
from vmalloc.plans import RankCache

SHAPE = "4x2x16"
FEW_PAGES = 32
"""Of 120 that the cap allows: too few for a workload at once."""

LIMIT_S = 10.0
"""Within which the loss of a rank must be known (and a test ends that would hang)."""


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    tiny_model(SHAPES[SHAPE][0]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(tiny_model: Any) -> Reference:
    return make_reference(tiny_model)


class Faulty:
    """An engine whose other rank has the fault that ``now`` says."""

    def __init__(self, folder: Path, file: Path) -> None:
        self._folder = folder
        self._file = file

    def now(self, fault: str) -> None:
        self._file.write_text(fault)

    @contextmanager
    def start(self, **settings: Any) -> Iterator[LLMEngine]:
        """Two ranks; nothing may be left of them at the end."""
        before = footprint()
        defaults: dict[str, Any] = {
            "tensor_parallel_size": 2,
            "page_size": PAGE,
            "layers_per_group": 4,
            "block_size": BLOCK,
            "max_num_seqs": 14,
            "max_num_batched_tokens": 30,
            "kv_cache_memory_bytes": 120 * PAGE,
            "preemption_mode": "recompute",
        }
        config = EngineConfig(**{**defaults, **settings})
        entry = f"{faulty_follower.__name__}:follow"
        engine = load_parallel_engine(str(self._folder), None, config, StartupPhases(), entry=entry)
        try:
            yield engine
        finally:
            engine.close()
        del before["files"]  # the engine has a name still, and with it a descriptor of no memory
        assert_nothing_is_left(before, {})


@pytest.fixture
def faulty(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Faulty:
    faulty = Faulty(folder, tmp_path / "fault")
    faulty.now("none")
    monkeypatch.setenv(faulty_follower.FAULT_FILE, str(tmp_path / "fault"))
    return faulty


def run_until_lost(engine: LLMEngine) -> tuple[RankLostError, float]:
    """Step until a rank is lost; the error, and how long its step took."""
    for name, (prompt, params) in workload(0).items():
        engine.add_request(name, prompt, params)
    for _ in range(1000):
        started = time.monotonic()
        try:
            engine.step()
        except RankLostError as error:
            return error, time.monotonic() - started
    raise AssertionError("no rank was lost")


def check_agreement(engine: LLMEngine, reference: Reference, seed: int) -> None:
    """A workload through the faults, and what it must give."""
    requests = workload(seed)
    result = run(engine, [requests])
    engine.leader.check_ledgers()
    assert_agree({"2 ranks": result}, reference(SHAPES[SHAPE][0], requests))


def test_a_rank_runs_out_fails_and_dies(faulty: Faulty, reference: Reference) -> None:
    with faulty.start() as engine:
        # Its system refuses pages long before the cap that all ranks have. So all stop there, what
        # others created for a grant that it refused goes back, and the scheduler preempts.
        faulty.now(f"little_memory {FEW_PAGES * PAGE}")
        check_agreement(engine, reference, 1)
        check_agreement(engine, reference, 2)
        assert engine.leader.times.num_void == 0
        assert engine.stats().preempt_recompute > 0
        reports = engine.leader.reports()
        assert max(report.kv_stats.created_pages for report in reports) <= FEW_PAGES
        assert engine.backend.granted_pages <= FEW_PAGES

        # It cannot carry out some plans: they take effect on no rank.
        faulty.now("cannot_map 7")
        check_agreement(engine, reference, 1)
        assert engine.leader.times.num_void > 1
        assert engine.leader.failure is None

        faulty.now("dies")
        error, seconds = run_until_lost(engine)
        assert error.rank == 1
        assert "SIGKILL" in error.reason
        assert seconds < LIMIT_S
        with pytest.raises(RankLostError) as again:  # and not a hang, nor another story
            engine.step()
        assert again.value is error
        engine.abort_request(list(workload(0)))
        assert not engine.has_unfinished_requests()


def test_a_rank_fails_again_and_again(faulty: Faulty, reference: Reference) -> None:
    with faulty.start(kv_backend="paged") as engine:
        faulty.now("cannot_map 7")
        check_agreement(engine, reference, 1)
        assert engine.leader.times.num_void > 1
        faulty.now("cannot_map 1")
        error, _ = run_until_lost(engine)
        assert error.rank == 1
        assert f"{MAX_VOID_PLANS} plans in a row failed" in error.reason
        assert "mmap failed with ENOMEM" in error.reason


def test_a_rank_is_late(faulty: Faulty) -> None:
    with faulty.start(tensor_parallel_timeout_s=1.5) as engine:
        faulty.now("is_late")
        error, seconds = run_until_lost(engine)
        assert seconds < LIMIT_S
        assert "behind" in error.reason
        assert "1.5 s" in error.reason


def test_rank_0_fails_while_others_wait_for_it(
    faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty.start() as engine:
        error = DriverError("madvise", 22, "EINVAL", "fault injection")
        monkeypatch.setattr(RankCache, "trim", Mock(side_effect=error))
        with pytest.raises(DriverError):
            engine.trim_kv_cache()
        started = time.monotonic()
        with pytest.raises(RankLostError, match=r"rank 0 was lost: it left the others .*EINVAL"):
            engine.resize_kv_cache(60 * PAGE)
        assert time.monotonic() - started < LIMIT_S


@pytest.mark.parametrize(
    ("fault", "fact", "values"),
    [
        ("other_version", "vmalloc", "on rank 0 and '0.0.0' on rank 1"),
        ("other_dtype", "dtype", "'torch.float32' on rank 0 and 'torch.bfloat16' on rank 1"),
    ],
)
def test_a_rank_that_differs(fault: str, fact: str, values: str, faulty: Faulty) -> None:
    faulty.now(fault)
    before = footprint()
    with pytest.raises(RankMismatchError) as caught, faulty.start():
        pass
    gc.collect()
    del before["files"]
    assert_nothing_is_left(before, {})  # though the error is kept
    assert caught.value.fact == fact
    assert values in str(caught.value)


def test_an_engine_that_nobody_closes_ends_its_ranks(folder: Path) -> None:
    """Once it is collected, so that another can be started in the process."""
    gc.collect()
    before = footprint()
    config = EngineConfig(tensor_parallel_size=2, kv_cache_memory_bytes=120 * PAGE)
    engine = load_parallel_engine(str(folder), None, config, StartupPhases())
    assert footprint()["children"] != before["children"]
    del engine
    gc.collect()
    del before["files"]
    assert_nothing_is_left(before, {})
