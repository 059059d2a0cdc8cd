"""Settings for every test: quiet OpenMP, and a deterministic hypothesis."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # before torch loads libgomp
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers asks a hub for a missing model
os.environ["FAKECUDA_GRAN_KB"] = "4"  # before the stand-in driver loads: small pages, many of them

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
