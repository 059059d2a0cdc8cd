"""CUDA devices and what they can do, by way of cuda-python (``pip install 'vmalloc[cuda]'``).

Owns: nothing; the memory itself is the core's business, which asks libcuda without Python.
Thread-safety: all functions.

cuda-python loads on machines without a driver and says so at the first call only, each version with
another exception; here all that may be missing is one sentence. It opens ``libcuda.so.1`` where the
loader finds it: ``VMALLOC_LIBCUDA`` is heeded by the core alone. Streams and events are handed
around by pointer, as ``int(handle)`` of whatever library made them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from .errors import DriverError

_NO_DEVICE = "CUDA_ERROR_NO_DEVICE"


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """One device; None is what it did not tell.

    Attributes:
        index: its number, as in ``"cuda:1"``.
        compute_capability: as in ``"9.0"``.
        total_bytes, free_bytes: its memory. To know what is free takes a context for a moment.
        has_virtual_memory: whether addresses can be reserved and mapped.
        granularity_bytes: smallest page for pinned memory on the device itself, the kind that the
            core creates; recommended_granularity_bytes: page for which the driver is fastest.
        can_export: whether pages can become file descriptors for other processes.
        can_rdma: whether network cards can read mapped pages.
        problem: the call that failed while it was asked, else ``""``.
    """

    index: int
    name: str
    compute_capability: str
    total_bytes: int
    free_bytes: int | None
    has_virtual_memory: bool
    granularity_bytes: int | None
    recommended_granularity_bytes: int | None
    can_export: bool
    can_rdma: bool
    problem: str = ""


@dataclass(frozen=True, slots=True)
class CudaDevices:
    """All devices, or why there are none to see.

    Attributes:
        absence: one sentence for people; None where devices were found.
        bindings_version: of cuda-python's ``cuda-bindings``; None where it is not installed.
        driver_version: the newest CUDA that the driver speaks, ``13000`` for 13.0.
    """

    absence: str | None
    bindings_version: str | None
    driver_version: int | None
    devices: tuple[CudaDevice, ...] = ()


class _AbsentError(Exception):
    """Something that is needed is not there; the text says what."""


def find_devices() -> CudaDevices:
    """Every device that the driver sees. Nothing that is missing or broken is an exception."""
    version = bindings_version()
    driver_version = None
    try:
        driver = _load()
        driver_version = int(_call(driver.cuDriverGetVersion))
        _start(driver)
        count = _call(driver.cuDeviceGetCount)
        if count == 0:
            raise _AbsentError("the CUDA driver sees no device")
        devices = tuple(_describe(driver, index) for index in range(count))
    except (_AbsentError, DriverError) as error:
        return CudaDevices(str(error), version, driver_version)
    return CudaDevices(None, version, driver_version, devices)


def error_name(code: int) -> str:
    """``2`` -> ``"CUDA_ERROR_OUT_OF_MEMORY"``; a code that nobody knows names itself.

    From the bindings' own table, so it needs no driver.
    """
    try:
        from cuda.bindings import driver
    except ImportError:
        return f"CUDA error {code}"
    try:
        return str(driver.CUresult(code).name)
    except ValueError:
        return f"CUDA error {code}"


def bindings_version() -> str | None:
    """Version of ``cuda-bindings``, None where it is not installed."""
    try:
        return metadata.version("cuda-bindings")
    except metadata.PackageNotFoundError:
        return None


def format_version(driver_version: int) -> str:
    """``13020`` -> ``"13.2"``."""
    return f"{driver_version // 1000}.{driver_version % 1000 // 10}"


def _load() -> Any:
    """``cuda.bindings.driver``."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        if bindings_version() is None:
            text = "cuda-python is not installed (pip install 'vmalloc[cuda]')"
        else:
            text = f"cuda-python does not load: {error}"
        raise _AbsentError(text) from error
    return driver


def _start(driver: Any) -> None:
    try:
        _call(driver.cuInit, 0)
    except DriverError as error:
        if error.name == _NO_DEVICE:
            raise _AbsentError("the CUDA driver sees no device") from error
        raise _AbsentError(f"the CUDA driver does not start: {error.name}") from error


def _call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    """What a driver call gives beside its result: the one place where absence is recognised.

    Raises:
        DriverError: it failed.
        _AbsentError: there is no driver, or it lacks this call.
    """
    try:
        result, *values = function(*arguments)
    except RuntimeError as error:  # 13.0 raises this, 13.5 DynamicLibNotFoundError, which is one
        raise _AbsentError(f"no CUDA driver: {error}") from error
    if int(result) != 0:
        raise DriverError(function.__name__, int(result), error_name(int(result)))
    return values[0] if len(values) == 1 else tuple(values)


def _describe(driver: Any, index: int) -> CudaDevice:
    device = _call(driver.cuDeviceGet, index)
    kinds = driver.CUdevice_attribute

    def attribute(name: str) -> int:
        kind = getattr(kinds, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(_call(driver.cuDeviceGetAttribute, kind, device))

    major, minor = attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")
    has_virtual_memory = bool(attribute("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED"))
    free_bytes = granularity = recommended = None
    problem = ""
    try:
        free_bytes, _ = _memory_info(driver, device)
        if has_virtual_memory:
            granularity, recommended = _granularities(driver, index)
    except DriverError as error:
        problem = str(error)
    return CudaDevice(
        index=index,
        name=_call(driver.cuDeviceGetName, 256, device).split(b"\0")[0].decode(errors="replace"),
        compute_capability=f"{major}.{minor}",
        total_bytes=int(_call(driver.cuDeviceTotalMem, device)),
        free_bytes=free_bytes,
        has_virtual_memory=has_virtual_memory,
        granularity_bytes=granularity,
        recommended_granularity_bytes=recommended,
        can_export=bool(attribute("HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED")),
        can_rdma=bool(attribute("GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED")),
        problem=problem,
    )


def _memory_info(driver: Any, device: Any) -> tuple[int, int]:
    """Free and total bytes; leaves this thread's context as it was."""
    context = _call(driver.cuDevicePrimaryCtxRetain, device)
    try:
        former = _call(driver.cuCtxGetCurrent)
        _call(driver.cuCtxSetCurrent, context)
        try:
            free_bytes, total_bytes = _call(driver.cuMemGetInfo)
        finally:
            _call(driver.cuCtxSetCurrent, former)
    finally:
        _call(driver.cuDevicePrimaryCtxRelease, device)
    return int(free_bytes), int(total_bytes)


def _granularities(driver: Any, index: int) -> tuple[int, int]:
    """Smallest and recommended page, for memory exactly as the core asks for it."""
    properties = driver.CUmemAllocationProp()
    properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = index
    kinds = driver.CUmemAllocationGranularity_flags
    smallest, recommended = (
        int(_call(driver.cuMemGetAllocationGranularity, properties, kind))
        for kind in (
            kinds.CU_MEM_ALLOC_GRANULARITY_MINIMUM,
            kinds.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED,
        )
    )
    return smallest, recommended
