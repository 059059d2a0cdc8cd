"""Settings for every test: quiet OpenMP, and a deterministic hypothesis."""

import os
from collections.abc import Sequence

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # before torch loads libgomp
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers asks a hub for a missing model
os.environ["FAKECUDA_GRAN_KB"] = "4"  # before the stand-in driver loads: small pages, many of them

import pytest
from hypothesis import HealthCheck, settings

_SLOW_OK = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=120,
    stateful_step_count=50,
    suppress_health_check=_SLOW_OK,
)
settings.register_profile(
    "soak",
    deadline=None,
    max_examples=3000,
    stateful_step_count=100,
    suppress_health_check=_SLOW_OK,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

STARTED_ONCE = ("server/", "engine/test_tensor_parallel", "engine/test_backends_agree")
"""Files whose tests share servers, ranks or engines that take seconds to start."""


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Keep the tests of such a file in one worker: each worker would start its own."""
    for item in items:
        path = item.path.as_posix().rpartition("/tests/")[2]
        if path.startswith(STARTED_ONCE):
            item.add_marker(pytest.mark.xdist_group(path))
