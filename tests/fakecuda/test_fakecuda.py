"""The stand-in's memory rules: each test breaks one and sees the documented code."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.fakecuda import (
    CONTEXT_IS_DESTROYED,
    INVALID_CONTEXT,
    INVALID_DEVICE,
    INVALID_VALUE,
    NO_ACCESS,
    NOT_INITIALIZED,
    NOT_SUPPORTED,
    OUT_OF_MEMORY,
    READ,
    READ_WRITE,
    SUCCESS,
    AccessDescription,
    AllocationProperties,
    CudaError,
    FakeCuda,
    Location,
    library_path,
)

GRANULE = 64 << 10


def reserved(cuda: FakeCuda, granules: int = 8, mapped: int = 0) -> int:
    """A reservation whose first `mapped` granules hold one mapping each."""
    base = cuda.reserve(granules * GRANULE)
    for index in range(mapped):
        cuda.map_new(base + index * GRANULE, GRANULE)
    return base


def create_code(cuda: FakeCuda, properties: AllocationProperties, num_bytes: int = GRANULE) -> int:
    handle = ctypes.c_uint64()
    return cuda.code("cuMemCreate", ctypes.byref(handle), num_bytes, ctypes.byref(properties), 0)


def test_a_page_lives_from_reserve_to_free(cuda: FakeCuda) -> None:
    base = reserved(cuda, mapped=1)
    assert ctypes.string_at(base, GRANULE) == b"\xff" * GRANULE  # poison, never zeros
    ctypes.memset(base, 7, GRANULE)
    assert ctypes.string_at(base, 2) == b"\x07\x07"
    assert cuda.leaks == 3  # handle, mapping, reservation
    handle = cuda.value("cuMemRetainAllocationHandle", base + 5)
    for call, arguments in (
        ("cuMemUnmap", (base, GRANULE)),
        ("cuMemRelease", (handle,)),
        ("cuMemRelease", (handle,)),
        ("cuMemAddressFree", (base, 8 * GRANULE)),
    ):
        cuda.check(call, *arguments)
    assert (cuda.leaks, cuda.used_bytes) == (0, 0)


def test_nothing_works_before_init(cuda: FakeCuda) -> None:
    cuda.ctl("initialized=0")
    count = ctypes.c_int()
    assert cuda.code("cuDeviceGetCount", ctypes.byref(count)) == NOT_INITIALIZED
    assert cuda.code("cuMemAddressFree", 0, GRANULE) == NOT_INITIALIZED
    cuda.check("cuInit", 0)
    assert cuda.value("cuDeviceGetCount", kind=ctypes.c_int) == 1


def test_granularity(cuda: FakeCuda) -> None:
    assert cuda.granularity(0) == GRANULE
    assert cuda.granularity(1) > GRANULE  # recommended is something else than the minimum
    with pytest.raises(CudaError) as caught:
        cuda.granularity(2)
    assert caught.value.code == INVALID_VALUE


RESERVE_BREACHES = {
    "zero bytes": (0, 0, 0, 0),
    "no multiple": (GRANULE + 4096, 0, 0, 0),
    "alignment": (GRANULE, 3 * GRANULE, 0, 0),
    "hint": (GRANULE, 0, 4096, 0),
    "flags": (GRANULE, 0, 0, 1),
}


@pytest.mark.parametrize("arguments", RESERVE_BREACHES.values(), ids=RESERVE_BREACHES)
def test_reserve_refuses(cuda: FakeCuda, arguments: tuple[int, ...]) -> None:
    result = ctypes.c_uint64()
    assert cuda.code("cuMemAddressReserve", ctypes.byref(result), *arguments) == INVALID_VALUE


def test_reserve_aligns_and_runs_out(cuda: FakeCuda) -> None:
    assert cuda.reserve(GRANULE, 1 << 30) % (1 << 30) == 0
    cuda.reserve(1 << 40)  # a reservation costs nothing
    with pytest.raises(CudaError) as caught:
        cuda.reserve(1 << 62)
    assert caught.value.code == OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("properties", "num_bytes", "expected"),
    [
        (AllocationProperties(), GRANULE - 1, INVALID_VALUE),
        (AllocationProperties(), 0, INVALID_VALUE),
        (AllocationProperties(device=1), GRANULE, INVALID_DEVICE),
        (AllocationProperties(device=-1), GRANULE, INVALID_DEVICE),
        (AllocationProperties(handle_types=2), GRANULE, NOT_SUPPORTED),  # a Windows handle
        (AllocationProperties(handle_types=64), GRANULE, INVALID_VALUE),
        (AllocationProperties(gpu_direct_rdma=2), GRANULE, INVALID_VALUE),
        (AllocationProperties(), 9 << 20, OUT_OF_MEMORY),
    ],
)
def test_create_refuses(
    cuda: FakeCuda, properties: AllocationProperties, num_bytes: int, expected: int
) -> None:
    assert create_code(cuda, properties, num_bytes) == expected
    assert cuda.leaks == 0


def test_create_refuses_other_types_and_host_locations(cuda: FakeCuda) -> None:
    for change in ("type", "location", "reserved"):
        properties = AllocationProperties()
        if change == "type":
            properties.type = 0
        elif change == "location":
            properties.location.type = 2
        else:
            properties.flags.reserved[1] = 1
        assert create_code(cuda, properties) == INVALID_VALUE


def test_rdma_flag_follows_the_attribute(cuda: FakeCuda) -> None:
    properties = AllocationProperties(gpu_direct_rdma=1)
    assert cuda.value("cuDeviceGetAttribute", 110, 0, kind=ctypes.c_int) == 1
    assert create_code(cuda, properties) == SUCCESS
    cuda.ctl("rdma=0")
    assert cuda.value("cuDeviceGetAttribute", 110, 0, kind=ctypes.c_int) == 0
    assert create_code(cuda, properties) == NOT_SUPPORTED


def test_capacity_is_exact(cuda: FakeCuda) -> None:
    handles = [cuda.create(GRANULE) for _ in range((8 << 20) // GRANULE)]
    assert create_code(cuda, AllocationProperties()) == OUT_OF_MEMORY
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    cuda.check("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    assert (free.value, total.value) == (0, 8 << 20)
    for handle in handles[::2]:
        cuda.check("cuMemRelease", handle)
    assert cuda.used_bytes == 4 << 20
    scattered = cuda.create(4 << 20)  # in pieces: free memory is never too fragmented
    base = cuda.reserve(4 << 20)
    cuda.map(base, 4 << 20, scattered)
    cuda.set_access(base, 4 << 20)
    ctypes.memset(base, 1, 4 << 20)


MapBreach = Callable[[FakeCuda, int, int], tuple[int, ...]]
# Each gets a base of 8 granules, of which the first holds a mapping, and a handle of 2 granules.
MAP_BREACHES: dict[str, MapBreach] = {
    "offset": lambda cuda, base, handle: (base + GRANULE, GRANULE, GRANULE, handle, 0),
    "flags": lambda cuda, base, handle: (base + GRANULE, GRANULE, 0, handle, 1),
    "address": lambda cuda, base, handle: (base + GRANULE + 4096, GRANULE, 0, handle, 0),
    "size": lambda cuda, base, handle: (base + GRANULE, GRANULE // 2, 0, handle, 0),
    "zero": lambda cuda, base, handle: (base + GRANULE, 0, 0, handle, 0),
    "too long": lambda cuda, base, handle: (base + GRANULE, 3 * GRANULE, 0, handle, 0),
    "overlap": lambda cuda, base, handle: (base, 2 * GRANULE, 0, handle, 0),
    "past the end": lambda cuda, base, handle: (base + 7 * GRANULE, 2 * GRANULE, 0, handle, 0),
    "before it": lambda cuda, base, handle: (base - GRANULE, GRANULE, 0, handle, 0),
    "unknown handle": lambda cuda, base, handle: (base + GRANULE, GRANULE, 0, 12345, 0),
}


@pytest.mark.parametrize("breach", MAP_BREACHES.values(), ids=MAP_BREACHES)
def test_map_refuses(cuda: FakeCuda, breach: MapBreach) -> None:
    base = reserved(cuda, mapped=1)
    handle = cuda.create(2 * GRANULE)
    assert cuda.code("cuMemMap", *breach(cuda, base, handle)) == INVALID_VALUE
    assert cuda.reason
    cuda.map(base + GRANULE, 2 * GRANULE, handle)


def test_map_refuses_a_released_handle_that_is_still_mapped(cuda: FakeCuda) -> None:
    base = reserved(cuda, mapped=1)
    handle = cuda.value("cuMemRetainAllocationHandle", base)
    cuda.check("cuMemRelease", handle)
    cuda.check("cuMemRelease", handle)
    assert cuda.code("cuMemRelease", handle) == INVALID_VALUE  # over-release
    assert cuda.code("cuMemMap", base + GRANULE, GRANULE, 0, handle, 0) == INVALID_VALUE
    assert cuda.used_bytes == GRANULE  # the mapping keeps the memory
    ctypes.memset(base, 1, GRANULE)
    cuda.check("cuMemUnmap", base, GRANULE)
    assert cuda.used_bytes == 0


def test_one_handle_in_two_places(cuda: FakeCuda) -> None:
    base = reserved(cuda, mapped=1)
    handle = cuda.value("cuMemRetainAllocationHandle", base)
    cuda.map(base + 4 * GRANULE, GRANULE, handle)
    cuda.set_access(base + 4 * GRANULE, GRANULE, READ)
    ctypes.memset(base, 42, GRANULE)
    assert ctypes.string_at(base + 4 * GRANULE, 3) == b"***"
    cuda.check("cuMemUnmap", base, GRANULE)
    assert ctypes.string_at(base + 4 * GRANULE, 3) == b"***"
    assert cuda.used_bytes == GRANULE


# Over granules 0, 1, 2 with a mapping each, 4 and 5 with one mapping of both, 3 and 6 free.
RANGES = {
    "one": (0, 1, SUCCESS),
    "run": (0, 3, SUCCESS),
    "two-granule mapping": (4, 2, SUCCESS),
    "gap": (0, 5, INVALID_VALUE),
    "nothing mapped": (3, 1, INVALID_VALUE),
    "gap at the end": (4, 3, INVALID_VALUE),
    "front part": (4, 1, INVALID_VALUE),
    "back part": (5, 1, INVALID_VALUE),
    "zero": (0, 0, INVALID_VALUE),
    "past the end": (0, 100, INVALID_VALUE),
}


@pytest.mark.parametrize(("start", "granules", "expected"), RANGES.values(), ids=RANGES)
def test_unmap_and_set_access_take_whole_mappings(
    cuda: FakeCuda, start: int, granules: int, expected: int
) -> None:
    base = reserved(cuda, mapped=3)
    cuda.map_new(base + 4 * GRANULE, 2 * GRANULE)
    at, num_bytes = base + start * GRANULE, granules * GRANULE
    assert cuda.access_code(at, num_bytes, READ) == expected
    used = cuda.used_bytes
    assert cuda.code("cuMemUnmap", at, num_bytes) == expected
    assert used == cuda.used_bytes  # the handles are still there
    if expected == SUCCESS:
        assert cuda.code("cuMemUnmap", at, num_bytes) == INVALID_VALUE


def test_a_range_stays_in_one_reservation(cuda: FakeCuda) -> None:
    free_range = cuda.reserve(8 * GRANULE)
    cuda.check("cuMemAddressFree", free_range, 8 * GRANULE)
    first, second = (
        cuda.value("cuMemAddressReserve", GRANULE, 0, free_range + index * GRANULE, 0)
        for index in range(2)
    )
    assert second == first + GRANULE  # hints are taken where the addresses are free
    for base in (first, second):
        cuda.map_new(base, GRANULE)
    assert cuda.code("cuMemUnmap", first, 2 * GRANULE) == INVALID_VALUE
    assert cuda.access_code(first, 2 * GRANULE) == INVALID_VALUE


def test_runs_can_be_switched_off(cuda: FakeCuda) -> None:
    base = reserved(cuda, mapped=2)
    cuda.ctl("unmap_runs=0;access_runs=0")
    assert cuda.access_code(base, 2 * GRANULE) == INVALID_VALUE
    assert cuda.code("cuMemUnmap", base, 2 * GRANULE) == INVALID_VALUE
    for index in range(2):
        cuda.set_access(base + index * GRANULE, GRANULE)
        cuda.check("cuMemUnmap", base + index * GRANULE, GRANULE)


def test_access_flags_and_locations(cuda: FakeCuda) -> None:
    base = reserved(cuda, mapped=1)
    where = ctypes.byref(Location(1, 0))
    for access in (READ, READ_WRITE, NO_ACCESS):
        cuda.set_access(base, GRANULE, access)
        assert cuda.value("cuMemGetAccess", where, base) == access
    assert cuda.access_code(base, GRANULE, 2) == INVALID_VALUE
    wrong = AccessDescription(Location(1, 1), READ_WRITE)
    assert cuda.code("cuMemSetAccess", base, GRANULE, ctypes.byref(wrong), 1) == INVALID_DEVICE
    assert cuda.code("cuMemSetAccess", base, GRANULE, ctypes.byref(wrong), 0) == INVALID_VALUE
    cuda.ctl("read_only=0")
    assert cuda.access_code(base, GRANULE, READ) == INVALID_VALUE


def test_address_free_is_exact(cuda: FakeCuda) -> None:
    base = reserved(cuda, mapped=1)
    whole = 8 * GRANULE
    assert cuda.code("cuMemAddressFree", base, whole) == INVALID_VALUE  # still mapped
    cuda.check("cuMemUnmap", base, GRANULE)
    assert cuda.code("cuMemAddressFree", base, GRANULE) == INVALID_VALUE
    assert cuda.code("cuMemAddressFree", base + GRANULE, whole - GRANULE) == INVALID_VALUE
    cuda.check("cuMemAddressFree", base, whole)
    assert cuda.code("cuMemAddressFree", base, whole) == INVALID_VALUE


def test_export_needs_the_type_at_create(cuda: FakeCuda) -> None:
    shareable = ctypes.c_int(-1)
    plain, exportable = cuda.create(GRANULE), cuda.create(GRANULE, AllocationProperties(1))
    export = ("cuMemExportToShareableHandle", ctypes.byref(shareable))
    assert cuda.code(*export, plain, 1, 0) == INVALID_VALUE
    assert cuda.code(*export, exportable, 2, 0) == INVALID_VALUE
    assert cuda.code(*export, exportable, 1, 1) == INVALID_VALUE
    cuda.check(*export, exportable, 1, 0)
    assert os.fstat(shareable.value).st_size == 8 << 20
    os.close(shareable.value)
    cuda.ctl("posix_fd=0")
    assert create_code(cuda, AllocationProperties(1)) == NOT_SUPPORTED


def test_contexts_are_counted_and_belong_to_threads(cuda: FakeCuda) -> None:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    info = ("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    context = cuda.value("cuDevicePrimaryCtxRetain", 0)
    assert context == cuda.value("cuCtxGetCurrent")
    cuda.check("cuDevicePrimaryCtxRelease_v2", 0)
    cuda.check(*info)
    cuda.check("cuCtxSetCurrent", None)
    assert cuda.code(*info) == INVALID_CONTEXT
    base = reserved(cuda, mapped=1)  # VMM calls need none
    cuda.ctl("vmm_context=1")
    assert cuda.code("cuMemUnmap", base, GRANULE) == INVALID_CONTEXT
    assert cuda.code("cuCtxSetCurrent", context + 8) == INVALID_CONTEXT
    cuda.check("cuCtxSetCurrent", context)
    cuda.check("cuMemUnmap", base, GRANULE)
    cuda.check("cuDevicePrimaryCtxRelease_v2", 0)
    assert cuda.code(*info) == CONTEXT_IS_DESTROYED
    assert cuda.code("cuCtxSetCurrent", context) == INVALID_CONTEXT
    assert cuda.code("cuDevicePrimaryCtxRelease_v2", 0) == INVALID_CONTEXT
    assert cuda.code("cuDevicePrimaryCtxRelease_v2", 1) == INVALID_DEVICE


def test_plain_memory(cuda: FakeCuda) -> None:
    address = cuda.value("cuMemAlloc_v2", 100)
    ctypes.memset(address, 1, 100)
    assert cuda.leaks == 1
    assert cuda.code("cuMemUnmap", address, GRANULE) == INVALID_VALUE
    assert cuda.code("cuMemAddressFree", address, GRANULE) == INVALID_VALUE
    assert cuda.code("cuMemFree_v2", address + 1) == INVALID_VALUE
    cuda.check("cuMemFree_v2", address)
    assert cuda.code("cuMemFree_v2", address) == INVALID_VALUE
    assert cuda.code("cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), 9 << 20) == OUT_OF_MEMORY
    host = cuda.value("cuMemHostAlloc", 100, 0)
    assert cuda.leaks == 1
    assert cuda.code("cuMemFreeHost", host + 1) == INVALID_VALUE
    cuda.check("cuMemFreeHost", host)
    assert cuda.code("cuMemFreeHost", host) == INVALID_VALUE
    assert (cuda.leaks, cuda.used_bytes) == (0, 0)


CRASH = """
import ctypes, sys
from tests.fakecuda import FakeCuda
cuda = FakeCuda(sys.argv[1])
cuda.start()
granule = cuda.granularity()
base = cuda.reserve(4 * granule)
cuda.map_new(base, granule)
cuda.map(base + granule, granule, cuda.create(granule))
cuda.map_new(base + 2 * granule, granule)
cuda.set_access(base + 2 * granule, granule, 1)
ctypes.string_at(base, granule), ctypes.string_at(base + 2 * granule, granule)
print("alive", flush=True)
ctypes.{access}
print("no fault", flush=True)
"""


@pytest.mark.parametrize(
    "access",
    [
        "string_at(base + granule, 1)",  # mapped, no access yet
        "string_at(base + 3 * granule, 1)",  # reserved only
        "memset(base + 2 * granule, 1, 1)",  # read-only
    ],
)
def test_the_cpu_faults_where_the_device_would(access: str) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CRASH.replace("{access}", access), library_path()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (child.stdout, child.returncode) == ("alive\n", -signal.SIGSEGV), child.stderr
