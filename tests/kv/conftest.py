"""Backends on the cuda driver find the stand-in, which finishes work when somebody asks for it."""

import pytest

from tests import drivers, fakecuda


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setenv("VMALLOC_LIBCUDA", fakecuda.library_path())
    with drivers.driver_kind("cuda"):
        yield
