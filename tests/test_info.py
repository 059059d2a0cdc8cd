"""``vmalloc info``: what is there, what is not and why, in JSON and for people.

What the loader finds as ``libcuda.so.1`` is settled when a process starts, so there is one process
with no driver, one over the stand-in in ``tests/fakecuda`` for all its modes, and one for a library
that the environment names.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fakecuda
from vmalloc import cuda_devices
from vmalloc.host_report import host_report

ROOT = Path(__file__).resolve().parent.parent
COMMAND = (sys.executable, "-m", "vmalloc.cli", "info")
needs_cuda_python = pytest.mark.skipif(
    importlib.util.find_spec("cuda") is None, reason="cuda-python is not installed"
)
BROKEN = {
    "devices=0": "sees no device",
    "vmm=0": "no virtual memory management",
    "cuInit:fail=1,count=99,err=999": "does not start: CUDA_ERROR_UNKNOWN",
    "cuDevicePrimaryCtxRetain:fail=1,count=99,err=46": "cuDevicePrimaryCtxRetain failed",
    "*:fail=4,count=999,err=999": "CUDA_ERROR_UNKNOWN",
}
MODES = ["", "devices=2", "cuMemGetInfo:fail=1,count=99,err=999", *BROKEN]
ALL_MODES = f"""
import json
from tests.fakecuda import FakeCuda
from vmalloc.host_info import host_info
fake = FakeCuda()
found = {{}}
for modes in {MODES!r}:
    fake.reset()
    fake.ctl(modes)
    found[modes] = host_info()
    assert fake.ctl("clear") is None and fake.library.fakecuda_leaks() == 0, modes
print(json.dumps(found))
"""


def run(*command, **environment):
    """What a process prints under these variables; it must succeed and say nothing else."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FAKECUDA_", "VMALLOC_", "LD_LIBRARY_PATH"))
    }
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**inherited, "COLUMNS": "400", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def as_text(found, width=400):
    """The table of the facts, as people see it."""
    from rich.console import Console

    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(host_report(found))
    return capture.get()


@pytest.fixture(scope="module")
def no_driver(tmp_path_factory):
    """A library path on which the first ``libcuda.so.1`` is no library: as good as none."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "libcuda.so.1").write_text("not a library")
    return {"LD_LIBRARY_PATH": str(folder)}


@pytest.fixture(scope="module")
def without(no_driver):
    """Facts without a driver."""
    return json.loads(run(*COMMAND, "--json", **no_driver))


@pytest.fixture(scope="module")
def over_stand_in():
    """Facts over the stand-in, found as the system's library would be; by its modes."""
    folder = str(Path(fakecuda.library_path()).parent)
    return json.loads(run(sys.executable, "-c", ALL_MODES, LD_LIBRARY_PATH=folder))


def test_the_host_and_its_kernels_are_always_there(without):
    (host,) = without["drivers"]
    assert (host["name"], host["device"]) == ("host", "cpu")
    assert 0 < host["free_bytes"] <= host["total_bytes"]
    choice = without["kv_backend"]["cpu"]
    assert (choice["auto"], choice["driver"], choice["problem"]) == ("virtual", "host", None)
    assert choice["reason"]
    kernel = without["attention_kernels"][0]
    assert kernel["isa"] in ("portable", "avx2", "avx512")
    assert kernel["absent"] is None
    assert without["limits"]["max_map_count"] > 0


def test_without_a_driver_there_is_a_reason_everywhere(without, no_driver):
    reason = without["drivers_absent"]["cuda:0"]
    assert reason.startswith("no CUDA driver: ")
    choice = without["kv_backend"]["cuda"]
    assert (choice["auto"], choice["driver"]) == ("paged", "torch")
    assert reason in choice["reason"]
    assert without["cuda_python"]["devices"] == []
    assert without["cuda_python"]["absent"]
    text = run(*COMMAND, **no_driver)
    assert "granularity 4.0 KiB" in text
    assert f"absent: {reason}" in text


@needs_cuda_python
def test_without_a_driver_cuda_python_says_so_and_knows_its_version(without):
    found = without["cuda_python"]
    assert found["bindings"] == cuda_devices.bindings_version()
    assert found["absent"].startswith("no CUDA driver: ")
    assert found["driver_version"] is None


@needs_cuda_python
def test_a_driver_is_described_by_the_core_and_by_cuda_python_alike(over_stand_in):
    found = over_stand_in[""]
    _, driver = found["drivers"]
    (device,) = found["cuda_python"]["devices"]
    assert found["drivers_absent"] == {}
    assert (driver["name"], driver["device"]) == ("cuda", "cuda:0")
    assert driver["granularity_bytes"] == driver["default_page_bytes"] == 64 << 10
    assert driver["total_bytes"] == 256 << 20
    assert (driver["unmap_runs"], driver["access_runs"]) == (True, True)
    assert driver["device_name"] == device["name"]
    assert device["has_virtual_memory"]
    for name in (
        *("compute_capability", "total_bytes", "free_bytes"),
        *("granularity_bytes", "recommended_granularity_bytes"),
    ):
        assert driver[name] == device[name], name
    assert found["cuda_python"]["driver_version"] == driver["driver_version"] == "13.0"
    choice = found["kv_backend"]["cuda"]
    assert (choice["auto"], choice["driver"]) == ("virtual", "cuda")


@needs_cuda_python
def test_a_device_is_a_line_for_people(over_stand_in):
    lines = as_text(over_stand_in[""]).splitlines()
    line = next(line for line in lines if "GPU 0" in line)
    assert "compute capability 9.0, 256.0 MiB free of 256.0 MiB, virtual memory in pages of" in line
    line = next(line for line in lines if "Driver cuda:0" in line)
    assert "CUDA 13.0 from libcuda.so.1; one call for a run of pages" in line


def test_the_core_finds_the_library_that_the_environment_names(no_driver):
    path = fakecuda.library_path()
    found = json.loads(run(*COMMAND, "--json", **no_driver, VMALLOC_LIBCUDA=path))
    assert found["drivers"][1]["library"] == path
    assert found["kv_backend"]["cuda"]["auto"] == "virtual"
    assert found["cuda_python"]["devices"] == []  # which looks where the loader does


@needs_cuda_python
def test_every_device_is_listed(over_stand_in):
    found = over_stand_in["devices=2"]
    assert [driver["device"] for driver in found["drivers"]] == ["cpu", "cuda:0", "cuda:1"]
    assert [device["index"] for device in found["cuda_python"]["devices"]] == [0, 1]


@pytest.mark.parametrize("modes", BROKEN)
def test_a_driver_that_does_not_do_is_a_reason_and_no_crash(over_stand_in, modes):
    found = over_stand_in[modes]
    assert [driver["name"] for driver in found["drivers"]] == ["host"]
    assert BROKEN[modes] in found["drivers_absent"]["cuda:0"]
    assert found["kv_backend"]["cuda"]["auto"] == "paged"
    assert BROKEN[modes] in as_text(found)


@needs_cuda_python
def test_what_a_device_does_not_tell_is_left_out(over_stand_in):
    (device,) = over_stand_in["cuMemGetInfo:fail=1,count=99,err=999"]["cuda_python"]["devices"]
    assert device["free_bytes"] is None
    assert device["problem"] == "cuMemGetInfo failed with CUDA_ERROR_UNKNOWN (999)"
    assert device["total_bytes"] == 256 << 20


def test_cuda_kernels_name_their_reach_or_their_absence(without):
    kernels = without["attention_kernels"][1:]
    cuda = {(kernel["layout"], kernel["name"]): kernel for kernel in kernels}
    assert {"torch", "triton", "sdpa"} <= {name for layout, name in cuda if layout == "slots"}
    assert cuda["slots", "fa3-tma"]["lookahead_rows"] == 255
    assert cuda["slots", "torch"]["lookahead_rows"] == 0
    assert cuda["slots", "sdpa"]["absent"] is None
    has_triton = importlib.util.find_spec("triton") is not None
    assert (cuda["blocks", "triton"]["absent"] is None) == has_triton
    assert "sdpa, reads 0 rows past the end" in as_text(without)


def test_error_names_need_no_driver():
    if importlib.util.find_spec("cuda") is not None:
        assert cuda_devices.error_name(2) == "CUDA_ERROR_OUT_OF_MEMORY"
    assert cuda_devices.error_name(12345) == "CUDA error 12345"
    assert cuda_devices.format_version(13020) == "13.2"
