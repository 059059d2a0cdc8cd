"""Lazy streams: nothing runs before somebody waits, and what runs finds memory as it is then."""

import ctypes

import pytest

from tests.fakecuda import (
    ILLEGAL_ADDRESS,
    INVALID_CONTEXT,
    INVALID_HANDLE,
    INVALID_VALUE,
    NOT_READY,
    READ,
    SUCCESS,
    FakeCuda,
)

GRANULE = 64 << 10
NON_BLOCKING = 1


@pytest.fixture
def base(cuda: FakeCuda) -> int:
    """8 granules of address space, the first four mapped and all zeros."""
    base = cuda.reserve(8 * GRANULE)
    for index in range(4):
        cuda.map_new(base + index * GRANULE, GRANULE)
    ctypes.memset(base, 0, 4 * GRANULE)
    return base


def fill(cuda: FakeCuda, address: int, value: int, stream: int = 0) -> None:
    cuda.check("cuMemsetD8Async", address, value, GRANULE, stream)


def new_stream(cuda: FakeCuda, flags: int = NON_BLOCKING) -> int:
    return cuda.value("cuStreamCreate", flags)


def new_event(cuda: FakeCuda) -> int:
    return cuda.value("cuEventCreate", 2)


def byte(address: int) -> int:
    return ctypes.string_at(address, 1)[0]


def test_work_waits_for_a_synchronize(cuda: FakeCuda, base: int) -> None:
    stream = new_stream(cuda)
    fill(cuda, base, 1, stream)
    cuda.check("cuMemcpyDtoDAsync_v2", base + GRANULE, base, GRANULE, stream)
    assert cuda.pending(stream) == 2
    assert byte(base) == 0
    assert cuda.code("cuStreamQuery", stream) == NOT_READY
    cuda.check("cuStreamSynchronize", stream)
    assert (byte(base), byte(base + GRANULE)) == (1, 1)
    assert cuda.code("cuStreamQuery", stream) == SUCCESS


@pytest.mark.parametrize("unmaps_early", [True, False])
@pytest.mark.parametrize("work", ["launch", "memset", "copy", "read back"])
def test_unmapping_before_the_wait_is_700(
    cuda: FakeCuda, base: int, work: str, unmaps_early: bool
) -> None:
    target = ctypes.create_string_buffer(GRANULE)
    stream = new_stream(cuda)
    if work == "launch":
        cuda.touch(base, GRANULE, stream=stream)
    elif work == "memset":
        fill(cuda, base, 1, stream)
    elif work == "copy":
        cuda.check("cuMemcpyDtoDAsync_v2", base + GRANULE, base, GRANULE, stream)
    else:
        cuda.check("cuMemcpyDtoHAsync_v2", target, base, GRANULE, stream)
    if unmaps_early:
        cuda.check("cuMemUnmap", base, GRANULE)
    expected = ILLEGAL_ADDRESS if unmaps_early else SUCCESS
    assert cuda.code("cuStreamSynchronize", stream) == expected
    assert cuda.code("cuCtxSynchronize") == expected
    if not unmaps_early:
        cuda.check("cuMemUnmap", base, GRANULE)


def test_an_illegal_address_sticks_until_reset(cuda: FakeCuda, base: int) -> None:
    cuda.touch(base + 4 * GRANULE, 1)  # never mapped: a launch finds out when it runs
    assert cuda.code("cuStreamSynchronize", 0) == ILLEGAL_ADDRESS
    assert "launch reads" in cuda.reason
    for call, arguments in (
        ("cuMemUnmap", (base, GRANULE)),
        ("cuStreamSynchronize", (0,)),
        ("cuMemRelease", (1,)),
        ("cuDevicePrimaryCtxRelease_v2", (0,)),
        ("fakecuda_run_stream", (0,)),
    ):
        assert cuda.code(call, *arguments) == ILLEGAL_ADDRESS
    name = ctypes.c_char_p()
    cuda.check("cuGetErrorName", ILLEGAL_ADDRESS, ctypes.byref(name))
    assert name.value == b"CUDA_ERROR_ILLEGAL_ADDRESS"
    cuda.check("cuCtxSetCurrent", cuda.value("cuCtxGetCurrent"))
    cuda.reset()
    cuda.start()
    cuda.check("cuCtxSynchronize")


def test_access_is_checked_by_the_way_it_is_used(cuda: FakeCuda, base: int) -> None:
    cuda.set_access(base, GRANULE, READ)
    cuda.touch(base, 2 * GRANULE)
    cuda.check("cuStreamSynchronize", 0)
    cuda.touch(base + GRANULE, GRANULE, write=True)
    cuda.check("cuStreamSynchronize", 0)
    cuda.touch(base, 1, write=True)
    assert cuda.code("cuStreamSynchronize", 0) == ILLEGAL_ADDRESS


def test_copies_check_ranges_at_the_call(cuda: FakeCuda, base: int) -> None:
    unmapped, host = base + 4 * GRANULE, ctypes.create_string_buffer(16)
    assert cuda.code("cuMemsetD8Async", unmapped, 0, 1, 0) == INVALID_VALUE
    assert cuda.code("cuMemcpyDtoDAsync_v2", base, unmapped - 1, 2, 0) == INVALID_VALUE
    assert cuda.code("cuMemcpyDtoHAsync_v2", base, base, 1, 0) == INVALID_VALUE  # not host memory
    assert cuda.code("cuMemcpyHtoD_v2", base, None, 1) == INVALID_VALUE
    assert cuda.code("cuMemcpyDtoH_v2", host, unmapped, 1) == INVALID_VALUE
    assert cuda.code("cuMemsetD8Async", base, 0, 1, 77) == INVALID_HANDLE
    cuda.check("cuMemsetD8Async", base, 0, 0, 0)  # nothing to do is fine
    assert cuda.pending() == 0


def test_synchronous_copies_run_the_legacy_stream(cuda: FakeCuda, base: int) -> None:
    fill(cuda, base, 9)
    host = ctypes.create_string_buffer(4)
    cuda.check("cuMemcpyDtoH_v2", host, base, 4)
    assert host.raw == b"\t" * 4
    cuda.check("cuMemcpyHtoD_v2", base, b"abcd", 4)
    assert ctypes.string_at(base, 4) == b"abcd"


def test_host_copies_are_lazy_and_need_their_host_memory(cuda: FakeCuda, base: int) -> None:
    host = cuda.value("cuMemHostAlloc", GRANULE, 0)
    ctypes.memset(host, 1, GRANULE)
    cuda.check("cuMemcpyHtoDAsync_v2", base, host, GRANULE, 0)
    ctypes.memset(host, 2, GRANULE)  # too early: the copy has not run
    cuda.check("cuStreamSynchronize", 0)
    assert byte(base) == 2
    cuda.check("cuMemcpyDtoHAsync_v2", host, base, GRANULE, 0)
    cuda.check("cuMemFreeHost", host)
    assert cuda.code("cuStreamSynchronize", 0) == ILLEGAL_ADDRESS


def test_an_event_is_ready_when_its_work_ran(cuda: FakeCuda, base: int) -> None:
    stream, event = new_stream(cuda), new_event(cuda)
    assert cuda.code("cuEventQuery", event) == SUCCESS  # never recorded
    fill(cuda, base, 1, stream)
    cuda.check("cuEventRecord", event, stream)
    fill(cuda, base, 2, stream)
    assert [cuda.code("cuEventQuery", event) for _ in range(5)] == [NOT_READY] * 5
    cuda.check("cuEventSynchronize", event)
    assert (byte(base), cuda.pending(stream)) == (1, 1)  # up to the event, no further
    assert cuda.code("cuEventQuery", event) == SUCCESS
    cuda.check("cuEventRecord", event, stream)
    assert cuda.code("cuEventQuery", event) == NOT_READY
    assert cuda.run_stream(stream) == SUCCESS
    assert cuda.code("cuEventQuery", event) == SUCCESS
    cuda.check("cuEventDestroy_v2", event)
    assert cuda.code("cuEventQuery", event) == INVALID_HANDLE


def test_queries_can_let_work_run(cuda: FakeCuda, base: int) -> None:
    cuda.ctl("query_runs=3")
    event = new_event(cuda)
    for _ in range(2):
        fill(cuda, base, 1)
        cuda.check("cuEventRecord", event, 0)
        codes = [cuda.code("cuEventQuery", event) for _ in range(4)]
        assert codes == [NOT_READY, NOT_READY, SUCCESS, SUCCESS]
    fill(cuda, base, 1)
    assert [cuda.code("cuStreamQuery", 0) for _ in range(3)] == [NOT_READY, NOT_READY, SUCCESS]


def test_waiting_streams_run_what_they_wait_for(cuda: FakeCuda, base: int) -> None:
    producer, consumer, event = new_stream(cuda), new_stream(cuda), new_event(cuda)
    fill(cuda, base, 1, producer)
    cuda.check("cuEventRecord", event, producer)
    fill(cuda, base, 2, producer)
    cuda.check("cuStreamWaitEvent", consumer, event, 0)
    cuda.check("cuEventRecord", event, producer)  # a later record does not change the wait
    cuda.check("cuEventDestroy_v2", event)
    cuda.check("cuMemcpyDtoDAsync_v2", base + GRANULE, base, GRANULE, consumer)
    cuda.check("cuStreamSynchronize", consumer)
    assert byte(base + GRANULE) == 1
    assert cuda.pending(producer) == 2


def test_without_a_wait_streams_are_independent(cuda: FakeCuda, base: int) -> None:
    first, second = new_stream(cuda), new_stream(cuda)
    fill(cuda, base, 1, first)
    cuda.check("cuMemcpyDtoDAsync_v2", base + GRANULE, base, GRANULE, second)
    cuda.check("cuStreamSynchronize", second)
    assert (byte(base + GRANULE), cuda.pending(first)) == (0, 1)


def test_long_chains_of_waits(cuda: FakeCuda, base: int) -> None:
    streams = [new_stream(cuda), new_stream(cuda)]
    event = new_event(cuda)
    for index in range(3000):
        fill(cuda, base, index % 251, streams[index % 2])
        cuda.check("cuEventRecord", event, streams[index % 2])
        cuda.check("cuStreamWaitEvent", streams[(index + 1) % 2], event, 0)
    cuda.check("cuEventSynchronize", event)
    assert byte(base) == 2999 % 251


@pytest.mark.parametrize("special", [0, 1, 2])
def test_the_legacy_stream_keeps_blocking_streams_in_order(
    cuda: FakeCuda, base: int, special: int
) -> None:
    blocking, free = new_stream(cuda, 0), new_stream(cuda)
    fill(cuda, base, 1, blocking)
    fill(cuda, base + 2 * GRANULE, 1, free)
    cuda.check("cuMemcpyDtoDAsync_v2", base + GRANULE, base, GRANULE, special)
    fill(cuda, base, 2, blocking)
    cuda.check("cuStreamSynchronize", special)
    assert (byte(base), byte(base + GRANULE)) == (1, 1)
    assert (cuda.pending(blocking), cuda.pending(free)) == (1, 1)
    fill(cuda, base + GRANULE, 3, special)
    cuda.check("cuMemcpyDtoDAsync_v2", base, base + GRANULE, GRANULE, blocking)
    cuda.check("cuStreamSynchronize", blocking)  # runs the legacy stream's work before it
    assert byte(base) == 3


def test_a_destroyed_stream_still_finishes(cuda: FakeCuda, base: int) -> None:
    stream, event = new_stream(cuda), new_event(cuda)
    fill(cuda, base, 5, stream)
    cuda.check("cuEventRecord", event, stream)
    leaks = cuda.leaks
    cuda.check("cuStreamDestroy_v2", stream)
    assert cuda.leaks == leaks - 1
    assert cuda.code("cuStreamSynchronize", stream) == INVALID_HANDLE
    assert cuda.code("cuEventQuery", event) == NOT_READY
    cuda.check("cuCtxSynchronize")
    assert (byte(base), cuda.code("cuEventQuery", event)) == (5, SUCCESS)
    assert cuda.code("cuStreamDestroy_v2", 0) == INVALID_HANDLE


def test_handles_die_with_their_context(cuda: FakeCuda) -> None:
    stream, event = new_stream(cuda), new_event(cuda)
    cuda.check("cuDevicePrimaryCtxRelease_v2", 0)
    cuda.start()
    assert cuda.code("cuStreamSynchronize", stream) == INVALID_HANDLE
    assert cuda.code("cuEventQuery", event) == INVALID_HANDLE
    assert cuda.leaks == 2  # a real driver would take them back; here whoever forgot is told


def test_flags_are_checked(cuda: FakeCuda) -> None:
    result, event = ctypes.c_uint64(), new_event(cuda)
    assert cuda.code("cuStreamCreate", ctypes.byref(result), 2) == INVALID_VALUE
    assert cuda.code("cuEventCreate", ctypes.byref(result), 8) == INVALID_VALUE
    assert cuda.code("cuEventCreate", ctypes.byref(result), 4) == INVALID_VALUE  # needs no timing
    assert cuda.code("cuMemHostAlloc", ctypes.byref(result), 1, 8) == INVALID_VALUE
    assert cuda.code("cuStreamWaitEvent", 0, event, 1) == INVALID_VALUE


def test_streams_need_a_context(cuda: FakeCuda, base: int) -> None:
    event = new_event(cuda)
    result = ctypes.c_uint64()
    cuda.check("cuCtxSetCurrent", None)
    for call, arguments in (
        ("cuStreamCreate", (ctypes.byref(result), 0)),
        ("cuEventCreate", (ctypes.byref(result), 0)),
        ("cuEventRecord", (event, 0)),
        ("cuMemsetD8Async", (base, 0, 1, 0)),
        ("cuMemcpyDtoDAsync_v2", (base, base, 1, 0)),
        ("cuStreamSynchronize", (0,)),
        ("cuMemHostAlloc", (ctypes.byref(result), 1, 0)),
    ):
        assert cuda.code(call, *arguments) == INVALID_CONTEXT
    cuda.touch(base, GRANULE)  # a test's launch brings its own


def test_eager_mode(cuda: FakeCuda, base: int) -> None:
    cuda.ctl("lazy=0")
    fill(cuda, base, 1)
    assert (byte(base), cuda.pending()) == (1, 0)
    cuda.check("cuMemUnmap", base, GRANULE)
    assert cuda.code("fakecuda_touch", 0, base, 1, 0) == ILLEGAL_ADDRESS
