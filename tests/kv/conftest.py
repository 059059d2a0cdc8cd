"""Caches on the CUDA driver run over the stand-in; what they leave there fails the test."""

import pytest

from .backends import stand_in_driver


@pytest.fixture(autouse=True)
def stand_in(request):
    """The stand-in driver for the tests that name a kind of backend on it; else None."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or callspec.params.get("kind") != "virtual(cuda)":
        yield None
        return
    with stand_in_driver() as fake:
        yield fake
