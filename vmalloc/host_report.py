"""The facts of ``vmalloc info`` as a table for people.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from .memory_table import format_bytes


def host_report(facts: dict[str, Any]) -> Table:
    """``host_info()`` as a table: what it is about, and what there is to say."""
    table = Table(title=f"vmalloc {facts['version']}", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("Python, torch", f"{facts['python']}, {facts['torch']}")
    for rows in (_drivers, _cuda_python, _backends, _kernels, _limits):
        for name, text in rows(facts):
            table.add_row(name, text)
    return table


def _drivers(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for driver in facts["drivers"]:
        text = (
            f"granularity {format_bytes(driver['granularity_bytes'])}, "
            f"default page {format_bytes(driver['default_page_bytes'])}, "
            f"{format_bytes(driver['free_bytes'])} free of {format_bytes(driver['total_bytes'])}"
        )
        if driver["name"] == "host":
            yield "Driver host", text
            continue
        calls = "one call" if driver["access_runs"] and driver["unmap_runs"] else "a call per page"
        yield (
            f"Driver {driver['device']}",
            f"{driver['device_name']}, compute capability {driver['compute_capability']}; {text}; "
            f"CUDA {driver['driver_version']} from {driver['library']}; {calls} for a run of pages",
        )
    for name, reason in facts["drivers_absent"].items():
        yield f"Driver {name}", f"absent: {reason}"


def _cuda_python(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    cuda = facts["cuda_python"]
    bindings = "" if cuda["bindings"] is None else f"cuda-bindings {cuda['bindings']}, "
    if cuda["absent"] is not None:
        yield "cuda-python", f"{bindings}absent: {cuda['absent']}"
        return
    yield "cuda-python", f"{bindings}driver for CUDA {cuda['driver_version']}"
    for device in cuda["devices"]:
        yield f"GPU {device['index']}", _describe_gpu(device)


def _describe_gpu(device: dict[str, Any]) -> str:
    parts = [f"{device['name']}, compute capability {device['compute_capability']}"]
    if device["free_bytes"] is not None:
        parts.append(f"{format_bytes(device['free_bytes'])} free of")
    parts[-1] += ("," if len(parts) == 1 else "") + f" {format_bytes(device['total_bytes'])}"
    if not device["has_virtual_memory"]:
        parts.append("no virtual memory management")
    elif device["granularity_bytes"] is not None:
        parts.append(
            f"virtual memory in pages of {format_bytes(device['granularity_bytes'])} (recommended "
            f"{format_bytes(device['recommended_granularity_bytes'])})"
        )
    if device["problem"]:
        parts.append(device["problem"])
    return ", ".join(parts)


def _backends(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for device, backend in facts["kv_backend"].items():
        text = f"auto is {backend['auto']} on {backend['driver']}: {backend['reason']}"
        if backend["problem"] is not None:
            text += f". Not usable here: {backend['problem']}"
        yield f"KV backend, {device}", text


def _kernels(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    places: dict[str, list[dict[str, Any]]] = {}
    for kernel in facts["attention_kernels"]:
        places.setdefault(f"{kernel['device']}, {kernel['layout']}", []).append(kernel)
    for place, kernels in places.items():
        yield f"Kernels, {place}", "\n".join(_describe_kernel(kernel) for kernel in kernels)


def _describe_kernel(kernel: dict[str, Any]) -> str:
    if kernel["absent"] is not None:
        return f"{kernel['name']}: absent, {kernel['absent']}"
    parts = [kernel["name"]]
    if "isa" in kernel:
        parts[0] += f" ({kernel['isa']})"
        parts += [*kernel["dtypes"], f"head_dim up to {kernel['max_head_dim']}"]
    return f"{', '.join(parts)}, reads {kernel['lookahead_rows']} rows past the end"


def _limits(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    limits = facts["limits"]
    yield "CPU", f"{limits['cpu_cores']} cores, torch uses {limits['torch_threads']}"
    yield (
        "vm.max_map_count",
        f"{limits['max_map_count']}: mappings per process; vmalloc stays below 80% of what is left",
    )
    yield "vm.overcommit_memory", f"{limits['overcommit_memory']}: 2 would limit reservations"
