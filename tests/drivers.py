"""The driver that a test of the core runs on: the host's, or the cuda one over the stand-in.

The stand-in has pages of 4 KiB here, and finishes work when somebody asks whether it is finished,
so that what holds on the host holds there; tests of what is special about a GPU change that.
"""

from contextlib import contextmanager

from tests import fakecuda
from vmalloc import _core

PAGE = 4096
KINDS = ("host", "cuda")
_kind = "host"


@contextmanager
def driver_kind(kind):
    """Let ``make_driver`` make this kind; at the end nothing may be left of it."""
    global _kind
    fake = None
    if kind == "cuda":
        fake = fakecuda.FakeCuda()
        fake.reset()
        fake.ctl("query_runs=1")
    _kind = kind
    try:
        yield fake
    finally:
        _kind = "host"


def make_driver(page_bytes=PAGE):
    """A driver of the kind that is being tested, whose tensors the CPU can read."""
    if _kind == "host":
        return _core.make_host_driver(page_bytes)
    return _core.make_cuda_driver(
        page_bytes, library=str(fakecuda.library_path()), cpu_tensors=True
    )
