"""Elastic tensors on every driver: which rows have memory, what they hold, what it costs."""

import gc
import os
import threading

import numpy as np
import pytest
import torch

from tests.drivers import KINDS, PAGE, make_driver
from vmalloc import ClosedError, ConfigError, DriverError, _core, elastic_tensor

from .backends import stand_in_driver

ROW = 600  # bytes: most rows share a page with their neighbours, and some straddle two


@pytest.fixture(params=KINDS)
def fake(request):
    """The stand-in where the CUDA driver is tested, with a context for launches; else None."""
    if request.param == "host":
        yield None
        return
    with stand_in_driver() as fake:
        yield fake


@pytest.fixture
def lazy():
    """The stand-in as a GPU is: it comes to nothing before somebody waits."""
    with stand_in_driver() as fake:
        fake.ctl("query_runs=0")
        fake.start()
        yield fake
        fake.check("cuDevicePrimaryCtxRelease_v2", 0)


def make(num_rows=100, **settings):
    """Rows of 150 float32 over pages of 4 KiB."""
    return elastic_tensor(
        (num_rows, ROW // 4), torch.float32, **{"driver": make_driver(), **settings}
    )


def books(elastic):
    return elastic.committed_bytes, elastic.created_bytes, elastic.available_bytes


def pages_of(*rows):
    """Pages that the ranges lie in, counted one by one."""
    return {
        byte // PAGE for part in rows for row in part for byte in (row * ROW, row * ROW + ROW - 1)
    }


@pytest.mark.usefixtures("fake")
class TestCommit:
    def test_nothing_is_taken_before_a_row_is_committed(self):
        with make() as elastic:
            assert books(elastic) == (0, 0, 15 * PAGE)
            assert elastic.reserved_bytes == 15 * PAGE  # 60,000 bytes
            assert elastic.tensor.shape == (100, 150)
            assert elastic.tensor.is_contiguous()

    def test_committed_rows_hold_what_is_written(self):
        with make() as elastic:
            assert elastic.commit(range(10, 20), range(50, 51))
            elastic.check_invariants()
            tensor = elastic.tensor
            assert tensor[10:20].eq(0).all()
            tensor[10:20] = torch.arange(10.0).unsqueeze(1)
            tensor[50] = 7
            assert tensor[10:20, 149].tolist() == list(range(10))
            assert elastic.committed_bytes == PAGE * len(pages_of(range(10, 20), range(50, 51)))

    def test_committing_again_changes_nothing(self):
        with make() as elastic:
            assert elastic.commit(range(30))
            elastic.tensor[:30] = 3
            before = books(elastic)
            assert elastic.commit(range(5, 20), range(10, 30))
            assert books(elastic) == before
            assert elastic.tensor[:30].eq(3).all()

    def test_empty_ranges_and_no_ranges_are_nothing_to_do(self):
        with make() as elastic:
            assert elastic.commit()
            assert elastic.commit(range(7, 7), range(100, 100))
            elastic.decommit(range(7, 7))
            assert elastic.committed_bytes == 0

    def test_all_ranges_or_none(self):
        with make(capacity_bytes=4 * PAGE) as elastic:
            assert elastic.commit(range(6))
            elastic.tensor[:6] = 1
            before = books(elastic)
            assert not elastic.commit(range(10, 12), range(40, 60))
            elastic.check_invariants()
            assert books(elastic) == before
            assert elastic.tensor[:6].eq(1).all()
            assert elastic.commit(range(10, 12))

    def test_all_tensors_or_none(self):
        with make(num_tensors=3, capacity_bytes=8 * PAGE) as elastic:
            assert elastic.commit(range(6))
            assert elastic.committed_bytes == 3 * PAGE
            assert not elastic.commit(range(20, 27))  # two pages in each of three
            elastic.check_invariants()
            assert elastic.commit(range(21, 26))
            for idx, tensor in enumerate(elastic.tensors):
                tensor[21:26] = idx
            for idx, tensor in enumerate(elastic.tensors):
                assert tensor[21:26].eq(idx).all()

    def test_a_failing_machine_is_an_answer(self):
        driver = _core.FaultDriver(make_driver())
        with make(driver=driver) as elastic:
            driver.fail_call(0, _core.Fault.OUT_OF_MEMORY)
            assert not elastic.commit(range(10))
            elastic.check_invariants()
            assert books(elastic)[:2] == (0, 0)
            assert elastic.commit(range(10))


@pytest.mark.usefixtures("fake")
class TestDecommit:
    def test_a_page_stays_while_a_neighbour_needs_it(self):
        with make() as elastic:
            assert elastic.commit(range(100))
            elastic.tensor.copy_(torch.arange(100.0).unsqueeze(1).expand(100, 150))
            left = set(range(100))
            for row in (3, 50, 6, 7, 99, 0, 51, 4, 5, 8, 9, 10, 11, 12, 13, 14):
                elastic.decommit(range(row, row + 1))
                elastic.check_invariants()
                left.discard(row)
                assert elastic.committed_bytes == PAGE * len(pages_of(left))
            rows = sorted(left)
            assert elastic.tensor[rows, 0].tolist() == [float(row) for row in rows]

    def test_memory_goes_back_at_once_but_for_the_spare(self):
        with make() as elastic:
            assert elastic.commit(range(100))
            elastic.decommit(range(50))
            assert elastic.created_bytes == elastic.committed_bytes
        with make(spare_bytes=3 * PAGE) as elastic:
            assert elastic.commit(range(100))
            elastic.decommit(range(100))
            assert books(elastic) == (0, 3 * PAGE, 15 * PAGE)
            assert elastic.trim() == 3 * PAGE
            assert elastic.created_bytes == 0

    def test_what_is_not_committed_does_not_matter(self):
        with make() as elastic:
            assert elastic.commit(range(40, 50))
            elastic.decommit(range(45))
            elastic.decommit(range(30), range(45))
            elastic.check_invariants()
            assert elastic.committed_bytes == PAGE * len(pages_of(range(45, 50)))

    @pytest.mark.parametrize("zero_on_reuse", [True, False])
    def test_what_rows_find_when_they_come_back(self, zero_on_reuse):
        with make(zero_on_reuse=zero_on_reuse, spare_bytes=1 << 20) as elastic:
            assert elastic.commit(range(30))
            elastic.tensor[:30] = 5
            elastic.decommit(range(10))
            elastic.decommit(range(20, 30))
            assert elastic.commit(range(10), range(20, 40))
            assert elastic.tensor[10:20].eq(5).all()
            anew = torch.cat([elastic.tensor[0:10], elastic.tensor[20:40]])
            assert anew.eq(0).all() == zero_on_reuse
            assert torch.isfinite(anew).all()

    def test_spare_memory_that_the_machine_has_not_is_refused_before_it_is_taken(self):
        with elastic_tensor((1 << 40,), "uint8", driver="host") as elastic:
            creates = elastic._driver.counters()["create_calls"]
            assert not elastic.create_spare(1 << 40)  # fallocate would go on until it is killed
            assert elastic._driver.counters()["create_calls"] == creates
            assert elastic.create_spare(1 << 20)

    def test_spare_memory_whose_creation_fails_goes_back(self):
        driver = _core.FaultDriver(make_driver())
        with make(driver=driver) as elastic:
            assert elastic.create_spare(2 * PAGE)
            driver.fail_call(3, _core.Fault.ERROR)
            with pytest.raises(DriverError):
                elastic.create_spare(9 * PAGE)
            elastic.check_invariants()
            assert elastic.created_bytes == 2 * PAGE

    def test_a_cap_has_moved_even_if_memory_beyond_it_could_not_go_back(self):
        driver = _core.FaultDriver(make_driver())
        with make(driver=driver, spare_bytes=1 << 20) as elastic:
            assert elastic.create_spare(8 * PAGE)
            driver.fail_release_call(2)
            with pytest.raises(DriverError):
                elastic.resize(4 * PAGE)
            assert (elastic.capacity_bytes, elastic.available_bytes) == (4 * PAGE, 4 * PAGE)
            elastic.trim()
            assert elastic.commit(range(27))
            assert not elastic.commit(range(28, 34))

    def test_resize_moves_the_cap(self):
        with make(capacity_bytes=0) as elastic:
            assert not elastic.commit(range(1))
            elastic.resize(2 * PAGE)
            assert elastic.capacity_bytes == 2 * PAGE
            assert elastic.commit(range(13))
            elastic.resize(PAGE)  # what is committed stays
            elastic.check_invariants()
            assert books(elastic) == (2 * PAGE, 2 * PAGE, 0)
            elastic.decommit(range(13))
            assert elastic.commit(range(6))
            assert not elastic.commit(range(6, 8))

    def test_spare_memory_is_created_or_nothing_is(self):
        with make(capacity_bytes=8 * PAGE) as elastic:
            assert elastic.create_spare(4 * PAGE)
            assert books(elastic) == (0, 4 * PAGE, 8 * PAGE)
            assert not elastic.create_spare(9 * PAGE)
            assert elastic.created_bytes == 4 * PAGE
            assert elastic.commit(range(30))
            elastic.decommit(range(30))
            assert elastic.created_bytes == 4 * PAGE


@pytest.mark.usefixtures("fake")
class TestAlias:
    def test_two_places_one_memory(self):
        with elastic_tensor((64, 1024), torch.float32, driver=make_driver()) as elastic:
            assert elastic.commit(range(4))
            assert elastic.alias(range(2), 32)
            elastic.check_invariants()
            elastic.tensor[0:2] = 4
            assert elastic.tensor[32:34].eq(4).all()
            elastic.tensor[33] = 5
            assert elastic.tensor[1].eq(5).all()
            assert elastic.committed_bytes == 4 * PAGE
            elastic.decommit(range(4))
            elastic.check_invariants()
            assert elastic.committed_bytes == 2 * PAGE
            assert elastic.tensor[33].eq(5).all()
            elastic.decommit(range(32, 34))
            assert books(elastic)[:2] == (0, 0)

    def test_zeroing_spares_what_others_share(self):
        with elastic_tensor(
            (64, 512), torch.float32, zero_on_reuse=True, driver=make_driver()
        ) as elastic:
            assert elastic.commit(range(2))
            assert elastic.alias(range(2), 8)
            elastic.tensor[0:2] = 1
            elastic.decommit(range(8, 9))
            assert elastic.commit(range(8, 9))
            assert elastic.tensor[0:2].eq(1).all()

    def test_an_alias_that_was_given_up_is_not_taken_back(self):
        driver = _core.FaultDriver(make_driver())
        with elastic_tensor((16, 1024), torch.float32, driver=driver) as elastic:
            assert elastic.commit(range(2))
            assert elastic.alias(range(2), 8)
            driver.hold_fences(True)
            elastic.decommit(range(8, 10))
            assert not elastic.commit(range(8, 10))
            driver.hold_fences(False)
            assert elastic.commit(range(8, 10))
            elastic.tensor[8:10] = 1
            assert elastic.tensor[0:2].eq(0).all()

    def test_only_whole_pages_that_are_committed_to_where_nothing_is(self):
        with make() as elastic:
            assert elastic.commit(range(100))
            with pytest.raises(ConfigError, match="must be multiples of the page, 4096 bytes"):
                elastic.alias(range(10), 50)
        with elastic_tensor((8, 1024), torch.float32, driver=make_driver()) as elastic:
            assert elastic.commit(range(2))
            with pytest.raises(ConfigError, match="are not all committed"):
                elastic.alias(range(3), 5)
            with pytest.raises(ConfigError, match="are committed already"):
                elastic.alias(range(1), 1)
            with pytest.raises(ConfigError, match="must lie within the 8"):
                elastic.alias(range(2), 7)
            elastic.check_invariants()


class TestTensors:
    @pytest.mark.parametrize(
        "dtype",
        [
            *(torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn),
            *(torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64),
        ],
    )
    def test_any_type(self, dtype):
        with elastic_tensor((10, 3, 5), dtype) as elastic:
            assert elastic.commit(range(2, 4))
            elastic.tensor[2:4] = torch.ones(2, 3, 5).to(dtype)
            assert elastic.tensor.dtype == dtype
            assert elastic.row_bytes == 15 * dtype.itemsize
            assert (
                elastic.tensor[2:4].to(torch.float32 if dtype != torch.complex64 else dtype).sum()
            )

    def test_by_dlpack_the_memory_is_the_same(self):
        with elastic_tensor((100, 4), "float32") as elastic:
            assert elastic.commit(range(10))
            elastic.tensor[:10] = 3
            array = np.from_dlpack(elastic)
            assert array.shape == (100, 4)
            assert array[:10].sum() == 120
            again = torch.from_dlpack(elastic)
            again[0] = 9
            assert elastic.tensor[0].eq(9).all()
            assert array[0].sum() == 36

    def test_a_tensor_may_outlive_the_memory(self):
        elastic = make(driver="host")
        assert elastic.commit(range(10))
        tensor = elastic.tensor
        tensor[:10] = 2
        elastic.close()
        elastic.close()
        assert tensor[:10].eq(0).all()  # the addresses are still there, the memory is not
        elastic = make(driver="host")
        assert elastic.commit(range(10))
        tensor = elastic.tensor
        del elastic
        gc.collect()
        assert tensor[:10].eq(0).all()

    def test_the_addresses_go_with_the_last_tensor(self, lazy):
        with make() as elastic:
            assert elastic.commit(range(10))
            tensor = elastic.tensor
        assert lazy.calls("cuMemAddressFree") == 1  # what the driver tried itself out with
        del tensor, elastic
        gc.collect()
        assert lazy.calls("cuMemAddressFree") > 1

    def test_closed_is_closed(self):
        elastic = make(driver="host")
        elastic.close()
        for call in (
            lambda: elastic.commit(range(1)),
            lambda: elastic.decommit(range(1)),
            lambda: elastic.tensor,
            lambda: elastic.committed_bytes,
            elastic.trim,
            elastic.check_invariants,
            lambda: elastic.create_spare(1),
            lambda: np.from_dlpack(elastic),
        ):
            with pytest.raises(ClosedError):
                call()

    def test_a_forked_child_is_told_and_the_parent_keeps_its_memory(self):
        with make(driver="host") as elastic:
            assert elastic.commit(range(10))
            elastic.tensor[:10] = 6
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    elastic.commit(range(20))
                except ClosedError:
                    status = 0
                del elastic
                gc.collect()
                os._exit(status)
            assert os.waitpid(child, 0)[1] == 0
            assert elastic.tensor[:10].eq(6).all()
            assert elastic.commit(range(20))


class TestMisuse:
    @pytest.mark.parametrize(
        ("rows", "words"),
        [
            (range(101), r"rows are range\(0, 101\); they must lie within the 100"),
            (range(-1, 5), "must lie within"),
            (range(5, 3), "must lie within"),
            (range(0, 10, 2), "must be a range of step 1"),
            ((0, 10), r"rows are \(0, 10\); they must be a range"),
            (slice(0, 10), "must be a range"),
        ],
    )
    def test_rows(self, rows, words):
        with make(driver="host") as elastic:
            assert elastic.commit(range(5))
            before = books(elastic)
            for call in (elastic.commit, elastic.decommit):
                with pytest.raises(ConfigError, match=words):
                    call(range(10, 12), rows)
            assert books(elastic) == before

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"shape": ()}, r"shape is \(\); it must have a dim"),
            ({"shape": (4, 0)}, r"shape is \(4, 0\)"),
            ({"shape": (1.5,)}, "shape is"),
            ({"dtype": "float31"}, "dtype is 'float31'"),
            ({"dtype": 4}, "dtype is 4"),
            ({"device": "gpu"}, "device is 'gpu'; supported"),
            ({"num_tensors": 0}, "num_tensors is 0; it must be at least 1"),
            ({"capacity_bytes": -1}, "capacity_bytes is -1"),
            ({"page_bytes": 1000}, "1000"),
            ({"page_bytes": 0}, "page_bytes is 0"),
            ({"spare_bytes": -5}, "spare_bytes is -5"),
            ({"driver": "null"}, "no tensors"),
            ({"driver": "rocm"}, "driver is 'rocm'"),
            ({"shape": (1 << 50, 1 << 10)}, "address space"),
            ({"shape": (1 << 60, 1 << 10)}, r"would have \d+ bytes; at most"),
            ({"shape": 10}, "shape is 10; it must be a sequence of integers"),
            ({"capacity_bytes": 1e9}, "capacity_bytes is 1000000000.0; it must be an integer"),
            ({"capacity_bytes": 1 << 80}, "capacity_bytes is .*; it must be at most"),
            ({"num_tensors": "2"}, "num_tensors is '2'; it must be an integer"),
            ({"page_bytes": 1 << 80}, "page_bytes is .*; it must be at most"),
            ({"driver": _core.make_host_driver(PAGE), "page_bytes": 65536}, "given has 4096"),
            ({"driver": _core.make_host_driver(PAGE), "device": "xpu"}, "'xpu'; supported: cpu"),
        ],
    )
    def test_settings(self, settings, words):
        with pytest.raises(ConfigError, match=words):
            elastic_tensor(**{"shape": (10, 10), "dtype": torch.float32, **settings})

    def test_sizes_may_be_of_any_integer_type(self):
        with elastic_tensor(
            np.array([100, 150]), "float32", num_tensors=np.int32(2), spare_bytes=np.int64(5)
        ) as elastic:
            assert elastic.shape == (100, 150)
            assert elastic.commit(range(np.int64(3), np.int64(9)))

    def test_sizes(self):
        with make(driver="host") as elastic:
            for call in (elastic.create_spare, elastic.resize):
                for size in (2.5, 1 << 80):
                    with pytest.raises(ConfigError, match=r"_bytes is .*; it must be"):
                        call(size)
            with pytest.raises(ConfigError, match="num_bytes is -1"):
                elastic.create_spare(-1)
            with pytest.raises(ConfigError, match="capacity_bytes is -1"):
                elastic.resize(-1)


class TestDevice:
    """Work on the device may still read what was decommitted."""

    def test_a_page_stays_mapped_until_its_fence_has_passed(self):
        driver = _core.FaultDriver(make_driver())
        with make(driver=driver, capacity_bytes=2 * PAGE) as elastic:
            assert elastic.commit(range(13))
            elastic.tensor[:13] = 1
            driver.hold_fences(True)
            elastic.decommit(range(13))
            elastic.check_invariants()
            assert elastic.tensor[:13].eq(1).all()  # readable still
            assert elastic.committed_bytes == 0
            assert elastic.created_bytes == 2 * PAGE
            assert not elastic.commit(range(50, 51))
            maps = driver.counters()["map_calls"]
            assert elastic.commit(range(4))  # taken back where it lies
            assert driver.counters()["map_calls"] == maps
            assert elastic.tensor[:4].eq(1).all()
            driver.hold_fences(False)
            assert elastic.commit(range(50, 51))
            elastic.check_invariants()

    def test_a_launch_that_reads_decommitted_rows_is_safe(self, lazy):
        with make() as elastic:
            assert elastic.commit(range(50))
            lazy.touch(elastic.tensor.data_ptr(), 50 * ROW)
            elastic.decommit(range(50))
            assert elastic.commit(range(60, 80))
            assert lazy.run_stream() == 0
            elastic.decommit(range(60, 80))
            assert elastic.created_bytes > 0
            elastic.trim()
            assert elastic.created_bytes == 0

    def test_without_the_fence_it_is_not(self, lazy):
        """The test above can fail."""
        driver = _core.FaultDriver(make_driver())
        elastic = make(driver=driver)
        assert elastic.commit(range(50))
        driver.ignore_fences(True)
        lazy.touch(elastic.tensor.data_ptr(), 50 * ROW)
        elastic.decommit(range(50))
        assert lazy.run_stream() == 700
        del elastic, driver
        gc.collect()
        lazy.reset()
        lazy.start()

    def test_work_on_another_stream_is_waited_for_there(self, lazy):
        stream = lazy.value("cuStreamCreate", 1)
        with make() as elastic:
            assert elastic.commit(range(50), stream=stream)
            lazy.touch(elastic.tensor.data_ptr(), 50 * ROW, stream=stream)
            elastic.decommit(range(50), stream=stream)
            assert elastic.created_bytes > 0
            assert lazy.run_stream(stream) == 0
            elastic.commit(range(60, 61), stream=stream)
            assert elastic.created_bytes == elastic.committed_bytes
        lazy.check("cuStreamDestroy_v2", stream)

    def test_closing_waits_for_the_current_stream_too(self, lazy):
        stream = lazy.value("cuStreamCreate", 1)
        elastic = make()
        assert elastic.commit(range(50), stream=stream)
        assert elastic.commit(range(50, 60), stream=0)
        assert elastic.commit(range(60, 61), stream=stream)  # the last to be named
        lazy.touch(elastic.tensor.data_ptr(), 50 * ROW)  # on the current one
        elastic.close()
        assert lazy.run_stream() == 0
        lazy.check("cuStreamDestroy_v2", stream)

    def test_a_commit_waits_where_only_retired_pages_are_missing(self, lazy):
        driver = make_driver()
        with make(driver=driver, capacity_bytes=4 * PAGE) as elastic:
            assert elastic.commit(range(27))
            lazy.touch(elastic.tensor.data_ptr(), 27 * ROW)
            elastic.decommit(range(27))
            waits = driver.counters()["wait_calls"]
            assert not elastic.commit(range(30, 100))  # nothing to be gained
            assert driver.counters()["wait_calls"] == waits
            assert elastic.commit(range(30, 50))
            elastic.check_invariants()


class TestFaults:
    """Every driver call of a scripted run fails once."""

    def script(self, elastic):
        def attempt(call, *rows):
            try:
                return call(*rows)
            except DriverError as error:
                assert error.name == "INJECTED"
                return None
            finally:
                elastic.check_invariants()

        attempt(elastic.commit, range(20), range(50, 60))
        attempt(elastic.decommit, range(3, 55))
        attempt(elastic.commit, range(10, 90))
        attempt(elastic.create_spare, 3 * PAGE)
        attempt(elastic.decommit, range(100))
        attempt(elastic.trim)
        attempt(elastic.commit, range(5, 8))
        attempt(elastic.resize, 12 * PAGE)

    def elastic(self):
        driver = _core.FaultDriver(make_driver())
        elastic = make(driver=driver, num_tensors=2, zero_on_reuse=True, spare_bytes=2 * PAGE)
        driver.fail_call(0, _core.Fault.NONE)
        return driver, elastic

    @pytest.mark.usefixtures("fake")
    @pytest.mark.parametrize("fault", [_core.Fault.OUT_OF_MEMORY, _core.Fault.ERROR], ids=str)
    def test_a_call_that_takes_something_fails(self, fault):
        driver, elastic = self.elastic()
        self.script(elastic)
        num_calls = driver.num_calls()
        assert num_calls > 50
        elastic.close()
        for call in range(num_calls):
            driver, elastic = self.elastic()
            driver.fail_call(call, fault)
            self.script(elastic)
            driver.fail_call(0, _core.Fault.NONE)
            elastic.decommit(range(100))
            assert elastic.commit(range(30)), f"call {call}"
            assert all(tensor[:30].eq(0).all() for tensor in elastic.tensors)
            elastic.close()

    @pytest.mark.usefixtures("fake")
    def test_a_call_that_gives_back_fails(self):
        for call in range(40):
            driver, elastic = self.elastic()
            driver.fail_release_call(call)
            self.script(elastic)
            elastic.decommit(range(100))
            elastic.trim()
            assert elastic.created_bytes == 0, f"call {call}"
            assert elastic.commit(range(30))
            elastic.close()


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("fault", [_core.Fault.OUT_OF_MEMORY, _core.Fault.ERROR], ids=str)
def test_an_alias_that_fails_changes_nothing(fault):
    driver = _core.FaultDriver(make_driver())
    shape = (32, PAGE // 4)
    with elastic_tensor(shape, torch.float32, num_tensors=3, driver=driver) as elastic:
        assert elastic.commit(range(4))
        before = books(elastic)
        num_refused = 0
        for call in range(20):
            driver.fail_call(call, fault)
            try:
                is_mapped = elastic.alias(range(4), 8)
            except DriverError:
                is_mapped = False
            elastic.check_invariants()
            assert books(elastic) == before
            if is_mapped:
                break
            num_refused += 1
        assert num_refused >= 3
        elastic.tensors[2][3] = 1
        assert elastic.tensors[2][11].eq(1).all()


def test_threads_may_share_one():
    elastic = make(num_rows=400, driver="host", spare_bytes=1 << 20)
    failures = []

    def work(first):
        try:
            for turn in range(60):
                rows = range(first, first + 7 + turn % 40)
                assert elastic.commit(rows)
                elastic.tensor[rows.start : rows.stop] = first + turn
                assert elastic.tensor[rows.start : rows.stop].eq(first + turn).all()
                elastic.decommit(rows)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 100, 200, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    elastic.check_invariants()
    assert elastic.committed_bytes == 0
    elastic.close()
