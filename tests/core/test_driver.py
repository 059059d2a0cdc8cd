"""One conformance suite over every driver, and what only the host driver promises."""

import ctypes
import itertools
import os
import subprocess
import sys

import pytest

from tests import drivers
from vmalloc import ConfigError, DriverError, _core

PAGE = 16 * 1024

DRIVERS = {
    "cuda": lambda page: drivers.make_driver(page),
    "host": lambda page: _core.make_host_driver(page),
    "null": lambda page: _core.make_null_driver(page),
    "fault(host)": lambda page: _core.FaultDriver(_core.make_host_driver(page)),
}


@pytest.fixture(params=DRIVERS)
def driver(request):
    with drivers.driver_kind("cuda"):
        yield DRIVERS[request.param](PAGE)


@pytest.fixture
def host():
    return _core.make_host_driver(PAGE)


def read(address, count=8):
    return ctypes.string_at(address, count)


class TestConformance:
    def test_page_is_a_multiple_of_the_granularity(self, driver):
        assert driver.page_bytes == PAGE
        assert driver.page_bytes % driver.granularity == 0

    @pytest.mark.parametrize("page_bytes", [0, 1, 4095, 4097, 6912])
    @pytest.mark.parametrize("name", ["host", "null"])
    def test_bad_page_size_names_the_value_and_the_granularity(self, name, page_bytes):
        with pytest.raises(ConfigError, match=rf"{page_bytes}.*granularity, 4096"):
            DRIVERS[name](page_bytes)

    def test_reservations_are_page_aligned_and_apart(self, driver):
        ranges = [driver.try_reserve(5 * PAGE) for _ in range(4)]
        assert all(address % PAGE == 0 for address in ranges)
        ordered = sorted(ranges)
        assert all(b - a >= 5 * PAGE for a, b in itertools.pairwise(ordered))
        for address in ranges:
            driver.release(address, 5 * PAGE)

    def test_map_and_unmap_by_runs_and_by_parts(self, driver):
        base = driver.try_reserve(8 * PAGE)
        pages = [driver.try_create_page(i) for i in range(4)]
        assert driver.try_map(base, pages, is_writable=True)
        assert driver.try_map(base + 5 * PAGE, pages[:2], is_writable=True)  # aliases
        driver.unmap(base + PAGE, 2)
        assert driver.try_map(base + PAGE, [pages[2]])
        driver.unmap(base, 2)
        driver.unmap(base + 3 * PAGE, 1)
        driver.unmap(base + 5 * PAGE, 2)
        for page in pages:
            driver.destroy_page(page)
        driver.release(base, 8 * PAGE)
        counters = driver.counters()
        assert counters["create_calls"] == counters["destroy_calls"] == 4

    def test_a_fence_without_pending_work_has_passed(self, driver):
        assert driver.fence_passed(driver.try_record_fence())

    def test_memory_info_is_plausible(self, driver):
        free, total = driver.memory_info()
        assert 0 < free <= total


class TestHostMemory:
    def test_uncommitted_rows_read_zero(self, host):
        base = host.try_reserve(1 << 40)  # a TiB of addresses costs nothing
        assert read(base) == bytes(8)
        assert read(base + (1 << 39), 64) == bytes(64)
        host.release(base, 1 << 40)

    def test_one_page_at_two_addresses_is_one_memory(self, host):
        base = host.try_reserve(4 * PAGE)
        page = host.try_create_page(0)
        assert host.try_map(base, [page])
        assert host.try_map(base + 2 * PAGE, [page], is_writable=False)
        ctypes.memmove(base + 100, b"sequence", 8)
        assert read(base + 2 * PAGE + 100) == b"sequence"

    def test_contents_survive_unmapping_and_mapping_elsewhere(self, host):
        base = host.try_reserve(4 * PAGE)
        page = host.try_create_page(3)
        assert host.try_map(base, [page])
        ctypes.memmove(base, b"kept", 4)
        host.unmap(base, 1)
        assert read(base, 4) == bytes(4)
        assert host.try_map(base + PAGE, [page])
        assert read(base + PAGE, 4) == b"kept"

    def test_zero_clears(self, host):
        base = host.try_reserve(PAGE)
        assert host.try_map(base, [host.try_create_page(0)])
        ctypes.memset(base, 0xFF, PAGE)
        assert host.try_zero(base, PAGE)
        assert read(base, PAGE) == bytes(PAGE)

    def test_destroyed_page_gives_its_memory_back_and_comes_back_as_zeros(self, host):
        base = host.try_reserve(PAGE)
        page = host.try_create_page(0)
        assert host.try_map(base, [page])
        ctypes.memset(base, 0xFF, PAGE)
        host.unmap(base, 1)
        host.destroy_page(page)
        assert host.try_map(base, [host.try_create_page(0)])
        assert read(base, PAGE) == bytes(PAGE)

    def test_physical_memory_is_taken_at_create_and_given_back_at_destroy(self):
        page_bytes = 1 << 20
        before = set(_memfds())
        driver = _core.make_host_driver(page_bytes)
        ((_, fd),) = set(_memfds()) - before

        def blocks():
            return os.stat(fd).st_blocks * 512

        pages = [driver.try_create_page(i) for i in range(16)]
        assert blocks() == 16 * page_bytes
        for page in pages:
            driver.destroy_page(page)
        assert blocks() == 0

    @pytest.mark.parametrize(
        ("name", "address", "is_writable"),
        [("a row that is not backed", "base + PAGE", True), ("a read-only page", "base", False)],
    )
    def test_writing_faults(self, name, address, is_writable):
        script = f"""
import ctypes
import itertools
from vmalloc import _core
PAGE = {PAGE}
driver = _core.make_host_driver(PAGE)
base = driver.try_reserve(2 * PAGE)
assert driver.try_map(base, [driver.try_create_page(0)], is_writable={is_writable})
print("mapped", flush=True)
ctypes.memset({address}, 1, 1)
print("survived")
"""
        result = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        assert result.stdout == "mapped\n", name
        assert result.returncode == -11

    def test_mapping_budget_is_refused_as_a_value_before_the_kernel_limit(self):
        driver = _core.make_host_driver(4096)
        with open("/proc/sys/vm/max_map_count") as file:
            limit = int(file.read())
        if limit > 200_000:
            pytest.skip(f"vm.max_map_count is {limit}: reaching it would take too long")
        page = driver.try_create_page(0)
        base = driver.try_reserve(2 * limit * 4096)
        num_mapped = 0
        while driver.try_map(base + 2 * num_mapped * 4096, [page]):  # every other page
            num_mapped += 1
        assert 0.3 * limit < num_mapped < 0.45 * limit  # two kernel mappings each, 80% of the rest
        assert len(bytearray(64 << 20)) == 64 << 20  # malloc still works
        for i in range(num_mapped):
            driver.unmap(base + 2 * i * 4096, 1)
        assert driver.try_map(base, [page])

    def test_neighbouring_pages_cost_one_kernel_mapping(self):
        driver = _core.make_host_driver(4096)
        base = driver.try_reserve(1 << 30)
        before = _num_mappings()
        pages = [driver.try_create_page(i) for i in range(1000)]
        for i, page in enumerate(pages):
            assert driver.try_map(base + i * 4096, [page])
        assert _num_mappings() - before <= 4

    def test_releasing_what_is_not_reserved_raises_a_named_error(self, host):
        with pytest.raises(DriverError) as caught:
            host.release(1, PAGE)  # not even aligned
        assert caught.value.call == "munmap"
        assert caught.value.name == "EINVAL"
        assert caught.value.code == 22


def _memfds():
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if "memfd:vmalloc" in target:
            yield int(name), f"/proc/self/fd/{name}"


def _num_mappings():
    with open("/proc/self/maps") as file:
        return sum(1 for _ in file)
