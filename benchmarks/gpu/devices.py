"""Drivers that sections measure: our core's, and the bare calls through cuda-python.

In a dry run both are the stand-in libcuda, which the orchestrator names in the environment, and
results say so.

Owns: nothing.  Thread-safety: as the drivers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vmalloc import _core

from .section import STAND_IN, Section


def make_driver(section: Section, page_bytes: int = 0) -> Any:
    """Our CUDA driver with pages of ``page_bytes`` (0: the granularity)."""
    driver = _core.make_cuda_driver(page_bytes, cpu_tensors=section.dry_run)
    section.set_driver(STAND_IN if section.dry_run else "cuda")
    return driver


@dataclass(frozen=True)
class RawDriver:
    """The driver's own calls, with a device chosen and its primary context current."""

    api: Any
    device: Any

    def call(self, name: str, *arguments: Any) -> Any:
        """The call's value, or None if it has none; RuntimeError with the code's name."""
        code, *values = getattr(self.api, name)(*arguments)
        if code != self.api.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{name} gave {code.name}")
        return values[0] if values else None

    def allocation_property(self) -> Any:
        """Pinned memory of the device, as our driver asks for it."""
        prop = self.api.CUmemAllocationProp()
        prop.type = self.api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        prop.location.type = self.api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        prop.location.id = int(self.device)
        return prop

    def access(self) -> Any:
        """Reading and writing by the device."""
        description = self.api.CUmemAccessDesc()
        description.location = self.allocation_property().location
        description.flags = self.api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        return description


def raw_driver(section: Section) -> RawDriver | None:
    """cuda-python's calls, or None with a note where it is not installed."""
    try:
        from cuda.bindings import driver as api
    except ImportError as error:
        section.skip("calls through cuda-python", str(error))
        return None
    bare = RawDriver(api, None)
    bare.call("cuInit", 0)
    device = bare.call("cuDeviceGet", 0)
    context = bare.call("cuDevicePrimaryCtxRetain", device)
    bare.call("cuCtxSetCurrent", context)
    return RawDriver(api, device)
