"""How long the driver's calls take: alone and in runs, on an idle and a busy GPU, on two threads.

Through our driver (which the allocator uses; mapping a run is one map a page and one set-access)
and, for single calls, through cuda-python. A busy GPU has matrix products in flight on another
stream all the while; samples at whose end it had run dry are counted.

result: ``runs`` [{stream, num_threads, page_bytes, num_pages, create_us (one page), map_new_us (the
run, for the first time: with the clearing of new memory, if the driver does that), map_us (the run,
again), unmap_us (the run), destroy_us (one page), idle_samples, calls}]; ``threads`` [{stream,
num_threads, num_pages, pages_per_s, call_us}]; ``raw`` [{stream, call, num_pages, us or error}];
``launches`` {alone, beside_a_thread, while_mapping}: host microseconds of one small kernel launch
while another thread maps and unmaps.

Owns: the pages it makes, given back at once.
Thread-safety: the part on two threads uses two address ranges of one driver.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from .devices import RawDriver, make_driver, raw_driver
from .section import Section, run_section
from .timing import Load, percentiles, spread, timed

RUN_LENGTHS = (1, 2, 8, 32, 128, 512)
PAGE_MIB = (4, 8, 32)
THREAD_PAGES = 16
THREAD_SECONDS = 0.5
Keep = Callable[[], bool]


def main(section: Section) -> None:
    driver = make_driver(section)
    streams: dict[str, Keep] = {"idle": lambda: True}
    if section.dry_run:
        section.skip("busy stream, launches", "no GPU")
    else:
        torch.zeros(1, device="cuda")
        load = Load()
        streams["busy"] = lambda: _keep_busy(load)
    lengths = RUN_LENGTHS if not section.dry_run else RUN_LENGTHS[:3]
    for stream, keep in streams.items():
        if stream == "idle" and not section.dry_run:
            torch.cuda.synchronize()
        for num_pages in lengths:
            if section.has_time_for(f"runs of {num_pages}, {stream} stream", 2):
                section.add("runs", time_runs(section, driver, stream, keep, num_pages))
        for num_threads in (1, 2):
            if section.has_time_for(f"{num_threads} threads, {stream} stream", 3):
                section.add("threads", time_threads(section, driver, stream, keep, num_threads))
        raw = raw_driver(section)
        if raw is not None and section.has_time_for(f"bare calls, {stream} stream", 5):
            time_raw(section, raw, stream, keep, driver.page_bytes)
    if not section.dry_run:
        section.put("launches", time_launches(driver))
    for mib in PAGE_MIB if not section.dry_run else PAGE_MIB[:1]:
        if section.has_time_for(f"pages of {mib} MiB", 2):
            larger = make_driver(section, mib << 20)
            section.add("runs", time_runs(section, larger, "idle", streams["idle"], 8))


def time_runs(
    section: Section, driver: Any, stream: str, keep: Keep, num_pages: int
) -> dict[str, Any]:
    """Create pages, map them as one run twice, unmap the run, destroy them; repeatedly."""
    repeats = 2 if section.dry_run else max(4, min(150, 1024 // num_pages))
    num_bytes = num_pages * driver.page_bytes
    steps = ("create", "map_new", "map", "unmap", "destroy")
    times: dict[str, list[float]] = {name: [] for name in steps}
    address = driver.try_reserve(num_bytes)
    before, idle = driver.calls(), 0
    for _ in range(repeats):
        keep()
        pages = [timed(times["create"], driver.try_create_page, i) for i in range(num_pages)]
        for name in ("map_new", "map"):
            idle += not keep()
            timed(times[name], driver.try_map, address, pages)
            driver.wait_enqueued()  # new memory is being cleared, and must not be unmapped yet
            idle += not keep()
            timed(times["unmap"], driver.unmap, address, num_pages)
        idle += not keep()
        for page in pages:
            timed(times["destroy"], driver.destroy_page, page)
    driver.release(address, num_bytes)
    calls = {name: count - before.get(name, 0) for name, count in driver.calls().items()}
    return {
        "stream": stream,
        "num_threads": 1,
        "page_bytes": driver.page_bytes,
        "num_pages": num_pages,
        "repeats": repeats,
        **{f"{name}_us": spread(values) for name, values in times.items()},
        "idle_samples": idle,
        "calls": {name: count for name, count in calls.items() if count},
    }


def time_threads(
    section: Section, driver: Any, stream: str, keep: Keep, num_threads: int
) -> dict[str, Any]:
    """Pages mapped and unmapped a second by threads that share nothing but the driver."""
    seconds = 0.05 if section.dry_run else THREAD_SECONDS
    counts = [0] * num_threads
    waits: list[list[float]] = [[] for _ in range(num_threads)]
    errors: list[BaseException] = []
    barrier = threading.Barrier(num_threads)

    def work(idx: int) -> None:
        try:
            num_bytes = THREAD_PAGES * driver.page_bytes
            address = driver.try_reserve(num_bytes)
            pages = _cleared_pages(driver, address)
            barrier.wait()
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                timed(waits[idx], driver.try_map, address, pages)
                timed(waits[idx], driver.unmap, address, THREAD_PAGES)
                counts[idx] += 1
            for page in pages:
                driver.destroy_page(page)
            driver.release(address, num_bytes)
        except BaseException as error:
            barrier.abort()
            errors.append(error)

    threads = [threading.Thread(target=work, args=(idx,)) for idx in range(num_threads)]
    keep()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        keep()
        time.sleep(0.005)
    if errors:
        raise errors[0]
    return {
        "stream": stream,
        "num_threads": num_threads,
        "num_pages": THREAD_PAGES,
        "pages_per_s": round(sum(counts) * THREAD_PAGES / seconds),
        "call_us": percentiles([value for one in waits for value in one]),
    }


def time_raw(section: Section, raw: RawDriver, stream: str, keep: Keep, page_bytes: int) -> None:
    """The driver's own calls by cuda-python: singles, then one call over a run of pages."""
    repeats = 3 if section.dry_run else 60
    times: dict[str, list[float]] = {}

    def call(name: str, *arguments: Any) -> Any:
        keep()
        return timed(times.setdefault(name, []), raw.call, name, *arguments)

    prop, access = raw.allocation_property(), [raw.access()]
    for _ in range(repeats):
        call("cuDriverGetVersion")  # does nothing: what a call through Python costs
        address = int(call("cuMemAddressReserve", page_bytes, 0, 0, 0))
        handle = call("cuMemCreate", page_bytes, prop, 0)
        call("cuMemMap", address, page_bytes, 0, handle, 0)
        call("cuMemSetAccess", address, page_bytes, access, 1)
        call("cuMemUnmap", address, page_bytes)
        call("cuMemRelease", handle)
        call("cuMemAddressFree", address, page_bytes)
    for name, values in times.items():
        section.add("raw", {"stream": stream, "call": name, "num_pages": 1, "us": spread(values)})
    for num_pages in RUN_LENGTHS[1:] if not section.dry_run else RUN_LENGTHS[1:3]:
        time_raw_run(section, raw, stream, keep, page_bytes, num_pages)


def time_raw_run(
    section: Section, raw: RawDriver, stream: str, keep: Keep, page_bytes: int, num_pages: int
) -> None:
    """One set-access and one unmap over several handles, or the code that refuses it."""
    num_bytes = num_pages * page_bytes
    prop, access = raw.allocation_property(), [raw.access()]
    handles = [raw.call("cuMemCreate", page_bytes, prop, 0) for _ in range(num_pages)]
    address = int(raw.call("cuMemAddressReserve", num_bytes, 0, 0, 0))
    steps = {
        "cuMemSetAccess": lambda: raw.call("cuMemSetAccess", address, num_bytes, access, 1),
        "cuMemUnmap": lambda: raw.call("cuMemUnmap", address, num_bytes),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    errors: dict[str, str] = {}
    for _ in range(2 if section.dry_run else 12):
        for i, handle in enumerate(handles):
            raw.call("cuMemMap", address + i * page_bytes, page_bytes, 0, handle, 0)
        for name, step in steps.items():
            keep()
            try:
                timed(times[name], step)
            except RuntimeError as error:
                errors[name] = str(error)
        if "cuMemUnmap" in errors:
            for i in range(num_pages):
                raw.call("cuMemUnmap", address + i * page_bytes, page_bytes)
    for handle in handles:
        raw.call("cuMemRelease", handle)
    raw.call("cuMemAddressFree", address, num_bytes)
    for name, values in times.items():
        row: dict[str, Any] = {"stream": stream, "call": name, "num_pages": num_pages}
        row |= {"us": spread(values)} if values else {"error": errors[name]}
        section.add("raw", row)


def time_launches(driver: Any) -> dict[str, Any]:
    """Whether mapping on one thread holds up kernel launches on another.

    A thread that only hands the interpreter lock to and fro is the yardstick.
    """
    small = torch.zeros(1024, device="cuda")
    is_done = threading.Event()
    num_bytes = THREAD_PAGES * driver.page_bytes
    address = driver.try_reserve(num_bytes)
    pages = _cleared_pages(driver, address)

    def launch() -> list[float]:
        times: list[float] = []
        for _ in range(2000):
            timed(times, small.add_, 1)
            if len(times) % 100 == 0:
                torch.cuda.synchronize()
        return times

    def beside(work: Callable[[], Any]) -> list[float]:
        is_done.clear()
        thread = threading.Thread(target=lambda: [work() for _ in iter(is_done.is_set, True)])
        thread.start()
        try:
            return launch()
        finally:
            is_done.set()
            thread.join()

    def remap() -> None:
        driver.try_map(address, pages)
        driver.unmap(address, THREAD_PAGES)

    launch()
    found = {
        "alone": percentiles(launch()),
        "beside_a_thread": percentiles(beside(lambda: time.sleep(0))),
        "while_mapping": percentiles(beside(remap)),
    }
    for page in pages:
        driver.destroy_page(page)
    driver.release(address, num_bytes)
    return found


def _cleared_pages(driver: Any, address: int) -> list[int]:
    """``THREAD_PAGES`` pages that were mapped before: only the first time are they cleared, and
    until that is done they must not be unmapped."""
    pages = [driver.try_create_page(i) for i in range(THREAD_PAGES)]
    driver.try_map(address, pages)
    driver.wait_enqueued()
    driver.unmap(address, THREAD_PAGES)
    return pages


def _keep_busy(load: Load) -> bool:
    """Top up; whether there had been work left."""
    was_busy = load.is_busy()
    load.keep()
    return was_busy


if __name__ == "__main__":
    run_section("driver_calls", main)
