"""Backends on the cuda driver find the stand-in, which finishes work when somebody asks for it."""

import gc

import pytest

from tests import drivers, fakecuda


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """The stand-in driver; nothing may be left there once caches are closed or forgotten."""
    monkeypatch.setenv("VMALLOC_LIBCUDA", fakecuda.library_path())
    gc.freeze()  # what is older need not be looked at below
    with drivers.driver_kind("cuda") as fake:
        yield fake
        if fake.library.fakecuda_leaks():
            gc.collect()
        leaks = fake.library.fakecuda_leaks()
    gc.unfreeze()
    assert leaks == 0
