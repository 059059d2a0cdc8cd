"""Other allocators on the same work: pages of 2 MiB under one range of addresses, taken and given
back.

``vmalloc`` is a core arena whose one slot grows by N pages at once; kvcached (0.1.6) maps N pages
of a KV tensor; torch-memory-saver (0.0.10) resumes and pauses N allocations of 2 MiB, its whole
purpose, made through its own allocator function. The last two are measured where ``.gpu/wheels``
holds them. Each runs in a process of its own.

result: ``rows`` [{allocator, num_pages, grow_us (new pages, usable afterwards), give_back_us (to
the system), grow_pooled_us and to_pool_us (vmalloc: pages that are kept), bytes_given_back}].

Not the same in all respects: kvcached puts a page of zeros under what is not mapped, so it unmaps
and maps on both ways; torch-memory-saver cannot grow by a part, only bring back all of a tag.
vmalloc's growth includes its transaction over slots and epochs.

Owns: its child processes.  Thread-safety: none; one process at a time.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from .prepare import ROOT
from .section import STAND_IN, Section, run_section
from .timing import spread, timed

PAGE_BYTES = 2 << 20
NUM_PAGES = (1, 8, 64, 512)
REPEATS = 12
MODULES = {"vmalloc": "vmalloc", "kvcached": "kvcached", "torch_memory_saver": "torch_memory_saver"}


def main(section: Section) -> None:
    for allocator in MODULES:
        if find_spec(MODULES[allocator]) is None:
            section.skip(allocator, "not installed; no wheel in .gpu/wheels")
        elif section.dry_run and allocator != "vmalloc":
            section.skip(allocator, "no GPU")
        elif section.has_time_for(allocator, 8):
            _run_child(section, allocator)
    if not section.result.get("rows"):
        raise RuntimeError("no allocator was measured")


def _run_child(section: Section, allocator: str) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu.peers", "--child", allocator]
    command += ["--dry-run"] if section.dry_run else []
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False,
            timeout=max(5.0, section.left_s()),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        section.skip(allocator, "took too long")
        return
    print(f"{allocator}: {done.stdout}{done.stderr[-3000:]}", flush=True)
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            section.add("rows", json.loads(line))
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["died without a word"]
        section.skip(f"rest of {allocator}", f"exit status {done.returncode}: {lines[-1][:200]}")
    else:
        section.set_driver(STAND_IN if section.dry_run else "cuda")


def measure_vmalloc(section: Section, num_pages: int, repeats: int) -> dict[str, Any]:
    """One slot of a core arena: grows new, is trimmed; grows over kept pages, gives them back."""
    from vmalloc import _core

    from .devices import make_driver

    driver = make_driver(section, PAGE_BYTES)
    row_bytes = 128 << 10
    rows = num_pages * PAGE_BYTES // row_bytes
    arena = _core.KVArena(
        driver,
        layers=[_core.LayerKVSpec(num_kv_heads=8, k_head_dim=128, v_head_dim=128, element_bytes=2)]
        * 32,
        layers_per_group=32,
        num_slots=2,
        max_rows=rows,
        max_pages=num_pages + 1,  # one is the arena's scratch page
    )
    times: dict[str, list[float]] = {"grow": [], "give_back": [], "grow_pooled": [], "to_pool": []}

    def grow() -> int:
        slots = arena.try_admit(1, rows)
        if slots is None:
            raise RuntimeError(f"no memory for {num_pages} pages")
        return int(slots[0])

    def shrink(slot: int, keep: int) -> None:
        epoch = arena.begin_step()
        arena.truncate(slot, 0)
        arena.free([slot])
        arena.end_step(epoch)
        arena.trim(keep)

    created = 0
    for _ in range(repeats):
        slot = timed(times["grow"], grow)
        timed(times["to_pool"], shrink, slot, num_pages + 1)
        slot = timed(times["grow_pooled"], grow)
        created = arena.stats()["created_pages"]
        timed(times["give_back"], shrink, slot, 0)
    left = arena.stats()["created_pages"]
    arena.close()
    return {f"{name}_us": spread(values) for name, values in times.items()} | {
        "bytes_given_back": (created - left) * PAGE_BYTES
    }


def measure_kvcached(section: Section, num_pages: int, repeats: int) -> dict[str, Any]:
    """Pages of one KV tensor of one layer, contiguous layout: a page is one 2 MiB mapping."""
    import torch
    from kvcached import vmm_ops

    torch.zeros(1, device="cuda")
    vmm_ops.init_kvcached("cuda:0", PAGE_BYTES, True)
    vmm_ops.create_kv_tensors(2 * num_pages * PAGE_BYTES, 2, "cuda:0", 1, 1)
    offsets = [idx * PAGE_BYTES for idx in range(num_pages)]
    row = _time_pair(
        lambda: vmm_ops.map_to_kv_tensors(offsets),
        lambda: vmm_ops.unmap_from_kv_tensors(offsets),
        repeats,
    )
    vmm_ops.shutdown_kvcached()
    return row


def measure_torch_memory_saver(section: Section, num_pages: int, repeats: int) -> dict[str, Any]:
    """Allocations of 2 MiB under a tag, paused and resumed together."""
    import torch
    from torch_memory_saver.binary_wrapper import BinaryWrapper
    from torch_memory_saver.hooks.mode_torch import HookUtilModeTorch

    torch.zeros(1, device="cuda")
    binary = BinaryWrapper(path_binary=HookUtilModeTorch().get_path_binary())
    library, tag = binary.cdll, f"pages{num_pages}"
    take, give = library.tms_torch_malloc, library.tms_torch_free
    take.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
    take.restype = ctypes.c_void_p
    give.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
    give.restype = None
    binary.set_config(tag=tag, interesting_region=True, enable_cpu_backup=False)
    stream = torch.cuda.current_stream().cuda_stream
    addresses = [take(PAGE_BYTES, 0, stream) for _ in range(num_pages)]
    library.tms_pause(tag.encode())
    row = _time_pair(
        lambda: library.tms_resume(tag.encode()), lambda: library.tms_pause(tag.encode()), repeats
    )
    library.tms_resume(tag.encode())
    for address in addresses:
        give(address, PAGE_BYTES, 0, stream)
    return row


def _time_pair(grow: Callable[[], Any], shrink: Callable[[], Any], repeats: int) -> dict[str, Any]:
    import torch

    times: dict[str, list[float]] = {"grow": [], "give_back": []}
    given_back = 0
    for _ in range(repeats):
        timed(times["grow"], grow)
        held, _ = torch.cuda.mem_get_info()
        timed(times["give_back"], shrink)
        free, _ = torch.cuda.mem_get_info()
        given_back = free - held
    return {f"{name}_us": spread(values) for name, values in times.items()} | {
        "bytes_given_back": given_back
    }


MEASURES: dict[str, Callable[[Section, int, int], dict[str, Any]]] = {
    "vmalloc": measure_vmalloc,
    "kvcached": measure_kvcached,
    "torch_memory_saver": measure_torch_memory_saver,
}


def child(allocator: str, section: Section) -> None:
    """Measure one allocator; a JSON line for each number of pages."""
    for num_pages in NUM_PAGES if not section.dry_run else NUM_PAGES[:2]:
        row = MEASURES[allocator](section, num_pages, REPEATS if not section.dry_run else 2)
        print(json.dumps({"allocator": allocator, "num_pages": num_pages, **row}), flush=True)


if __name__ == "__main__":
    if "--child" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--child")
        parser.add_argument("--dry-run", action="store_true")
        given = parser.parse_args()
        child(given.child, Section("peers", out=None, dry_run=given.dry_run))
    else:
        run_section("peers", main)
