"""vAttention's API: a script of its users, its semantics, and each of its defects that shows here.

The numbers of the defects are those of a reading of the original's source: 1 a race at the start of
its thread, 2 lengths overwritten under the thread, 3 out of memory inside released GIL, 4 a best
fit that is none, 5 a stride that leaves the pages, 6 a forgotten throw, 7 common pages without a
count, 8 unsigned underflow and division by zero, 9 clean-up of what is clean, addresses never
freed, 10 nothing cleared, nothing waited for before unmapping, 11 kernels that read past the end.
"""

import gc
import os
import runpy
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.drivers import PAGE, make_driver
from tests.kv.backends import stand_in_driver
from vmalloc import ClosedError, ConfigError, DriverError, _core
from vmalloc.integrations import vattention
from vmalloc.integrations.vattention import OutOfPagesError

SCRIPT = Path(__file__).parent / "vattention_script.py"
IMPORT = "import vattention\n"
OUR_IMPORT = "import vmalloc.integrations.vattention as vattention\n"

# 512 bytes a token and tensor, 8 tokens a page; two layers: 4 tensors, blocks of 4 pages.
LAYERS, HEADS, SIZE, BATCH, LENGTH = 2, 4, 64, 4, 64


@pytest.fixture(params=["host", "cuda"])
def fake(request):
    """The stand-in where the CUDA driver is tested; else None."""
    if request.param == "host":
        yield None
        return
    with stand_in_driver() as fake:
        yield fake
        vattention.cleanup()


@pytest.fixture
def lazy():
    """The stand-in as a GPU is: it comes to nothing before somebody waits."""
    with stand_in_driver() as fake:
        fake.ctl("query_runs=0")
        fake.start()
        yield fake
        vattention.cleanup()
        fake.check("cuDevicePrimaryCtxRelease_v2", 0)


@pytest.fixture(autouse=True)
def cleaned_up():
    yield
    vattention.cleanup()
    vattention.set_verbose(False)


def init(batch=BATCH, length=LENGTH, **settings):
    layers = settings.pop("layers", LAYERS)
    heads, size = settings.pop("heads", HEADS), settings.pop("size", SIZE)
    megacache = settings.pop("megacache", False)
    return vattention.init_kvcache(
        layers,
        heads,
        size,
        batch,
        length,
        "cpu",
        torch.float16,
        PAGE,
        megacache,
        **{"driver": make_driver(), **settings},
    )


def reserve(num_blocks):
    """A pool of so many blocks."""
    block_bytes = vattention._cache.block_bytes
    num_pages = vattention.reserve_physical_pages(num_blocks * block_bytes)
    assert num_pages * vattention._cache.page_bytes == num_blocks * block_bytes


def check():
    vattention._cache.check_invariants()


def mapped():
    """Blocks of every slot, as the allocator shows them."""
    lines = vattention._cache.describe_slots()[2:]
    return [int(line.split(":")[2]) for line in lines]


def lens_of(**lengths):
    """``slot_0=5`` and so on, as a step wants them."""
    return [lengths.get(f"slot_{slot}", 0) for slot in range(BATCH)]


# The script


@pytest.mark.parametrize("layout", [(), ("--megacache",)], ids=["per layer", "megacache"])
@pytest.mark.parametrize("mode", [(), ("--async",), ("--async", "--no-deferred")], ids=str)
def test_a_script_of_its_users_runs_with_one_import_changed(
    layout, mode, tmp_path, monkeypatch, capsys
):
    source = SCRIPT.read_text()
    assert source.count("vattention\n") == source.count(IMPORT) == 1
    changed = tmp_path / "script.py"
    changed.write_text(source.replace(IMPORT, OUR_IMPORT))
    arguments = ("--device", "cpu", "--page-size", "65536", "--free-memory", "50000000")
    monkeypatch.setattr(sys, "argv", [str(changed), *arguments, *layout, *mode])
    runpy.run_path(str(changed), run_name="__main__")
    out = capsys.readouterr().out
    assert f"OK: {762 if layout else 760} pages" in out
    assert "Num layers: 4" in out


def test_names_and_order_of_arguments():
    parameters = [
        *("num_layers", "num_kv_heads", "head_size", "max_batch_size", "max_context_length"),
        *("device", "dtype", "page_size", "megacache"),
    ]
    code = vattention.init_kvcache.__code__
    assert list(code.co_varnames[: code.co_argcount]) == parameters
    for name in vattention.__all__:
        assert getattr(vattention, name).__doc__


# The semantics


@pytest.mark.usefixtures("fake")
class TestSemantics:
    def test_tensors_k_first_and_nothing_mapped(self):
        tensors = init()
        assert len(tensors) == 2 * LAYERS
        assert {tensor.shape for tensor in tensors} == {(BATCH, LENGTH, HEADS, SIZE)}
        reserve(8)
        vattention.step(lens_of(slot_2=20))
        for idx, tensor in enumerate(tensors):
            tensor[2, :20] = idx
        for idx, tensor in enumerate(tensors):
            assert tensor[2, :20].eq(idx).all()
        assert mapped() == [0, 0, 3, 0]
        check()

    def test_megacache_is_two_tensors_over_all_layers(self):
        tensors = init(megacache=True)
        assert [tensor.shape for tensor in tensors] == [(BATCH, LENGTH, LAYERS, HEADS, SIZE)] * 2
        reserve(40)
        vattention.step(lens_of(slot_1=20, slot_3=64))
        for idx, tensor in enumerate(tensors):
            for layer in range(LAYERS):
                tensor[:, :, layer][1, :20] = idx * 10 + layer
                tensor[:, :, layer][3] = -(idx * 10 + layer)
        for idx, tensor in enumerate(tensors):
            for layer in range(LAYERS):
                assert tensor[1, :20, layer].eq(idx * 10 + layer).all()
                assert tensor[3, :, layer].eq(-(idx * 10 + layer)).all()
        assert mapped() == [0, 5, 0, 16]
        check()

    def test_the_pool_is_taken_at_once_in_whole_blocks_and_never_shrinks(self):
        init()
        assert vattention.num_free_kvblocks() == 0
        block = 4 * PAGE
        assert vattention.reserve_physical_pages(block - 1) == 0
        assert vattention.reserve_physical_pages(5 * block + 3) == 20
        assert vattention._cache._elastic.created_bytes == 5 * block
        assert vattention.reserve_physical_pages(block) == 20
        assert vattention.reserve_physical_pages(7 * block) == 28
        assert vattention.num_free_kvblocks() == 7

    def test_a_pool_larger_than_the_machine_is_refused_and_nothing_is_kept(self):
        driver = _core.FaultDriver(make_driver())
        init(driver=driver)
        reserve(2)
        driver.fail_call(3, _core.Fault.OUT_OF_MEMORY)
        with pytest.raises(OutOfPagesError, match="cpu has not so many, and the pool stays at"):
            vattention.reserve_physical_pages(6 * 4 * PAGE)
        assert vattention.num_free_kvblocks() == 2
        assert vattention._cache._elastic.created_bytes == 2 * 4 * PAGE

    def test_a_pool_beyond_the_hosts_memory_is_refused_before_it_is_taken(self, fake):
        init()
        if fake is None:  # the host's driver itself would go on until the process is killed
            with pytest.raises(OutOfPagesError, match="cpu has not so many"):
                vattention.reserve_physical_pages(1 << 50)
            assert vattention._cache._elastic.created_bytes == 0
        reserve(2)

    def test_a_pool_that_the_driver_fails_to_make_is_given_back(self):
        driver = _core.FaultDriver(make_driver())
        init(driver=driver)
        reserve(2)
        driver.fail_call(9, _core.Fault.ERROR)
        with pytest.raises(DriverError):
            vattention.reserve_physical_pages(6 * 4 * PAGE)
        assert vattention.num_free_kvblocks() == 2
        assert vattention._cache._elastic.created_bytes == 2 * 4 * PAGE
        reserve(6)

    def test_freed_slots_keep_their_pages_until_a_step_is_short(self):
        tensors = init()
        reserve(8)
        for slot, length in enumerate((16, 24, 8)):
            assert vattention.alloc_new_batch_idx(length) == slot
        vattention.step([16, 24, 8, 0])
        assert (mapped(), vattention.num_free_kvblocks()) == ([2, 3, 1, 0], 2)
        tensors[0][0, :16] = 7
        vattention.free_batch_idx(1)
        vattention.free_batch_idx(2)
        assert (mapped(), vattention.num_free_kvblocks()) == ([2, 3, 1, 0], 6)
        vattention.step([16 + 24, 0, 0, 0])  # two of them are free, and one is taken
        assert mapped() == [5, 3, 0, 0]  # from the last slot on
        assert tensors[0][0, :16].eq(7).all()
        vattention.step([16 + 32, 0, 0, 0])
        assert mapped() == [6, 2, 0, 0]
        check()

    def test_eager_reclaim_takes_the_pages_of_inactive_slots(self):
        init()
        reserve(8)
        vattention.step([16, 24, 8, 0])
        vattention.step([16, 0, 0, 0], True)
        assert (mapped(), vattention.num_free_kvblocks()) == ([2, 0, 0, 0], 6)

    def test_without_deferral_a_freed_slot_has_no_pages(self):
        init()
        reserve(8)
        vattention.set_deferred_reclamation(False)
        vattention.step([16, 24, 8, 0])
        vattention.free_batch_idx(1)
        assert mapped() == [2, 0, 1, 0]
        vattention.step_async([16, 0, 0, 0])
        assert mapped() == [2 + 2, 0, 0, 0]  # for tokens 17 and 25, which come soon

    def test_a_step_that_is_short_changes_nothing(self):
        tensors = init()
        reserve(6)
        vattention.step([16, 24, 0, 0])
        tensors[3][1, :24] = 2
        for step in (vattention.step, vattention.step_async):
            with pytest.raises(OutOfPagesError, match="2 more KV blocks of 16384 bytes are needed"):
                step([16, 24, 16, 0])
            assert mapped() == [2, 3, 0, 0]
        assert tensors[3][1, :24].eq(2).all()
        assert vattention.alloc_new_batch_idx(5) == 2
        vattention.step([16, 24, 5, 0])
        check()

    def test_lengths_of_a_step_that_failed_in_the_driver_are_the_old_ones(self):
        driver = _core.FaultDriver(make_driver())
        init(driver=driver)
        reserve(8)
        vattention.step([16, 24, 0, 0])
        driver.fail_call(0, _core.Fault.ERROR)
        with pytest.raises(DriverError):
            vattention.step([16, 33, 8, 0])
        check()
        assert vattention.alloc_new_batch_idx(5) == 2  # it is inactive still
        vattention.step([16, 33, 5, 0])

    def test_async_steps_find_their_rows_backed(self):
        driver = make_driver()
        tensors = init(driver=driver)
        reserve(16)
        lens = [15, 9, 0, 0]
        for turn in range(20):
            vattention.step_async(lens)
            vattention._cache.wait_worker()
            maps = driver.counters()["map_calls"]
            lens = [length + 1 for length in lens[:2]] + [0, 0]
            vattention.step(lens)
            assert driver.counters()["map_calls"] == maps  # it was there before it was asked for
            tensors[0][0, lens[0] - 1] = turn
            tensors[3][1, lens[1] - 1] = -turn
        assert mapped() == [6, 5, 0, 0]
        assert tensors[0][0, 15:35, 0, 0].tolist() == list(range(20))
        assert tensors[3][1, 9:29, 3, 63].tolist() == [-turn for turn in range(20)]
        check()

    def test_all_slots_taken_is_minus_one(self):
        init()
        assert [vattention.alloc_new_batch_idx(8) for _ in range(5)] == [0, 1, 2, 3, -1]
        vattention.free_batch_idx(2)
        vattention.free_batch_idx(2)
        assert vattention.alloc_new_batch_idx(8) == 2

    def test_calls_out_of_order_say_so(self):
        for call in (
            lambda: vattention.step([0]),
            lambda: vattention.reserve_physical_pages(1),
            vattention.num_free_kvblocks,
            vattention.show_kvcache_config,
        ):
            with pytest.raises(ConfigError, match="call init_kvcache first"):
                call()
        init()
        with pytest.raises(ConfigError, match="call cleanup"):
            init()

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"layers": 0}, "num_layers is 0; it must be at least 1"),
            ({"batch": 0}, "max_batch_size is 0"),
            ({"length": -4}, "max_context_length is -4"),
            ({"lookahead_tokens": -1}, "lookahead_tokens is -1"),
            ({"batch": 4.0}, "max_batch_size is 4.0; it must be an integer"),
            ({"layers": "2"}, "num_layers is '2'; it must be an integer"),
            ({"batch": 1 << 50}, "would have .* bytes; at most"),
            ({"length": 1 << 40}, "the address space has no room"),
        ],
    )
    def test_sizes_that_cannot_work(self, settings, words):
        with pytest.raises(ConfigError, match=words):
            init(**settings)
        init()

    def test_numbers_of_any_integer_type(self):
        tensors = init(layers=np.int64(2), batch=np.int32(4), length=np.int64(64), megacache=2)
        assert {tensor.shape for tensor in tensors} == {(BATCH, LENGTH, LAYERS, HEADS, SIZE)}
        vattention.reserve_physical_pages(np.int64(1 << 20))
        slot = vattention.alloc_new_batch_idx(torch.tensor(7))
        vattention.step(np.array([7, 0, 0, 0]))
        vattention.step_async(torch.tensor([8, 0, 0, 0]))
        vattention.free_batch_idx(np.int32(slot))

    def test_bad_arguments_lose_nothing(self):
        init()
        reserve(8)
        vattention.step([16, 24, 0, 0])
        for lens, words in (
            ([16, 24, 0], "seq_lens has 3 lengths; it must have one a slot, 4"),
            ([16, 24, 0, 0, 0], "has 5 lengths"),
            ([16, 24, -1, 0], r"seq_lens\[2\] is -1"),
        ):
            with pytest.raises(ConfigError, match=words):
                vattention.step_async(lens)
        for batch_idx in (-1, 4):
            with pytest.raises(ConfigError, match=f"batch_idx is {batch_idx}; it must be below"):
                vattention.free_batch_idx(batch_idx)
        with pytest.raises(ConfigError, match="seqlen is 0"):
            vattention.alloc_new_batch_idx(0)
        for free_memory in (-1, 1e9):
            with pytest.raises(ConfigError, match=f"free_memory is {free_memory}"):
                vattention.reserve_physical_pages(free_memory)
        with pytest.raises(TypeError):
            vattention.step(None)
        assert mapped() == [2, 3, 0, 0]

    def test_verbose_shows_and_silent_does_not(self, capsys):
        init()
        vattention.show_kvcache_config()
        vattention.show_allocator_state()
        assert capsys.readouterr().out == ""
        vattention.set_verbose(True)
        vattention.show_kvcache_config()
        vattention.show_allocator_state()
        out = capsys.readouterr().out
        assert "Max context length: 64" in out
        assert "Bytes per elem: 2" in out
        assert f"virt_buff_size: {BATCH * LENGTH * 512}" in out
        assert "reqId : seqlen: mapped: required" in out

    def test_after_cleanup_one_may_begin_anew(self):
        old = init()
        reserve(4)
        vattention.step([8, 0, 0, 0])
        vattention.cleanup()
        new = init(batch=2, megacache=True)
        reserve(4)
        vattention.step([5, 0])
        new[0][0, :5] = 1
        assert old[0].data_ptr() != new[0].data_ptr()


# The defects


@pytest.mark.usefixtures("fake")
class TestDefects:
    def test_1_no_call_overtakes_the_thread_of_the_step_before(self):
        init()
        reserve(16)
        gate = threading.Event()
        vattention._cache._thread.submit(gate.wait)  # the thread comes to the step's work late
        threading.Timer(0.2, gate.set).start()
        vattention.step_async([8, 8, 0, 0])
        assert vattention.num_free_kvblocks() == 14
        assert mapped() == [2, 2, 0, 0]  # what the thread mapped is there
        check()
        vattention.step_async([16, 16, 0, 0])
        vattention.cleanup()  # waits, too

    def test_2_calls_from_many_threads_keep_the_books(self):
        tensors = init(batch=4)
        reserve(24)
        lock, lens, failures = threading.Lock(), [0] * 4, []

        def client(seed):
            try:
                for turn in range(40):
                    with lock:
                        slot = vattention.alloc_new_batch_idx(8 + (seed + turn) % 9)
                        if slot == -1:
                            continue
                        lens[slot] = 8 + (seed + turn) % 9
                        vattention.step_async(list(lens))
                    tensors[seed % 4][slot, : lens[slot]] = seed
                    vattention.num_free_kvblocks()
                    assert tensors[seed % 4][slot, : lens[slot]].eq(seed).all()
                    with lock:
                        vattention.free_batch_idx(slot)
                        lens[slot] = 0
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        check()
        assert vattention.num_free_kvblocks() == 24

    def test_2_lengths_are_the_callers_own(self):
        init()
        reserve(16)
        lens = [8, 0, 0, 0]
        vattention.step_async(lens)
        lens[1] = 64
        assert vattention.num_free_kvblocks() == 15
        assert vattention.alloc_new_batch_idx(4) == 1

    def test_3_too_little_memory_in_step_async_is_a_python_error(self):
        init()
        reserve(2)
        vattention.step_async([16, 0, 0, 0])
        results = []

        def other():
            results.append(vattention.num_free_kvblocks())

        for _ in range(20):
            with pytest.raises(RuntimeError) as caught:  # what users of the original catch
                vattention.step_async([17, 8, 0, 0])
            assert isinstance(caught.value, OutOfPagesError)
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        assert results == [0] * 20
        vattention.step_async([16, 0, 0, 0])

    def test_4_best_fit_prefers_the_warm_slot_that_fits(self):
        init()
        reserve(20)
        vattention.step([0, 64, 24, 8])
        for slot in (1, 2, 3):
            vattention.free_batch_idx(slot)
        assert mapped() == [0, 8, 3, 1]
        assert vattention.alloc_new_batch_idx(17) == 2  # not the empty slot 0, nor the largest
        assert vattention.alloc_new_batch_idx(17) == 1
        assert vattention.alloc_new_batch_idx(17) == 3  # none fits: it has to map the fewest
        assert vattention.alloc_new_batch_idx(17) == 0

    def test_5_any_length_puts_each_slot_on_pages_of_its_own(self):
        tensors = vattention.init_kvcache(
            *(1, 8, 128, 8, 1000, "cpu", torch.float16, 65536), driver="host"
        )
        assert tensors[0].shape == (8, 1000, 8, 128)
        vattention.reserve_physical_pages(8 << 20)
        vattention.step([0] * 7 + [200])  # the last slot alone; its rows fault if they are not
        assert mapped() == [0] * 7 + [7]
        assert tensors[0][7].data_ptr() % 65536 == 0
        assert vattention._cache._elastic.committed_bytes == 7 * 2 * 65536  # and no page more
        for idx, tensor in enumerate(tensors):
            tensor[7, :200] = torch.arange(200).view(200, 1, 1) + idx
        vattention.step([50] * 7 + [200])
        for tensor in tensors:
            tensor[:7, :50] = -1
        for idx, tensor in enumerate(tensors):
            assert tensor[7, :200, 0, 0].tolist() == [row + idx for row in range(200)]
        check()

    def test_6_a_length_beyond_the_maximum_is_an_error(self):
        init()
        reserve(40)
        with pytest.raises(ConfigError, match=r"seqlen is 65; it must be between 1 and .*, 64"):
            vattention.alloc_new_batch_idx(65)
        for step in (vattention.step, vattention.step_async):
            with pytest.raises(ConfigError, match=r"seq_lens\[1\] is 65; .* 64"):
                step([0, 65, 0, 0])
        vattention.step_async([0, 64, 0, 0])  # at the end there is nothing ahead
        assert mapped() == [0, 8, 0, 0]

    def test_7_common_pages_are_counted(self):
        tensors = init()
        reserve(8)
        vattention.map_common_pages(13)
        check()
        assert mapped() == [2] * BATCH
        assert vattention.num_free_kvblocks() == 6
        vattention.step([16, 16, 20, 0])
        for idx, tensor in enumerate(tensors):
            tensor[0, :16] = idx
            assert tensor[3, :16].eq(idx).all()
            tensor[2, 16:20] = 50 + idx
        with pytest.raises(ConfigError, match="while no slot has pages yet"):
            vattention.map_common_pages(13)
        vattention.step([0, 0, 20, 0], True)
        check()
        assert vattention.num_free_kvblocks() == 5  # the others held nothing of their own
        vattention.step([0, 0, 0, 0], True)
        check()
        assert vattention.num_free_kvblocks() == 8
        # No page is given out twice.
        vattention.step([32, 32, 0, 0])
        for idx, tensor in enumerate(tensors):
            tensor[0, :32], tensor[1, :32] = idx, -idx
        assert all(tensor[0, :32].eq(idx).all() for idx, tensor in enumerate(tensors))
        check()

    @pytest.mark.parametrize("fault", [_core.Fault.OUT_OF_MEMORY, _core.Fault.ERROR], ids=str)
    def test_7_common_pages_that_cannot_all_be_mapped_are_given_back(self, fault):
        for call in range(30):
            driver = _core.FaultDriver(make_driver())
            tensors = init(driver=driver)
            reserve(8)
            driver.fail_call(call, fault)
            try:
                vattention.map_common_pages(13)
                break
            except (OutOfPagesError, DriverError):
                pass
            driver.fail_call(0, _core.Fault.NONE)
            check()
            assert (mapped(), vattention.num_free_kvblocks()) == ([0] * BATCH, 8)
            vattention.step([8, 8, 0, 0])
            tensors[0][0, :8], tensors[0][1, :8] = 1, 2
            assert tensors[0][0, :8].eq(1).all()  # the two are not the same memory
            vattention.cleanup()
        assert call >= 12

    def test_8_slots_that_lack_pages_do_not_make_more_of_them(self):
        init()
        reserve(4)
        vattention.alloc_new_batch_idx(64)  # wants 8 blocks, and has none yet
        assert vattention.num_free_kvblocks() == 0
        with pytest.raises(OutOfPagesError):
            vattention.step([64, 0, 0, 0])

    def test_8_a_page_may_be_smaller_than_a_token(self):
        tensors = init(batch=2, length=10, layers=3, heads=9, size=100, megacache=True)
        assert tensors[0].stride(1) * 2 == 5400  # bytes a token; a page has 4096
        reserve(20)
        vattention.step([7, 3])
        assert mapped() == [10, 4]
        for idx, tensor in enumerate(tensors):
            tensor[0, :7], tensor[1, :3] = idx + 1, idx + 5
        assert all(tensor[0, :7].eq(idx + 1).all() for idx, tensor in enumerate(tensors))
        check()

    def test_9_cleanup_may_come_at_any_time(self):
        vattention.cleanup()
        init()
        vattention.cleanup()
        vattention.cleanup()
        tensors = init()
        reserve(8)
        vattention.step_async([20, 0, 0, 0])
        tensors[0][0, :20] = 3
        vattention.cleanup()
        assert tensors[0].shape == (BATCH, LENGTH, HEADS, SIZE)  # its addresses are still its own

    def test_10_a_new_sequence_finds_nothing_of_the_last_one(self):
        tensors = init(zero_on_reuse=True)
        reserve(8)
        for _ in range(3):
            slot = vattention.alloc_new_batch_idx(20)
            lens = [20 if other == slot else 0 for other in range(BATCH)]
            vattention.step(lens)
            assert all(tensor[slot, :24].eq(0).all() for tensor in tensors)
            for tensor in tensors:
                tensor[slot, :24] = 9
            vattention.free_batch_idx(slot)
        # Nor does one that came without alloc_new_batch_idx.
        vattention.step([0, 20, 0, 0])
        assert all(tensor[1, :20].eq(0).all() for tensor in tensors)
        for tensor in tensors:
            tensor[1, :20] = 9
        vattention.step([0, 0, 0, 0])
        vattention.step([0, 5, 0, 0])
        assert all(tensor[1, :20].eq(0).all() for tensor in tensors)
        vattention.step([0, 20, 0, 0])
        for tensor in tensors:
            tensor[1, :20] = 9
        # Pages that move to another slot are cleared as well.
        vattention.step([0, 0, 0, 0], True)
        vattention.step([40, 20, 0, 0])
        assert all(tensor[:2, :20].eq(0).all() for tensor in tensors)

    def test_10_the_engine_can_give_memory_back(self):
        init()
        reserve(8)
        vattention.step([16, 24, 0, 0])
        vattention.free_batch_idx(1)
        vattention.release_kvcache_physical()
        assert vattention._cache._elastic.created_bytes == 2 * 4 * PAGE
        assert vattention.num_free_kvblocks() == 6
        vattention.step([16, 24, 0, 0])


def test_9_addresses_are_freed_with_the_last_tensor(lazy):
    tensors = init()
    vattention.cleanup()
    before = lazy.calls("cuMemAddressFree")
    assert lazy.leaks > 0
    del tensors
    gc.collect()
    assert lazy.calls("cuMemAddressFree") - before >= 2 * LAYERS


def test_10_pages_that_a_kernel_reads_are_not_unmapped(lazy):
    tensors = init()
    reserve(8)
    vattention.step([64, 0, 0, 0])
    for tensor in tensors:
        lazy.touch(tensor.data_ptr(), 64 * 512)
    vattention.step([0, 8, 0, 0], True)  # takes all of slot 0's, and needs some of them
    assert lazy.run_stream() == 0
    assert mapped() == [0, 1, 0, 0]


def test_10_without_the_fence_they_would_be(lazy):
    """The test above can fail."""
    driver = _core.FaultDriver(make_driver())
    tensors = init(driver=driver)
    reserve(8)
    vattention.step([64, 0, 0, 0])
    driver.ignore_fences(True)
    lazy.touch(tensors[0].data_ptr(), 64 * 512)
    vattention.step([0, 0, 0, 0], True)
    assert lazy.run_stream() == 700
    with pytest.raises(DriverError):
        vattention.cleanup()
    del tensors, driver
    gc.collect()
    lazy.reset()
    lazy.start()


@pytest.mark.parametrize("lookahead", [0, 24])
def test_11_a_kernel_may_read_as_far_as_was_said(lazy, lookahead):
    tensors = init(lookahead_tokens=lookahead)
    reserve(32)
    vattention.step([16, 0, 0, 0])
    lazy.touch(tensors[0].data_ptr(), (16 + lookahead) * 512)
    assert lazy.run_stream() == 0
    vattention.step([50, 0, 0, 0])
    lazy.touch(tensors[0].data_ptr(), min(50 + lookahead, LENGTH) * 512)
    assert lazy.run_stream() == 0


def test_11_rows_beyond_that_are_not_mapped(lazy):
    tensors = init()
    reserve(32)
    vattention.step([16, 0, 0, 0])
    lazy.touch(tensors[0].data_ptr(), (16 + 24) * 512)
    assert lazy.run_stream() == 700
    with pytest.raises(DriverError):
        vattention.cleanup()
    del tensors
    gc.collect()
    lazy.reset()
    lazy.start()


def test_a_forked_child_hears_that_it_has_no_cache():
    tensors = init(driver="host")
    reserve(8)
    vattention.step_async([16, 0, 0, 0])
    tensors[0][0, :16] = 1
    child = os.fork()
    if child == 0:
        status = 1
        try:
            vattention.step([16, 0, 0, 0])
        except ClosedError:
            status = 0
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    vattention.step_async([17, 0, 0, 0])
    assert tensors[0][0, :16].eq(1).all()


def test_a_forked_child_may_begin_anew():
    init(driver="host")
    reserve(8)
    vattention.step_async([16, 0, 0, 0])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            vattention.cleanup()
            tensors = init(driver="host")
            reserve(8)
            vattention.step_async([16, 0, 0, 0])
            tensors[0][0, :16] = 1
            vattention.cleanup()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    vattention.step_async([17, 0, 0, 0])


def test_an_error_that_ends_the_thread_is_reported_once():
    init(driver="host")
    reserve(8)
    vattention._cache._ahead = vattention._cache._thread.submit(lambda: [][1])
    with pytest.raises(IndexError):
        vattention.num_free_kvblocks()
    assert vattention.num_free_kvblocks() == 8
    vattention.cleanup()


def test_of_two_threads_that_begin_one_has_the_cache():
    barrier, results = threading.Barrier(4), []

    def begin():
        barrier.wait()
        try:
            results.append(len(init(driver="host")))
        except ConfigError:
            results.append(None)

    threads = [threading.Thread(target=begin) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results, key=str) == [2 * LAYERS, None, None, None]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_device_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"device is 'cuda:0'; torch .* sees 0 CUDA devices"):
        vattention.init_kvcache(1, 1, 64, 2, 64, 0, torch.float16, 2 << 20, False)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", None, 1.5, -1, "cuda:-1"])
def test_a_device_that_cannot_be_is_named(device):
    with pytest.raises(ConfigError, match="device is"):
        vattention.init_kvcache(1, 1, 64, 2, 64, device, torch.float16, 2 << 20, False)
