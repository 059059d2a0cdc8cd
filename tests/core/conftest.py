"""Runs a module's tests on every driver that has memory."""

import pytest

from tests import drivers


@pytest.fixture(params=drivers.KINDS)
def each_driver(request):
    with drivers.driver_kind(request.param) as fake:
        yield fake
