"""The stand-in CUDA driver for tests: builds it once and speaks to it through ctypes.

Owns: the build in build/fakecuda. Thread-safety: all functions; a file lock keeps processes apart.

`exports.h` beside this file says what the library promises, refuses and can be told.
"""

import ctypes
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_SOURCES = Path(__file__).resolve().parent
_ROOT = _SOURCES.parents[1]

SUCCESS = 0
INVALID_VALUE = 1
OUT_OF_MEMORY = 2
NOT_INITIALIZED = 3
DEINITIALIZED = 4
NO_DEVICE = 100
INVALID_DEVICE = 101
INVALID_CONTEXT = 201
INVALID_HANDLE = 400
NOT_FOUND = 500
NOT_READY = 600
ILLEGAL_ADDRESS = 700
CONTEXT_IS_DESTROYED = 709
NOT_SUPPORTED = 801

NO_ACCESS, READ, READ_WRITE = 0, 1, 3


def library_path() -> str:
    """Path of libcuda.so.1, built first if it is missing or older than a source.

    `FAKECUDA_LIBRARY` names another build of it (a sanitizer's, say). Raises RuntimeError with the
    tools' own words if the build fails.
    """
    if given := os.environ.get("FAKECUDA_LIBRARY"):
        return given
    build = _ROOT / "build" / "fakecuda"
    library = build / "libcuda.so.1"
    if not _is_fresh(build):
        build.mkdir(parents=True, exist_ok=True)
        with (build / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_fresh(build):  # another process may have built it while we waited
                _build(build)
    return str(library)


def _is_fresh(build: Path) -> bool:
    """The stamp is written after the library is whole, so nobody loads half of one."""
    sources = [*_SOURCES.glob("*.cpp"), *_SOURCES.glob("*.h"), _SOURCES / "CMakeLists.txt"]
    with suppress(FileNotFoundError):
        return (build / ".built").stat().st_mtime >= max(
            source.stat().st_mtime for source in sources
        )
    return False


def _build(build: Path) -> None:
    cmake, ninja = _find_tool("cmake"), _find_tool("ninja")
    if cmake is None:
        raise RuntimeError("cmake is needed to build the stand-in CUDA driver; pip install cmake")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    for command in (
        [cmake, "-S", str(_SOURCES), "-B", str(build), *generator],
        [cmake, "--build", str(build)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    (build / ".built").touch()


def _find_tool(name: str) -> str | None:
    """Beside this Python, in PATH, or inside the Python package of that name."""
    beside = Path(sys.executable).parent / name
    if beside.exists():
        return str(beside)
    if found := shutil.which(name):
        return found
    if spec := importlib.util.find_spec(name):
        for folder in spec.submodule_search_locations or ():
            for path in (
                Path(folder) / "data" / "bin" / name,
                Path(folder).parents[3] / "bin" / name,
            ):
                if path.exists():
                    return str(path)
    return None


class Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class AllocationFlags(ctypes.Structure):
    _fields_ = (
        ("compression_type", ctypes.c_uint8),
        ("gpu_direct_rdma", ctypes.c_uint8),
        ("usage", ctypes.c_uint16),
        ("reserved", ctypes.c_uint8 * 4),
    )


class AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp: pinned memory of device 0 unless told otherwise."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", Location),
        ("win32_metadata", ctypes.c_void_p),
        ("flags", AllocationFlags),
    )

    def __init__(self, handle_types: int = 0, device: int = 0, *, gpu_direct_rdma: int = 0) -> None:
        super().__init__(1, handle_types, Location(1, device), None)
        self.flags.gpu_direct_rdma = gpu_direct_rdma


class AccessDescription(ctypes.Structure):
    _fields_ = (("location", Location), ("flags", ctypes.c_int))


class CudaError(RuntimeError):
    """A driver call returned something else than success."""

    def __init__(self, call: str, code: int, reason: str) -> None:
        super().__init__(f"{call}: {code} ({reason})")
        self.code = code


_INT, _U32, _U64, _SIZE, _PTR = (
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_uint64,
    ctypes.c_size_t,
    ctypes.c_void_p,
)
# Parameter types by exported name. Output parameters are plain pointers.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (_U32,),
    "cuDriverGetVersion": (_PTR,),
    "cuGetErrorName": (_INT, _PTR),
    "cuGetErrorString": (_INT, _PTR),
    "cuGetProcAddress_v2": (ctypes.c_char_p, _PTR, _INT, _U64, _PTR),
    "cuDeviceGetCount": (_PTR,),
    "cuDeviceGet": (_PTR, _INT),
    "cuDeviceGetName": (_PTR, _INT, _INT),
    "cuDeviceGetAttribute": (_PTR, _INT, _INT),
    "cuDeviceTotalMem_v2": (_PTR, _INT),
    "cuDevicePrimaryCtxRetain": (_PTR, _INT),
    "cuDevicePrimaryCtxRelease_v2": (_INT,),
    "cuCtxGetCurrent": (_PTR,),
    "cuCtxSetCurrent": (_PTR,),
    "cuCtxSynchronize": (),
    "cuMemGetAllocationGranularity": (_PTR, _PTR, _INT),
    "cuMemAddressReserve": (_PTR, _SIZE, _SIZE, _U64, _U64),
    "cuMemAddressFree": (_U64, _SIZE),
    "cuMemCreate": (_PTR, _SIZE, _PTR, _U64),
    "cuMemRelease": (_U64,),
    "cuMemMap": (_U64, _SIZE, _SIZE, _U64, _U64),
    "cuMemUnmap": (_U64, _SIZE),
    "cuMemSetAccess": (_U64, _SIZE, _PTR, _SIZE),
    "cuMemGetAccess": (_PTR, _PTR, _U64),
    "cuMemRetainAllocationHandle": (_PTR, _U64),
    "cuMemGetAllocationPropertiesFromHandle": (_PTR, _U64),
    "cuMemExportToShareableHandle": (_PTR, _U64, _INT, _U64),
    "cuMemGetInfo_v2": (_PTR, _PTR),
    "cuMemAlloc_v2": (_PTR, _SIZE),
    "cuMemFree_v2": (_U64,),
    "cuMemGetAddressRange_v2": (_PTR, _PTR, _U64),
    "cuMemHostAlloc": (_PTR, _SIZE, _U32),
    "cuMemFreeHost": (_PTR,),
    "cuMemcpyHtoD_v2": (_U64, _PTR, _SIZE),
    "cuMemcpyDtoH_v2": (_PTR, _U64, _SIZE),
    "cuMemcpyHtoDAsync_v2": (_U64, _PTR, _SIZE, _U64),
    "cuMemcpyDtoHAsync_v2": (_PTR, _U64, _SIZE, _U64),
    "cuMemcpyDtoDAsync_v2": (_U64, _U64, _SIZE, _U64),
    "cuMemsetD8Async": (_U64, ctypes.c_uint8, _SIZE, _U64),
    "cuStreamCreate": (_PTR, _U32),
    "cuStreamDestroy_v2": (_U64,),
    "cuStreamSynchronize": (_U64,),
    "cuStreamQuery": (_U64,),
    "cuStreamWaitEvent": (_U64, _U64, _U32),
    "cuEventCreate": (_PTR, _U32),
    "cuEventDestroy_v2": (_U64,),
    "cuEventRecord": (_U64, _U64),
    "cuEventQuery": (_U64,),
    "cuEventSynchronize": (_U64,),
    "fakecuda_touch": (_U64, _U64, _SIZE, _INT),
    "fakecuda_run_stream": (_U64,),
}
_COUNTERS = ("fakecuda_total_calls", "fakecuda_used_bytes", "fakecuda_leaks")


class FakeCuda:
    """The stand-in in this process: its controls, and the driver calls that tests make.

    Whoever loads the same path shares the state, the core's own driver included.
    """

    def __init__(self, path: str | None = None) -> None:
        self.library = library = ctypes.CDLL(path or library_path())
        for name, types in _SIGNATURES.items():
            getattr(library, name).argtypes = types
        for name in _COUNTERS:
            getattr(library, name).restype = ctypes.c_uint64
        library.fakecuda_calls.argtypes = (ctypes.c_char_p,)
        library.fakecuda_calls.restype = ctypes.c_uint64
        library.fakecuda_pending.argtypes = (ctypes.c_uint64,)
        library.fakecuda_pending.restype = ctypes.c_uint64
        library.fakecuda_ctl.argtypes = (ctypes.c_char_p,)
        library.fakecuda_call_names.argtypes = (ctypes.c_char_p, ctypes.c_size_t)
        library.fakecuda_reason.restype = ctypes.c_char_p

    # Controls ------------------------------------------------------------------------------------
    def reset(self, *, mem_mb: int | None = None, gran_kb: int | None = None) -> None:
        """Forgets everything; sizes given here hold for this process until the next reset."""
        wanted = {"FAKECUDA_MEM_MB": mem_mb, "FAKECUDA_GRAN_KB": gran_kb}
        before = {name: os.environ.get(name) for name in wanted}
        for name, value in wanted.items():
            if value is not None:
                os.environ[name] = str(value)
        try:
            self.library.fakecuda_reset()
        finally:
            for name, text in before.items():
                if text is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = text

    def ctl(self, text: str) -> None:
        """Modes and faults; ValueError if the text is not understood."""
        if self.library.fakecuda_ctl(text.encode()) != 0:
            raise ValueError(f"fakecuda_ctl does not understand {text!r}")

    def calls(self, name: str) -> int:
        return self.library.fakecuda_calls(name.encode())

    def all_calls(self) -> dict[str, int]:
        buffer = ctypes.create_string_buffer(8192)
        self.library.fakecuda_call_names(buffer, len(buffer))
        names = buffer.value.decode()
        return {name: self.calls(name) for name in names.split(",") if name}

    @property
    def total_calls(self) -> int:
        return self.library.fakecuda_total_calls()

    @property
    def used_bytes(self) -> int:
        return self.library.fakecuda_used_bytes()

    @property
    def leaks(self) -> int:
        return self.library.fakecuda_leaks()

    @property
    def reason(self) -> str:
        """Why this thread's last refused call was refused."""
        return self.library.fakecuda_reason().decode()

    def pending(self, stream: int = 0) -> int:
        return self.library.fakecuda_pending(stream)

    def touch(self, address: int, num_bytes: int, *, write: bool = False, stream: int = 0) -> None:
        """Enqueues a launch that reads or writes a range of device memory."""
        self.check("fakecuda_touch", stream, address, num_bytes, int(write))

    def run_stream(self, stream: int = 0) -> int:
        return self.library.fakecuda_run_stream(stream)

    # Driver calls --------------------------------------------------------------------------------
    def code(self, name: str, *arguments: object) -> int:
        """Makes a driver call by its exported name and returns its code."""
        return getattr(self.library, name)(*arguments)

    def check(self, name: str, *arguments: object) -> None:
        """The same, but anything else than success raises CudaError."""
        if code := self.code(name, *arguments):
            raise CudaError(name, code, self.reason)

    def value(self, name: str, *arguments: object, kind: Callable[..., Any] = _U64) -> int:
        """A call whose first parameter is its result."""
        result = kind()
        self.check(name, ctypes.byref(result), *arguments)
        return result.value or 0

    def start(self) -> int:
        """cuInit, and the primary context retained and current on this thread; returns it."""
        self.check("cuInit", 0)
        context = self.value("cuDevicePrimaryCtxRetain", 0)
        self.check("cuCtxSetCurrent", context)
        return context

    def granularity(self, option: int = 0) -> int:
        return self.value(
            "cuMemGetAllocationGranularity", ctypes.byref(AllocationProperties()), option
        )

    def reserve(self, num_bytes: int, alignment: int = 0) -> int:
        return self.value("cuMemAddressReserve", num_bytes, alignment, 0, 0)

    def create(self, num_bytes: int, properties: AllocationProperties | None = None) -> int:
        properties = properties or AllocationProperties()
        return self.value("cuMemCreate", num_bytes, ctypes.byref(properties), 0)

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        self.check("cuMemMap", address, num_bytes, 0, handle, 0)

    def access_code(self, address: int, num_bytes: int, access: int = READ_WRITE) -> int:
        description = AccessDescription(Location(1, 0), access)
        return self.code("cuMemSetAccess", address, num_bytes, ctypes.byref(description), 1)

    def set_access(self, address: int, num_bytes: int, access: int = READ_WRITE) -> None:
        if code := self.access_code(address, num_bytes, access):
            raise CudaError("cuMemSetAccess", code, self.reason)

    def map_new(self, address: int, num_bytes: int) -> int:
        """Creates memory, maps it at `address` with full access, and returns its handle."""
        handle = self.create(num_bytes)
        self.map(address, num_bytes, handle)
        self.set_access(address, num_bytes)
        return handle
