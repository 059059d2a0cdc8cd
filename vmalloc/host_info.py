"""What this machine offers: drivers, kernels, the backend that ``auto`` picks, and limits.

Owns: nothing.  Thread-safety: reads the system only.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from . import __version__, _core
from .config import DEFAULT_PAGE_BYTES
from .factory import choose_backend
from .kernels import cpu
from .memory_table import format_bytes

_MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


def host_info() -> dict[str, Any]:
    """Facts as plain JSON values; sizes in bytes."""
    driver = _core.make_host_driver(DEFAULT_PAGE_BYTES)
    free_bytes, total_bytes = driver.memory_info()
    choice = choose_backend("auto")
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "drivers": [
            {
                "name": driver.name,
                "granularity_bytes": driver.granularity,
                "default_page_bytes": driver.page_bytes,
                "free_bytes": free_bytes,
                "total_bytes": total_bytes,
            }
        ],
        "drivers_absent": {"cuda": "not in this version"},
        "kv_backend": {"auto": choice.kind, "driver": choice.driver, "reason": choice.reason},
        "attention_kernels": [
            {
                "name": "vmalloc CPU attention",
                "isa": _core.attention_isa(),
                "dtypes": sorted(
                    str(dtype).removeprefix("torch.") for dtype in cpu.SUPPORTED_DTYPES
                ),
                "max_head_dim": cpu.MAX_HEAD_DIM,
                "lookahead_rows": cpu.LOOKAHEAD_ROWS,
            }
        ],
        "limits": {
            "cpu_cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "max_map_count": _read_int(_MAX_MAP_COUNT),
            "overcommit_memory": _read_int(_OVERCOMMIT),
        },
    }


def host_report(facts: dict[str, Any]) -> Table:
    """The facts as a table for people."""
    table = Table(title=f"vmalloc {facts['version']}", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("Python, torch", f"{facts['python']}, {facts['torch']}")
    for driver in facts["drivers"]:
        table.add_row(
            f"Driver {driver['name']}",
            f"granularity {format_bytes(driver['granularity_bytes'])}, "
            f"default page {format_bytes(driver['default_page_bytes'])}, "
            f"{format_bytes(driver['free_bytes'])} free of {format_bytes(driver['total_bytes'])}",
        )
    for name, reason in facts["drivers_absent"].items():
        table.add_row(f"Driver {name}", f"absent: {reason}")
    backend = facts["kv_backend"]
    table.add_row(
        "KV backend", f"auto is {backend['auto']} on {backend['driver']}: {backend['reason']}"
    )
    for kernel in facts["attention_kernels"]:
        table.add_row(
            "Attention kernel",
            f"{kernel['name']} ({kernel['isa']}), {', '.join(kernel['dtypes'])}, head_dim up to "
            f"{kernel['max_head_dim']}, reads {kernel['lookahead_rows']} rows past the end",
        )
    limits = facts["limits"]
    table.add_row("CPU", f"{limits['cpu_cores']} cores, torch uses {limits['torch_threads']}")
    table.add_row(
        "vm.max_map_count",
        f"{limits['max_map_count']}: mappings per process; vmalloc stays below 80% of what is left",
    )
    table.add_row(
        "vm.overcommit_memory", f"{limits['overcommit_memory']}: 2 would limit reservations"
    )
    return table


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
