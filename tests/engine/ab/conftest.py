"""A tiny random Llama with a context of its own, and what comparing on it gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vmalloc.engine import EngineConfig
from vmalloc.engine.ab.experiment import ABResult, ABSettings, run_experiment

CONFIG = EngineConfig(page_size=4096, block_size=4, max_num_seqs=16)


@pytest.fixture(scope="session")
def model(tiny_model: Callable[[str], Any]) -> Any:
    """Nobody's else: an engine takes it and gives it back."""
    import copy

    return copy.deepcopy(tiny_model("llama-4x2x16"))


@pytest.fixture(scope="session")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("traces") / "two & three.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n0,20,6\n0.01,7,9\n0.01,3,4\n")
    return path


@pytest.fixture(scope="session")
def result(model: Any, trace: Any) -> ABResult:
    """A whole comparison of three sides, two runs each."""
    settings = ABSettings(
        backends=("virtual", "paged", "max_length"),
        workloads=("parallel", "mixed"),
        traces=(trace,),
        repeats=2,
        is_quick=True,
        config=CONFIG,
    )
    return run_experiment(settings, model)
