"""Controls of the stand-in: faults, latency, counters, modes, symbols; and cuda-python over it."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakecuda import (
    DEINITIALIZED,
    INVALID_DEVICE,
    INVALID_VALUE,
    NO_DEVICE,
    NOT_FOUND,
    NOT_SUPPORTED,
    OUT_OF_MEMORY,
    SUCCESS,
    CudaError,
    FakeCuda,
    library_path,
)

GRANULE = 64 << 10


def release_codes(cuda: FakeCuda, count: int) -> list[int]:
    """Releases of a handle that is not there: INVALID_VALUE unless something else comes first."""
    return [cuda.code("cuMemRelease", 1) for _ in range(count)]


def test_a_fault_hits_the_calls_it_names(cuda: FakeCuda) -> None:
    cuda.ctl("cuMemRelease:fail=3,count=2,err=999")
    assert release_codes(cuda, 6) == [1, 1, 999, 999, 1, 1]
    cuda.ctl("cuMemCreate:fail=1")
    with pytest.raises(CudaError) as caught:
        cuda.create(GRANULE)
    assert caught.value.code == OUT_OF_MEMORY
    assert "told to fail" in cuda.reason
    cuda.create(GRANULE)


def test_a_fault_may_count_every_call(cuda: FakeCuda) -> None:
    cuda.ctl("*:fail=2,err=700")
    name = ctypes.c_char_p()
    cuda.check("cuGetErrorName", 0, ctypes.byref(name))  # not one of the calls
    cuda.create(GRANULE)
    assert release_codes(cuda, 2) == [700, 1]  # an injected code does not stick
    cuda.ctl("*:fail=1;clear")
    assert release_codes(cuda, 1) == [OUT_OF_MEMORY]  # `clear` comes first, wherever it stands
    cuda.ctl("*:fail=1")
    cuda.ctl("clear")
    assert release_codes(cuda, 1) == [1]


def test_total_and_star_see_the_same_calls(cuda: FakeCuda) -> None:
    """So a loop `*:fail=k` for k up to the total of one run meets every call of that run."""

    def script() -> bool:
        try:
            base = cuda.reserve(GRANULE)
            cuda.map_new(base, GRANULE)
            cuda.value("cuDriverGetVersion", kind=ctypes.c_int)
            cuda.touch(base, 1)
            cuda.check("cuStreamSynchronize", 0)
        except CudaError:
            return False
        return True

    before = cuda.total_calls
    assert script()
    num_calls = cuda.total_calls - before
    assert num_calls == 5
    for fail in range(1, num_calls + 2):
        cuda.ctl(f"clear;*:fail={fail}")
        assert script() == (fail > num_calls)


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "nothing=1",
        "cuMemMap:",
        ":fail=1",
        "cuMemMap:fail=x",
        "cuMemMap:fail=0",
        "vmm=",
        "a:b=1",
    ],
)
def test_ctl_refuses_what_it_does_not_understand(cuda: FakeCuda, text: str) -> None:
    with pytest.raises(ValueError, match="does not understand"):
        cuda.ctl(f"vmm=0;{text}")
    assert cuda.value("cuDeviceGetAttribute", 102, 0, kind=ctypes.c_int) == 1  # nothing was done


LATENCY = """
import os, sys, threading
from tests.fakecuda import FakeCuda
cuda = FakeCuda(sys.argv[1])
cuda.start()
cuda.ctl("cuMemRelease:lat=3600000000000")  # an hour
threading.Thread(target=cuda.code, args=("cuMemRelease", 1), daemon=True).start()
while cuda.calls("cuMemRelease") == 0:
    pass
for _ in range(100):
    cuda.check("cuMemAddressFree", cuda.reserve(cuda.granularity()), cuda.granularity())
os._exit(7)  # before the hour is over: no lock is held during it
"""


def test_latency_is_slept_with_no_lock_held() -> None:
    command = [sys.executable, "-c", LATENCY, library_path()]
    assert subprocess.run(command, timeout=300, check=False).returncode == 7


def test_counters(cuda: FakeCuda) -> None:
    start = cuda.total_calls
    for _ in range(3):
        cuda.create(GRANULE)
    assert cuda.calls("cuMemCreate") == cuda.all_calls()["cuMemCreate"] == 3
    assert cuda.calls("cuMemMap") == 0
    assert cuda.total_calls == start + 3
    assert cuda.leaks == 3
    cuda.reset()
    assert (cuda.leaks, cuda.total_calls, cuda.all_calls()) == (0, 0, {})


def test_shut_down_driver(cuda: FakeCuda) -> None:
    cuda.ctl("deinitialized=1")
    assert cuda.code("cuInit", 0) == DEINITIALIZED
    assert release_codes(cuda, 1) == [DEINITIALIZED]
    assert cuda.code("cuCtxSetCurrent", None) == DEINITIALIZED


def test_no_device(cuda: FakeCuda) -> None:
    cuda.ctl("devices=0")
    assert cuda.code("cuInit", 0) == NO_DEVICE
    assert cuda.value("cuDeviceGetCount", kind=ctypes.c_int) == 0
    assert cuda.code("cuDeviceGet", ctypes.byref(ctypes.c_int()), 0) == INVALID_DEVICE


def test_no_virtual_memory_management(cuda: FakeCuda) -> None:
    cuda.ctl("vmm=0")
    assert cuda.value("cuDeviceGetAttribute", 102, 0, kind=ctypes.c_int) == 0
    assert release_codes(cuda, 1) == [NOT_SUPPORTED]


def test_device_queries(cuda: FakeCuda) -> None:
    name = ctypes.create_string_buffer(64)
    cuda.check("cuDeviceGetName", name, 64, 0)
    assert b"fakecuda" in name.value
    assert cuda.value("cuDeviceTotalMem_v2", 0) == 8 << 20
    assert cuda.value("cuDriverGetVersion", kind=ctypes.c_int) == 13000
    assert cuda.code("cuDeviceTotalMem_v2", ctypes.byref(ctypes.c_uint64()), 1) == INVALID_DEVICE
    attribute = ("cuDeviceGetAttribute", ctypes.byref(ctypes.c_int()))
    assert cuda.code(*attribute, 0, 0) == INVALID_VALUE
    for number in (75, 76):
        value = cuda.value("cuDeviceGetAttribute", number, 0, kind=ctypes.c_int)
        assert value == {75: 9, 76: 0}[number]


def look_up(cuda: FakeCuda, name: str, version: int = 13000) -> tuple[int, int, int]:
    """Code, function address and symbol status of one look-up."""
    function, status = ctypes.c_void_p(1), ctypes.c_int(-1)
    arguments = (name.encode(), ctypes.byref(function), version, 0, ctypes.byref(status))
    code = cuda.code("cuGetProcAddress_v2", *arguments)
    return code, function.value or 0, status.value


def address_of(cuda: FakeCuda, exported: str) -> int:
    return ctypes.cast(getattr(cuda.library, exported), ctypes.c_void_p).value or 0


def test_symbols_resolve_to_the_newest_variant(cuda: FakeCuda) -> None:
    for name in ("cuMemMap", "cuMemGetInfo", "cuEventDestroy", "cuDevicePrimaryCtxRelease"):
        plain_only = name == "cuMemMap"
        expected = address_of(cuda, name if plain_only else f"{name}_v2")
        assert look_up(cuda, name) == (SUCCESS, expected, 0)
    newest, older = address_of(cuda, "cuGetProcAddress_v2"), address_of(cuda, "cuGetProcAddress")
    assert look_up(cuda, "cuGetProcAddress") == (SUCCESS, newest, 0)
    assert look_up(cuda, "cuGetProcAddress", 11030) == (SUCCESS, older, 0)


def test_symbols_that_are_not_there(cuda: FakeCuda) -> None:
    assert look_up(cuda, "cuNoSuchCall") == (NOT_FOUND, 0, 1)
    assert look_up(cuda, "cuMemGetInfo_v2") == (NOT_FOUND, 0, 1)  # base names only
    assert look_up(cuda, "cuMemMap", 9000) == (NOT_FOUND, 0, 2)  # VMM came with 10.2
    assert look_up(cuda, "cuMemMap", 14000)[0] == INVALID_VALUE  # newer than the driver
    cuda.ctl("missing_symbol=0")  # as the header's text has it
    assert look_up(cuda, "cuNoSuchCall") == (SUCCESS, 0, 1)


def test_error_texts(cuda: FakeCuda) -> None:
    text = ctypes.c_char_p()
    cuda.check("cuGetErrorString", OUT_OF_MEMORY, ctypes.byref(text))
    assert text.value == b"out of memory"
    assert cuda.code("cuGetErrorName", 12345, ctypes.byref(text)) == INVALID_VALUE
    assert text.value is None


def test_environment_sets_the_first_state() -> None:
    script = (
        "import sys; from tests.fakecuda import FakeCuda; cuda = FakeCuda(sys.argv[1]);"
        "cuda.start(); import ctypes; base = cuda.reserve(1 << 21); cuda.map_new(base, 1 << 21);"
        "print(cuda.granularity(), cuda.value('cuDeviceTotalMem_v2', 0),"
        "ctypes.string_at(base, 1)[0], cuda.code('cuMemRelease', 1))"
    )
    settings = {
        "MEM_MB": "16",
        "GRAN_KB": "2048",
        "POISON": "0",
        "CTL": "cuMemRelease:fail=1,err=9",
    }
    child = subprocess.run(
        [sys.executable, "-c", script, library_path()],
        env=os.environ | {f"FAKECUDA_{name}": value for name, value in settings.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.stdout.split() == [str(2 << 20), str(16 << 20), "0", "9"], child.stderr


BINDINGS = """
from cuda.bindings import driver
def call(name, *arguments):
    code, *values = getattr(driver, name)(*arguments)
    assert code == driver.CUresult.CUDA_SUCCESS, (name, code)
    return values[0] if len(values) == 1 else tuple(values)
call("cuInit", 0)
device = call("cuDeviceGet", 0)
print(call("cuDeviceGetCount"), call("cuDriverGetVersion"), call("cuDeviceTotalMem", device))
print(call("cuDeviceGetName", 32, device).split(b"\\0")[0].decode())
call("cuCtxSetCurrent", call("cuDevicePrimaryCtxRetain", device))
prop = driver.CUmemAllocationProp()
prop.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
prop.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
size = call("cuMemGetAllocationGranularity", prop, minimum)
access = driver.CUmemAccessDesc()
access.location = prop.location
access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
base = call("cuMemAddressReserve", size, 0, 0, 0)
handle = call("cuMemCreate", size, prop, 0)
call("cuMemMap", base, size, 0, handle, 0)
call("cuMemSetAccess", base, size, [access], 1)
host = bytearray(b"12345678")
call("cuMemcpyHtoD", base, bytes(host), 8)
back = bytearray(8)
call("cuMemcpyDtoH", back, base, 8)
print(back.decode(), call("cuMemGetInfo"))
call("cuMemUnmap", base, size)
call("cuMemRelease", handle)
print(driver.cuMemRelease(handle)[0].name)
"""


def test_cuda_python_over_the_stand_in() -> None:
    pytest.importorskip("cuda.bindings", reason="cuda-python is not installed (extra: cuda)")
    child = subprocess.run(
        [sys.executable, "-c", BINDINGS],
        env=os.environ
        | {
            "LD_LIBRARY_PATH": str(Path(library_path()).parent),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "FAKECUDA_GRAN_KB": str(GRANULE >> 10),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines() == [
        f"1 13000 {256 << 20}",
        "fakecuda (CPU memory, no kernel",
        f"12345678 ({(256 << 20) - GRANULE}, {256 << 20})",
        "CUDA_ERROR_INVALID_VALUE",
    ]
