"""The stand-in driver, started anew for each test: 8 MiB of memory in granules of 64 KiB."""

from collections.abc import Iterator

import pytest

from tests.fakecuda import FakeCuda

GRANULE = 64 << 10


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    cuda = FakeCuda()
    cuda.reset(mem_mb=8, gran_kb=GRANULE >> 10)
    cuda.start()
    yield cuda
    cuda.reset()
