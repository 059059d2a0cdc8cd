"""server -> engine -> vmalloc -> _core: nothing points backwards; hardware has one door."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RANK = {"vmalloc": 1, "vmalloc.engine": 2, "vmalloc.server": 3}
EXEMPT = {"vmalloc/cli.py"}  # the command line imports engine and server, lazily

# Word -> the only files that may hold it.
ROOMS = {
    r"\b(mmap|munmap|memfd_create|madvise)\s*\(": {
        "csrc/host_driver.cpp",
        "vmalloc/block_storage.py",
    },
    r"#include <pybind11": {
        "csrc/bindings.cpp",
        "csrc/bindings_attention.cpp",
        "csrc/bindings_attention.h",
        "csrc/bindings_decoder.cpp",
        "csrc/bindings_decoder.h",
        "csrc/bindings_draw.cpp",
        "csrc/bindings_draw.h",
        "csrc/bindings_linear.cpp",
        "csrc/bindings_linear.h",
    },
    r"\bcu(Mem|Ctx|Device|Event|Stream|Get|Init)[A-Z]?\w*\s*\(": {
        "csrc/cuda_device.cpp",
        "csrc/cuda_driver.cpp",
        "csrc/cuda_host_buffers.cpp",
        "csrc/cuda_library.cpp",
        "csrc/cuda_stream.cpp",
        "csrc/cuda_window.cpp",
    },
    r"#include <torch|ATen/": set(),
    r"\b(abort|_exit|exit)\s*\(": set(),
    r"\bdetach\s*\(": set(),
}
CORE_IMPORTERS = {
    "vmalloc/core_setup.py",
    "vmalloc/elastic.py",
    "vmalloc/kv_cache.py",
    "vmalloc/page_supply.py",
    "vmalloc/scratch_slot.py",
    "vmalloc/slot_prefixes.py",
    "vmalloc/slot_views.py",
    "vmalloc/swapped_groups.py",
    "vmalloc/virtual_sleep.py",
    "vmalloc/virtual_stats.py",
    "vmalloc/host_info.py",
    "vmalloc/kernel_info.py",
    "vmalloc/kernels/cpu.py",
    "vmalloc/kernels/decoder_cpu.py",
    "vmalloc/kernels/draw_cpu.py",
}


def package_of(path):
    """``engine/x.py`` -> ``vmalloc.engine``."""
    top = path.relative_to(ROOT).parts[0]
    return "vmalloc" if top == "vmalloc" else f"vmalloc.{top}"


def python_files():
    files = [p for top in ("vmalloc", "engine", "server") for p in (ROOT / top).rglob("*.py")]
    return [p for p in files if not {"engine", "server"} & set(p.relative_to(ROOT).parts[1:])]


def imported_modules(path):
    """Absolute names of what a file imports, relative imports resolved."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    dotted = ["vmalloc", *parts] if parts[0] != "vmalloc" else parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = dotted[: len(dotted) - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def layer_of(module):
    for name in ("vmalloc.server", "vmalloc.engine", "vmalloc"):
        if module == name or module.startswith(name + "."):
            return name
    return None


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    relative = str(path.relative_to(ROOT))
    if relative in EXEMPT:
        return
    own = RANK[package_of(path)]
    for module in imported_modules(path):
        layer = layer_of(module)
        if layer is not None:
            assert RANK[layer] <= own, f"{relative} imports {module}"
        if module.startswith("vmalloc._core"):
            assert relative in CORE_IMPORTERS, f"{relative} imports the core"


def test_the_rule_is_checked_on_real_imports():
    modules = set(imported_modules(ROOT / "engine" / "llm_engine.py"))
    assert "vmalloc.backend" in modules
    assert "vmalloc.engine.scheduler" in modules
    assert "vmalloc.engine" in set(imported_modules(ROOT / "vmalloc" / "cli.py"))


@pytest.mark.parametrize("pattern", ROOMS)
def test_hardware_is_named_in_its_room_only(pattern):
    sources = [p for ext in ("*.h", "*.cpp", "*.inl") for p in (ROOT / "csrc").glob(ext)]
    for path in sources:
        code = re.sub(r"//.*", "", path.read_text())
        if re.search(pattern, code):
            assert str(path.relative_to(ROOT)) in ROOMS[pattern], f"{path.name} has {pattern}"


@pytest.mark.parametrize("name", ["engine", "server"])
def test_no_top_level_package_is_importable(name):
    result = subprocess.run(
        [sys.executable, "-c", f"import {name}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert f"vmalloc.{name}" in result.stderr


def test_help_loads_no_torch():
    script = "import sys, vmalloc.cli; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "name",
    [
        *("scheduler", "schedule", "admission", "preemption", "preemption_cost"),
        *("group_memory", "sequence_group", "sequence"),
    ],
)
def test_scheduling_imports_no_torch(name):
    modules = set(imported_modules(ROOT / "engine" / f"{name}.py"))
    assert not any(module.split(".")[0] == "torch" for module in modules)
