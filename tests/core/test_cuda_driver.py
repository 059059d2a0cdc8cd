"""The CUDA driver over the stand-in: calls counted, work left pending, errors and endings."""

import ctypes
import os
import subprocess
import sys
import threading

import pytest

from tests import fakecuda
from tests.arenas import admit, extend, free, make_arena
from vmalloc import ClosedError, ConfigError, DriverError, InvariantError, _core

PAGE = 4096
MODES = ["unmap_runs", "access_runs", "read_only"]


@pytest.fixture
def fake():
    fake = fakecuda.FakeCuda()
    fake.reset()
    fake.start()  # launches need a context that is current in this thread
    yield fake
    fake.reset()


@pytest.fixture
def driver(fake):
    return make_driver()


def make_driver(**settings):
    return _core.make_cuda_driver(PAGE, library=fakecuda.library_path(), **settings)


def read(driver, address, num_bytes=PAGE):
    """What the device has there once it is done: over the stand-in the CPU can look."""
    driver.wait_enqueued()
    return ctypes.string_at(address, num_bytes)


def new_pages(driver, count):
    return [driver.try_create_page(i) for i in range(count)]


class TestBatching:
    def test_a_run_of_a_thousand_pages_is_one_set_access_and_one_unmap(self, fake, driver):
        arena = make_arena(driver, max_rows=8192, max_pages=1001)
        before = fake.all_calls()
        slot = admit(arena, 8000)
        after = fake.all_calls()
        assert arena.stats()["committed_pages"] == 1000
        assert after["cuMemMap"] - before.get("cuMemMap", 0) == 1000
        assert after["cuMemSetAccess"] - before["cuMemSetAccess"] == 1
        assert after["cuMemsetD8Async"] == 1
        free(arena, slot)
        unmaps = fake.calls("cuMemUnmap")
        assert arena.trim(0) == 1000
        assert fake.calls("cuMemUnmap") - unmaps == 1

    def test_a_decode_step_that_crosses_no_page_makes_no_driver_call(self, fake, driver):
        arena = make_arena(driver, ahead_rows=8)
        slots = [admit(arena, 8), admit(arena, 3)]
        arena.wait_worker()
        fake.ctl("query_runs=1")
        arena.end_step(arena.begin_step())  # the fence of what was enqueued
        before = fake.all_calls()
        for num_rows in range(4, 8):
            assert arena.try_extend(slots[1:], [num_rows])
            epoch = arena.begin_step()
            arena.end_step(epoch)
        assert fake.all_calls() == before

    def test_pages_are_created_in_the_background_before_growth_needs_them(self, driver):
        arena = make_arena(
            driver, num_slots=2, max_rows=400, max_pages=64, ahead_rows=8, spare_pages=8
        )
        slot = admit(arena, 8)
        created = arena.stats()["critical_creates"]
        for num_rows in range(9, 200):
            arena.wait_worker()
            assert extend(arena, slot, num_rows)
        stats = arena.stats()
        assert stats["critical_creates"] == created
        assert stats["created_pages"] == stats["in_use_pages"] + 8

    def test_pages_created_to_bring_sequences_back_are_counted(self, driver):
        arena = make_arena(driver, swap_bytes=1 << 20)
        group = arena.try_swap_out([admit(arena, 40)])
        arena.trim(0)
        before = arena.stats()
        assert arena.try_swap_in(group) is not None
        after = arena.stats()
        assert after["create_calls"] - before["create_calls"] == 5
        assert after["critical_creates"] - before["critical_creates"] == 5

    def test_spare_pages_stay_within_the_cap(self, driver):
        arena = make_arena(driver, max_pages=6, ahead_rows=8, spare_pages=8)
        slot = admit(arena, 8)
        arena.wait_worker()
        assert arena.stats()["created_pages"] == 6
        assert extend(arena, slot, 48)
        arena.check_invariants()


class TestProbe:
    def test_all_ways_at_once(self, driver):
        info = driver.info()
        assert (info["unmap_runs"], info["access_runs"], info["read_only"]) == (True, True, True)
        assert info["granularity_bytes"] == PAGE < info["recommended_granularity_bytes"]
        assert info["compute_capability"].count(".") == 1
        assert info["total_bytes"] > 0
        assert info["driver_version"] >= 12000

    @pytest.mark.parametrize("mode", MODES)
    def test_a_device_that_cannot_is_found_out(self, fake, mode):
        fake.ctl(f"{mode}=0")
        info = make_driver().info()
        assert {name for name in MODES if not info[name]} == {mode}

    def test_a_call_that_takes_away_less_than_it_says_is_found_out(self, fake):
        fake.ctl("unmap_runs=2")
        driver = make_driver()
        assert not driver.info()["unmap_runs"]
        base = driver.try_reserve(2 * PAGE)
        assert driver.try_map(base, new_pages(driver, 2))
        driver.wait_enqueued()
        driver.unmap(base, 2)
        assert driver.try_map(base, new_pages(driver, 2))

    @pytest.mark.parametrize("modes", [["unmap_runs"], ["access_runs"], MODES])
    def test_page_by_page_works_as_well(self, fake, modes):
        for mode in modes:
            fake.ctl(f"{mode}=0")
        driver = make_driver()
        base = driver.try_reserve(8 * PAGE)
        pages = new_pages(driver, 4)
        assert driver.try_map(base, pages)
        assert read(driver, base, 4 * PAGE) == bytes(4 * PAGE)
        driver.unmap(base, 4)
        assert driver.try_map(base + PAGE, pages)
        driver.unmap(base + PAGE, 4)
        for page in pages:
            driver.destroy_page(page)
        driver.release(base, 8 * PAGE)
        counters = driver.counters()
        assert counters["unmap_calls"] == (8 if "unmap_runs" in modes else 2)
        assert counters["access_calls"] == (8 if "access_runs" in modes else 2)
        del driver
        assert fake.leaks == 0

    def test_an_error_in_the_middle_of_a_run_is_taken_up_again(self, fake):
        fake.ctl("unmap_runs=0")
        driver = make_driver()
        base = driver.try_reserve(4 * PAGE)
        assert driver.try_map(base, new_pages(driver, 4))
        driver.wait_enqueued()
        fake.ctl("cuMemUnmap:fail=3,err=999")
        with pytest.raises(DriverError, match="cuMemUnmap"):
            driver.unmap(base, 4)
        driver.unmap(base, 4)
        assert driver.try_map(base, new_pages(driver, 4))

    def test_without_read_only_access_protection_is_refused(self, fake):
        fake.ctl("read_only=0")
        driver = make_driver()
        base = driver.try_reserve(PAGE)
        assert driver.try_map(base, new_pages(driver, 1))
        with pytest.raises(ConfigError, match="for reading only"):
            driver.protect(base, 1, is_writable=False)
        with pytest.raises(ConfigError, match="protect_shared"):
            make_arena(driver, protect_shared=True)

    def test_a_full_device_leaves_the_careful_ways(self, fake):
        fake.ctl("cuMemCreate:fail=1")
        info = make_driver().info()
        assert (info["unmap_runs"], info["access_runs"], info["read_only"]) == (False, False, False)


class TestContents:
    def test_new_pages_are_zeros_whatever_the_driver_hands_out(self, driver):
        base = driver.try_reserve(3 * PAGE)
        assert driver.try_map(base, new_pages(driver, 3))
        assert read(driver, base, 3 * PAGE) == bytes(3 * PAGE)  # poisoned with 0xFF at creation

    def test_pages_are_cleared_once(self, fake, driver):
        base = driver.try_reserve(4 * PAGE)
        old, *new = new_pages(driver, 3)
        assert driver.try_map(base, [old])
        driver.wait_enqueued()
        ctypes.memset(base, 7, PAGE)
        driver.unmap(base, 1)
        clears = fake.calls("cuMemsetD8Async")
        assert driver.try_map(base, [new[0], old, new[1]])
        assert fake.calls("cuMemsetD8Async") - clears == 2
        assert read(driver, base, 3 * PAGE) == bytes(PAGE) + b"\x07" * PAGE + bytes(PAGE)

    def test_copies_from_a_page_that_no_slot_maps(self, driver):
        base = driver.try_reserve(2 * PAGE)
        source, target = new_pages(driver, 2)
        content = bytes(range(256)) * (PAGE // 256)
        assert driver.try_write_pages([source], [content])
        assert driver.try_map(base, [target])
        assert driver.try_copy_page(base, source, 100)
        assert read(driver, base, 200) == content[:100] + bytes(100)

    def test_pages_go_to_the_host_and_come_back(self, driver):
        pages = new_pages(driver, 3)
        contents = [bytes([i]) * PAGE for i in range(1, 4)]
        assert driver.try_write_pages(pages, contents)
        assert driver.try_read_pages(pages[::-1]) == contents[::-1]

    def test_a_page_is_reached_by_one_mapping_however_often_it_is_copied(self, fake, driver):
        page = driver.try_create_page(700)  # in the second range of the window
        assert driver.try_write_pages([page], [bytes(PAGE)])
        maps = fake.calls("cuMemMap")
        for _ in range(5):
            assert driver.try_read_pages([page]) == [bytes(PAGE)]
        assert fake.calls("cuMemMap") == maps


class TestPendingWork:
    """The stand-in runs nothing before somebody waits: what is unmapped too early is error 700."""

    def test_the_fence_is_what_keeps_pages_mapped_under_a_kernel(self, fake):
        for ignore in (False, True):
            fake.reset()
            fake.start()
            fence_driver = _core.FaultDriver(make_driver())
            fence_driver.ignore_fences(ignore)
            arena = make_arena(fence_driver)
            slot = admit(arena, 32)
            address = _address(arena, slot)
            epoch = arena.begin_step()
            fake.touch(address, 32 * 512)  # a kernel that reads 32 rows
            arena.end_step(epoch)
            arena.truncate(slot, 8)
            arena.end_step(arena.begin_step())
            if not ignore:
                fence_driver.wait_enqueued()  # the kernel found its rows
                assert arena.stats()["retired_pages"] == 3
                arena.end_step(arena.begin_step())
                fake.ctl("query_runs=1")
                arena.end_step(arena.begin_step())
                assert arena.stats()["retired_pages"] == 0
                arena.close()
                continue
            with pytest.raises(DriverError, match="ILLEGAL_ADDRESS") as caught:
                fence_driver.wait_enqueued()
            assert caught.value.code == 700

    @pytest.mark.parametrize("end", ["free", "truncate", "close"])
    def test_what_the_driver_enqueued_between_steps_is_waited_for(self, fake, driver, end):
        arena = make_arena(driver, num_slots=6, max_pages=32)
        parent, other = arena.try_admit(2, 20)
        arena.end_step(arena.begin_step())
        free(arena, other)
        driver.wait_enqueued()
        assert arena.can_admit(1, 1)  # looks at the fence: nothing runs, and the arena knows
        (child,) = arena.try_fork(parent, 1, 20)  # its tail is copied when the device gets to it
        assert fake.pending(0) > 0
        if end == "free":
            free(arena, child, parent)
        elif end == "truncate":
            arena.truncate(child, 0)
            arena.truncate(parent, 0)
        if end == "close":
            arena.close()
        else:
            arena.end_step(arena.begin_step())
            assert arena.stats()["retired_pages"] > 0  # nobody knows that it ran
        driver.wait_enqueued()
        assert fake.pending(0) == 0

    def test_a_growth_that_fails_waits_before_it_unmaps_what_is_being_cleared(self, fake, driver):
        arena = make_arena(driver, num_layers=3, layers_per_group=1, max_pages=60)
        slot = admit(arena, 8)
        fake.ctl("cuMemMap:fail=2")  # the second region's page, after the first one's was cleared
        assert not extend(arena, slot, 16)
        driver.wait_enqueued()
        assert extend(arena, slot, 16)
        driver.wait_enqueued()

    def test_a_page_is_not_destroyed_under_the_copy_that_reads_it(self, fake, driver):
        base = driver.try_reserve(PAGE)
        source, target = new_pages(driver, 2)
        assert driver.try_write_pages([source], [b"\x05" * PAGE])
        assert driver.try_map(base, [target])
        assert driver.try_copy_page(base, source, PAGE)
        waits = driver.counters()["wait_calls"]
        driver.destroy_page(source)
        assert driver.counters()["wait_calls"] == waits + 1
        assert read(driver, base) == b"\x05" * PAGE

    def test_a_new_stream_starts_behind_the_old_one(self, fake, driver):
        base = driver.try_reserve(2 * PAGE)
        assert driver.try_map(base, new_pages(driver, 2))
        other = fake.value("cuStreamCreate", 1)
        driver.use_stream(other)
        assert driver.try_copy_page(base, driver.try_create_page(5), 8)
        fake.run_stream(other)  # runs what was enqueued on the first stream as well
        assert fake.pending(0) == 0
        calls = fake.total_calls
        driver.use_stream(other)
        assert fake.total_calls == calls
        fence = driver.try_record_fence()
        assert not driver.fence_passed(fence)
        driver.wait_enqueued()
        assert driver.fence_passed(fence)

    def test_pages_are_protected_only_once_the_kernels_that_write_them_are_done(self, fake, driver):
        arena = make_arena(driver, protect_shared=True)
        slot = admit(arena, 16)
        epoch = arena.begin_step()
        fake.touch(_address(arena, slot), 16 * 512, write=True)  # the rows' keys and values
        arena.end_step(epoch)
        assert arena.try_fork(slot, 1, 16) is not None
        driver.wait_enqueued()

    def test_a_stream_without_an_event_to_be_had_is_waited_for(self, fake, driver):
        base = driver.try_reserve(PAGE)
        assert driver.try_map(base, new_pages(driver, 1))
        fake.ctl("cuEventCreate:fail=1")
        driver.use_stream(fake.value("cuStreamCreate", 1))
        assert fake.pending(0) == 0


class TestErrors:
    def test_no_library_no_device_no_support(self, fake):
        path = fakecuda.library_path()
        assert _core.cuda_absence(path) is None
        assert "nowhere.so" in _core.cuda_absence("/nowhere.so")
        assert "does not exist; there are 1" in _core.cuda_absence(path, 1)
        fake.ctl("vmm=0")
        assert "no virtual memory management" in _core.cuda_absence(path)
        fake.ctl("devices=0")
        assert "no device" in _core.cuda_absence(path)
        with pytest.raises(ConfigError, match="no device"):
            make_driver()

    @pytest.mark.parametrize("version", [11030, 12080, 13000])
    def test_every_driver_since_cuda_11_3_will_do(self, version):
        script = """
from tests import fakecuda
from vmalloc import _core
print(_core.cuda_absence(fakecuda.library_path()))
"""
        result = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "FAKECUDA_CTL": f"driver_version={version}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (result.stdout, result.stderr) == ("None\n", "")

    def test_page_size_must_fit_the_granularity(self, fake):
        assert _core.make_cuda_driver(library=fakecuda.library_path()).page_bytes == PAGE
        with pytest.raises(ConfigError, match=r"6912.*cuda driver's granularity, 4096"):
            _core.make_cuda_driver(6912, library=fakecuda.library_path())

    def test_a_device_that_is_full_is_a_value(self, fake):
        fake.reset(mem_mb=1)
        driver = make_driver()
        pages = [driver.try_create_page(i) for i in range(300)]
        assert sum(page is not None for page in pages) == 256
        arena = make_arena(driver, max_pages=100)
        assert arena.try_admit(1, 8) is None
        arena.check_invariants()
        free_bytes, total_bytes = driver.memory_info()
        assert (free_bytes, total_bytes) == (0, 1 << 20)

    @pytest.mark.parametrize(
        ("call", "attempt"),
        [
            ("cuMemAddressReserve", lambda driver, at, page: driver.try_reserve(PAGE)),
            ("cuMemCreate", lambda driver, at, page: driver.try_create_page(9)),
            ("cuMemMap", lambda driver, at, page: driver.try_map(at, [page])),
            ("cuMemSetAccess", lambda driver, at, page: driver.try_map(at, [page])),
            ("cuMemsetD8Async", lambda driver, at, page: driver.try_map(at, [page])),
            ("cuMemcpyDtoHAsync", lambda driver, at, page: driver.try_read_pages([page])),
            ("cuMemcpyHtoDAsync", lambda driver, at, page: _write(driver, page)),
            ("cuMemcpyDtoDAsync", lambda driver, at, page: _copy(driver, page)),
            ("cuMemMap", lambda driver, at, page: driver.try_read_pages([page])),
            ("cuMemSetAccess", lambda driver, at, page: driver.try_read_pages([page])),
            ("cuMemAddressReserve", lambda driver, at, page: driver.try_read_pages([page])),
            ("cuEventCreate", lambda driver, at, page: driver.try_record_fence()),
            ("cuEventRecord", lambda driver, at, page: driver.try_record_fence()),
        ],
    )
    def test_lack_of_memory_is_a_value_and_another_error_is_named(self, fake, call, attempt):
        driver = make_driver()
        base = driver.try_reserve(4 * PAGE)
        page = driver.try_create_page(0)
        fake.ctl(f"{call}:fail=1,err=2")
        assert not attempt(driver, base, page)
        fake.ctl(f"{call}:fail=1,err=999")
        with pytest.raises(DriverError) as caught:
            attempt(driver, base, page)
        assert caught.value.call == call
        assert (caught.value.code, caught.value.name) == (999, "CUDA_ERROR_UNKNOWN")
        assert attempt(driver, base, page)  # nothing is left behind that is in the way

    def test_an_unknown_page_is_an_error_of_ours(self, driver):
        with pytest.raises(InvariantError, match="did not create"):
            driver.destroy_page(12345)


class TestSharing:
    def test_exported_pages_are_file_descriptors(self, fake):
        driver = make_driver(exportable=True)
        fd = driver.export_page(driver.try_create_page(0))
        try:
            assert os.fstat(fd).st_size >= PAGE
        finally:
            os.close(fd)

    def test_only_exportable_pages_are_exported(self, driver):
        with pytest.raises(ConfigError, match="not made exportable"):
            driver.export_page(driver.try_create_page(0))

    @pytest.mark.parametrize(
        ("mode", "setting", "message"),
        [
            ("rdma", "gpu_direct_rdma", "GPUDirect RDMA"),
            ("posix_fd", "exportable", "export memory"),
        ],
    )
    def test_what_the_device_lacks_is_refused(self, fake, mode, setting, message):
        assert make_driver(**{setting: True}).try_create_page(0) is not None
        fake.ctl(f"{mode}=0")
        with pytest.raises(ConfigError, match=message):
            make_driver(**{setting: True})


class TestProcess:
    def test_threads_without_a_context_may_call(self, fake, driver):
        base = driver.try_reserve(PAGE)
        page = driver.try_create_page(0)
        failures = []

        def work():
            try:
                assert driver.try_map(base, [page])
                driver.wait_enqueued()
                driver.unmap(base, 1)
                assert fake.value("cuCtxGetCurrent") == 0  # as it was before
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert failures == []

    def test_the_worker_switches_its_context_once(self, fake, driver):
        arena = make_arena(driver, ahead_rows=8)
        switches = fake.calls("cuCtxSetCurrent")
        slot = admit(arena, 4)
        for num_rows in range(5, 60):
            assert arena.try_extend([slot], [num_rows])
            arena.wait_worker()
        assert arena.stats()["background_pages"] > 4
        assert fake.calls("cuCtxSetCurrent") == switches + 1

    def test_a_forked_child_is_refused_and_harms_nothing(self, driver):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                driver.try_create_page(0)
            except ClosedError as error:
                os.write(writer, str(error).encode())
            del driver
            os._exit(0)
        os.close(writer)
        message = os.read(reader, 1000).decode()
        os.close(reader)
        assert os.waitpid(child, 0)[1] == 0
        assert "this CUDA driver belongs to the parent" in message
        assert driver.try_create_page(0) is not None

    def test_a_forked_child_leaves_swapped_pages_to_the_parent(self, fake, driver):
        arena = make_arena(driver, max_rows=800, max_pages=100, swap_bytes=1 << 20)
        assert arena.try_swap_out(arena.try_admit(1, 700)) is not None  # more than buffers kept
        child = os.fork()
        if child == 0:
            before = fake.all_calls()
            del arena, driver
            os._exit(0 if fake.all_calls() == before else 1)
        assert os.waitpid(child, 0)[1] == 0

    @pytest.mark.parametrize("ending", ["close", "exit"])
    def test_a_dead_driver_does_not_disturb_the_end(self, ending):
        script = f"""
from tests.core.test_cuda_driver import *
fake = fakecuda.FakeCuda()
driver = make_driver()
arena = make_arena(driver, ahead_rows=8)
admit(arena, 20)
arena.wait_worker()
fake.ctl("deinitialized=1")
if {ending == "close"!r}:
    try:
        arena.close()
    except DriverError as error:
        assert error.name == "CUDA_ERROR_DEINITIALIZED", error.name
    del arena, driver
print("ok")
"""
        result = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        assert (result.returncode, result.stdout, result.stderr) == (0, "ok\n", "")

    def test_pages_that_nobody_destroyed_go_with_the_driver(self, fake):
        driver = make_driver()
        pages = new_pages(driver, 3)
        assert driver.try_write_pages(pages[:1], [bytes(PAGE)])
        assert fake.used_bytes == 3 * PAGE
        del driver
        assert (fake.used_bytes, fake.leaks) == (0, 0)

    def test_a_driver_does_not_go_before_the_copies_it_enqueued(self, fake):
        driver = make_driver()
        source = driver.try_create_page(0)
        assert _copy(driver, source)
        assert fake.pending() > 0
        del driver
        assert fake.run_stream() == fakecuda.SUCCESS

    def test_nothing_is_left_of_an_arena(self, fake):
        arena = make_arena(
            make_driver(),
            num_slots=6,
            max_pages=32,
            ahead_rows=8,
            spare_pages=4,
            swap_bytes=1 << 20,
        )
        slots = arena.try_admit(2, 20)
        arena.try_fork(slots[0], 1, 20)
        group = arena.try_swap_out(slots)
        assert arena.try_swap_in(group) is not None
        arena.wait_worker()
        assert fake.leaks > 0
        arena.close()
        del arena
        assert fake.leaks == 0


def _address(arena, slot):
    """Where the slot's rows start."""
    capsule = arena.tensor_capsule(0, slot * arena.region_slot_bytes(0), "float32", [1], [1])
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype = ctypes.c_void_p
    get_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    return ctypes.c_void_p.from_address(get_pointer(capsule, b"dltensor")).value


def _write(driver, page):
    return driver.try_write_pages([page], [bytes(PAGE)])


def _copy(driver, page):
    base = driver.try_reserve(PAGE)
    assert driver.try_map(base, [driver.try_create_page(1)])
    return driver.try_copy_page(base, page, 8)
