"""What the machine is: versions, device, what the driver can do, and the ceilings to measure
against.

Clocks, power and modes are read, never set.

result: ``versions``; ``nvidia_smi`` {field: value}; ``device``: ``CudaDriver.info()``;
``control_plane``: ``vmalloc.cuda_devices.find_devices()``, the same facts by way of cuda-python;
``reserve_us`` {GiB reserved: microseconds, or why not}; ``info``: ``vmalloc info --json``;
``ceilings`` {copy_gb_per_s (read plus written), bf16_tflop_per_s, host_to_device_gb_per_s,
device_to_host_gb_per_s} as spreads.

Owns: nothing.  Thread-safety: none; one process.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch

from vmalloc import _core
from vmalloc.cuda_devices import find_devices

from .devices import make_driver
from .section import Section, run_section
from .timing import compare_us, measure_copy, spread, timed

SMI_FIELDS = (
    "name,driver_version,pci.bus_id,memory.total,memory.used,clocks.sm,clocks.mem,clocks.max.sm,"
    "clocks.max.mem,temperature.gpu,power.draw,power.limit,persistence_mode,mig.mode.current,"
    "compute_mode,clocks_event_reasons.active"
)
NEED_GPU = ("torch_device", "ceilings")
RESERVED_GIB = (1, 1024, 16384)


def main(section: Section) -> None:
    driver = make_driver(section)
    section.put("device", driver.info())
    parts: dict[str, Callable[[], Any]] = {
        "versions": versions,
        "nvidia_smi": nvidia_smi,
        "reserve_us": lambda: time_reservations(driver),
        "control_plane": lambda: asdict(find_devices()),
        "info": command_info,
        "torch_device": torch_device,
        "ceilings": measure_ceilings,
    }
    for name, measure in parts.items():
        if section.dry_run and name in NEED_GPU:
            section.skip(name, "no GPU")
            continue
        try:
            section.put(name, measure())
        except Exception as error:  # what one part cannot tell must not hide the others
            if section.dry_run:
                raise
            section.skip(name, f"{type(error).__name__}: {error}")


def versions() -> dict[str, str]:
    """Python, compilers and what is importable of the packages that matter."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["cuda_of_torch"] = str(torch.version.cuda)
    found |= {name: version(name) for name in ("triton", "transformers", "numpy")}
    for name in ("flash_attn", "flashinfer"):
        try:
            found[name] = str(getattr(__import__(name), "__version__", "unknown"))
        except Exception as error:  # a library built for another torch fails in its own ways
            found[name] = f"absent ({type(error).__name__})"
    for name in ("kvcached", "torch_memory_saver", "cuda.bindings", "cuda.core"):
        found[name] = "present" if _is_there(name) else "absent"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    found["nvcc"] = _output([nvcc, "--version"]).splitlines()[-1] if nvcc else "absent"
    return found


def nvidia_smi() -> dict[str, str]:
    """The card's state as it was found."""
    if shutil.which("nvidia-smi") is None:
        return {"absent": "no nvidia-smi"}
    query = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader", "--id=0"]
    values = [value.strip() for value in _output(query).split(",")]
    return dict(zip(SMI_FIELDS.split(","), values, strict=False))


def time_reservations(driver: Any) -> dict[str, Any]:
    """Address space costs nothing but a call; how long the call takes, by size."""
    times: dict[str, Any] = {}
    for gib in RESERVED_GIB:
        taken: list[float] = []
        try:
            address = timed(taken, driver.try_reserve, gib << 30)
        except Exception as error:
            times[str(gib)] = f"{type(error).__name__}: {error}"
            continue
        if address is None:
            times[str(gib)] = "out of address space"
            continue
        timed(taken, driver.release, address, gib << 30)
        times[str(gib)] = {"reserve": round(taken[0], 1), "release": round(taken[1], 1)}
    return times


def command_info() -> Any:
    """What ``vmalloc info --json`` says."""
    text = _output([sys.executable, "-c", "from vmalloc.cli import main; main()", "info", "--json"])
    return json.loads(text)


def torch_device() -> dict[str, Any]:
    """What torch reports of the device."""
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "free_bytes": free,
        "total_bytes": total,
        "attention_isa_of_host": _core.attention_isa(),
    }


def measure_ceilings() -> dict[str, Any]:
    """Copy bandwidth, matrix rate and the two ways over PCIe, on random data."""
    size = 8192
    left = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    right = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    pinned = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    on_device = torch.empty_like(pinned, device="cuda")
    times = compare_us(
        {
            "product": lambda: left @ right,
            "up": lambda: on_device.copy_(pinned, non_blocking=True),
            "down": lambda: pinned.copy_(on_device, non_blocking=True),
        },
        device="cuda",
        rounds=12,
    )
    flops = 2 * size**3
    return {
        "copy_gb_per_s": measure_copy("cuda"),
        "bf16_tflop_per_s": spread([flops / us / 1e6 for us in times["product"]], 1),
        "host_to_device_gb_per_s": spread([pinned.numel() / us / 1e3 for us in times["up"]], 2),
        "device_to_host_gb_per_s": spread([pinned.numel() / us / 1e3 for us in times["down"]], 2),
    }


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} gave {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout.strip()


if __name__ == "__main__":
    run_section("facts", main)
