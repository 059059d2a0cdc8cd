"""What this machine offers: drivers, devices, kernels, the backend that ``auto`` picks, and limits.

Owns: nothing.  Thread-safety: reads the system only.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import __version__, _core
from .config import DEFAULT_PAGE_BYTES
from .cuda_devices import CudaDevices, find_devices, format_version
from .device import tensor_device
from .errors import ConfigError, VmallocError
from .factory import choose_backend
from .kernel_info import kernel_facts

_MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


def host_info() -> dict[str, Any]:
    """Facts as plain JSON values; sizes in bytes. What is absent or broken says why."""
    found = find_devices()
    drivers = [_host_driver()]
    drivers_absent = {}
    for device in _cuda_names(found):
        try:
            drivers.append(_cuda_driver(device))
        except VmallocError as error:
            drivers_absent[device] = str(error)
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "drivers": drivers,
        "drivers_absent": drivers_absent,
        "cuda_python": _cuda_python(found),
        "kv_backend": {device: _backend(device) for device in ("cpu", "cuda")},
        "attention_kernels": kernel_facts(),
        "limits": {
            "cpu_cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "max_map_count": _read_int(_MAX_MAP_COUNT),
            "overcommit_memory": _read_int(_OVERCOMMIT),
        },
    }


def _host_driver() -> dict[str, Any]:
    return _driver_facts(_core.make_host_driver(DEFAULT_PAGE_BYTES), "cpu")


def _cuda_driver(device: str) -> dict[str, Any]:
    """The core's own driver on one device: what it found there, and what it tried.

    Raises:
        VmallocError: there is none, or it does not work.
    """
    driver = _core.make_cuda_driver(device=int(device.partition(":")[2]))
    info = driver.info()
    return {
        **_driver_facts(driver, device),
        **info,
        "driver_version": format_version(int(info["driver_version"])),
        "library": os.environ.get("VMALLOC_LIBCUDA") or "libcuda.so.1",
    }


def _driver_facts(driver: _core.Driver, device: str) -> dict[str, Any]:
    free_bytes, total_bytes = driver.memory_info()
    return {
        "name": driver.name,
        "device": device,
        "granularity_bytes": driver.granularity,
        "default_page_bytes": driver.page_bytes,
        "free_bytes": free_bytes,
        "total_bytes": total_bytes,
    }


def _cuda_names(found: CudaDevices) -> Iterator[str]:
    """``"cuda:0"`` at least, and all that cuda-python or torch sees."""
    count = max(len(found.devices), torch.cuda.device_count(), 1)
    return (f"cuda:{index}" for index in range(count))


def _cuda_python(found: CudaDevices) -> dict[str, Any]:
    version = found.driver_version
    return {
        "bindings": found.bindings_version,
        "absent": found.absence,
        "driver_version": None if version is None else format_version(version),
        "devices": [asdict(device) for device in found.devices],
    }


def _backend(device: str) -> dict[str, Any]:
    """What ``auto`` is on ``device``, why, and what keeps tensors from it (None: nothing)."""
    choice = choose_backend("auto", device)
    problem = None
    try:
        tensor_device(device)
    except ConfigError as error:
        problem = str(error)
    return {
        "auto": choice.kind,
        "driver": choice.driver,
        "reason": choice.reason,
        "problem": problem,
    }


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
