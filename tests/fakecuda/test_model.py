"""Random driver calls against a model of plain dicts, and threads that leave each other alone."""

import ctypes
import random
import threading
from dataclasses import dataclass, field

from tests.fakecuda import (
    INVALID_VALUE,
    NO_ACCESS,
    OUT_OF_MEMORY,
    READ,
    READ_WRITE,
    SUCCESS,
    AllocationProperties,
    FakeCuda,
)

GRANULE = 64 << 10
CAPACITY = 32  # granules; few, so that running out is common
NUM_OPERATIONS = 20_000
POISON = 0xFF


@dataclass
class Allocation:
    contents: list[int]  # one value a granule
    num_references: int = 1
    num_mappings: int = 0


@dataclass(eq=False)
class Mapping:
    start: int  # granule of the reservation
    granules: int
    handle: int
    access: int = NO_ACCESS


@dataclass
class Model:
    """What the driver must say, and what memory must hold."""

    random: random.Random
    cuda: FakeCuda
    reservations: dict[int, list[Mapping | None]] = field(default_factory=dict)
    allocations: dict[int, Allocation] = field(default_factory=dict)
    handles: list[int] = field(default_factory=lambda: [1])  # ever seen; 1 never was one

    def used(self) -> int:
        return sum(len(allocation.contents) for allocation in self.allocations.values())

    def live(self, handle: int) -> Allocation | None:
        allocation = self.allocations.get(handle)
        return allocation if allocation and allocation.num_references else None

    def collect(self, handle: int) -> None:
        allocation = self.allocations[handle]
        if not allocation.num_references and not allocation.num_mappings:
            del self.allocations[handle]

    def pick_range(self) -> tuple[int, int, int]:
        base = self.random.choice(list(self.reservations))
        start = self.random.randrange(len(self.reservations[base]))
        return base, start, self.random.choice((1, 1, 2, 3, len(self.reservations[base])))

    def run_of(self, base: int, start: int, granules: int) -> list[Mapping] | None:
        """The mappings that make up exactly this range."""
        slots = self.reservations[base]
        run: list[Mapping] = []
        at = start
        while at < start + granules:
            mapping = slots[at] if at < len(slots) else None
            if mapping is None or mapping.start != at:
                return None
            run.append(mapping)
            at += mapping.granules
        return run if at == start + granules else None

    # Operations: each makes one call and checks its code -----------------------------------------
    def reserve(self) -> None:
        if len(self.reservations) < 6:
            granules = self.random.randint(1, 9)
            self.reservations[self.cuda.reserve(granules * GRANULE)] = [None] * granules

    def free(self) -> None:
        base = self.random.choice(list(self.reservations))
        granules = self.random.choice((len(self.reservations[base]), 3))
        is_fine = granules == len(self.reservations[base]) and not any(self.reservations[base])
        code = self.cuda.code("cuMemAddressFree", base, granules * GRANULE)
        assert code == (SUCCESS if is_fine else INVALID_VALUE)
        if is_fine:
            del self.reservations[base]

    def create(self) -> None:
        granules, handle = self.random.randint(1, 4), ctypes.c_uint64()
        properties = ctypes.byref(AllocationProperties())
        code = self.cuda.code(
            "cuMemCreate", ctypes.byref(handle), granules * GRANULE, properties, 0
        )
        if self.used() + granules > CAPACITY:
            assert code == OUT_OF_MEMORY
            return
        assert code == SUCCESS
        assert handle.value not in self.handles
        self.allocations[handle.value] = Allocation([POISON] * granules)
        self.handles = [*self.handles[-15:], handle.value]

    def release(self) -> None:
        handle = self.random.choice(self.handles)
        allocation = self.live(handle)
        code = self.cuda.code("cuMemRelease", handle)
        assert code == (SUCCESS if allocation else INVALID_VALUE)
        if allocation:
            allocation.num_references -= 1
            self.collect(handle)

    def retain(self) -> None:
        base, start, _ = self.pick_range()
        mapping = self.reservations[base][start]
        handle = ctypes.c_uint64()
        at = base + start * GRANULE + 77
        code = self.cuda.code("cuMemRetainAllocationHandle", ctypes.byref(handle), at)
        assert code == (SUCCESS if mapping else INVALID_VALUE)
        if mapping:
            assert handle.value == mapping.handle
            self.allocations[mapping.handle].num_references += 1

    def map(self) -> None:
        base, start, granules = self.pick_range()
        handle = self.random.choice(self.handles)
        allocation = self.live(handle)
        slots = self.reservations[base][start : start + granules]
        is_fine = (
            allocation is not None
            and granules <= len(allocation.contents)
            and slots == [None] * granules
        )
        at, num_bytes = base + start * GRANULE, granules * GRANULE
        code = self.cuda.code("cuMemMap", at, num_bytes, 0, handle, 0)
        assert code == (SUCCESS if is_fine else INVALID_VALUE)
        if is_fine and allocation:
            mapping = Mapping(start, granules, handle)
            self.reservations[base][start : start + granules] = [mapping] * granules
            allocation.num_mappings += 1

    def unmap(self) -> None:
        base, start, granules = self.pick_range()
        run = self.run_of(base, start, granules)
        code = self.cuda.code("cuMemUnmap", base + start * GRANULE, granules * GRANULE)
        assert code == (INVALID_VALUE if run is None else SUCCESS)
        for mapping in run or ():
            for index in range(mapping.start, mapping.start + mapping.granules):
                self.reservations[base][index] = None
            self.allocations[mapping.handle].num_mappings -= 1
            self.collect(mapping.handle)

    def set_access(self) -> None:
        base, start, granules = self.pick_range()
        run = self.run_of(base, start, granules)
        access = self.random.choice((NO_ACCESS, READ, READ_WRITE, READ_WRITE))
        code = self.cuda.access_code(base + start * GRANULE, granules * GRANULE, access)
        assert code == (INVALID_VALUE if run is None else SUCCESS)
        for mapping in run or ():
            mapping.access = access

    def use(self) -> None:
        """Reads a granule, and writes it if that is allowed, by the CPU and by memset."""
        base, start, _ = self.pick_range()
        mapping = self.reservations[base][start]
        if mapping is None or mapping.access == NO_ACCESS:
            return
        at = base + start * GRANULE
        contents = self.allocations[mapping.handle].contents
        offset = start - mapping.start
        assert ctypes.string_at(at + GRANULE - 2, 2) == bytes([contents[offset]]) * 2
        if mapping.access == READ_WRITE:
            value = contents[offset] = self.random.randrange(256)
            self.cuda.check("cuMemsetD8Async", at, value, GRANULE, 0)
            self.cuda.check("cuStreamSynchronize", 0)

    def num_leaks(self) -> int:
        mappings = {
            id(mapping) for slots in self.reservations.values() for mapping in slots if mapping
        }
        live = sum(1 for allocation in self.allocations.values() if allocation.num_references)
        return len(self.reservations) + len(mappings) + live


def test_random_calls_agree_with_the_model(cuda: FakeCuda) -> None:
    cuda.reset(mem_mb=CAPACITY * GRANULE >> 20, gran_kb=GRANULE >> 10)
    cuda.start()
    model = Model(random.Random(4), cuda)
    operations = [
        model.reserve, model.free, model.create, model.create, model.release, model.retain,
        model.map, model.map, model.map, model.unmap, model.set_access, model.set_access,
        model.use, model.use, model.use,
    ]  # fmt: skip
    for number in range(NUM_OPERATIONS):
        model.reserve() if not model.reservations else model.random.choice(operations)()
        if number % 64 == 0:
            assert cuda.used_bytes == model.used() * GRANULE
            assert cuda.leaks == model.num_leaks()
    calls = cuda.all_calls()
    assert min(calls[name] for name in ("cuMemMap", "cuMemUnmap", "cuMemSetAccess")) > 1000


def test_threads_do_not_disturb_each_other(cuda: FakeCuda) -> None:
    context = cuda.value("cuCtxGetCurrent")
    failures: list[str] = []

    def work(seed: int) -> None:
        chooser = random.Random(seed)
        try:
            cuda.check("cuCtxSetCurrent", context)
            stream = cuda.value("cuStreamCreate", 1)
            event = cuda.value("cuEventCreate", 2)
            base = cuda.reserve(4 * GRANULE)
            for _ in range(150):
                granules = chooser.randint(1, 4)
                for index in range(granules):
                    handle = cuda.map_new(base + index * GRANULE, GRANULE)
                    cuda.check("cuMemRelease", handle)
                value = chooser.randrange(255)
                cuda.check("cuMemsetD8Async", base, value, granules * GRANULE, stream)
                cuda.touch(base, granules * GRANULE, stream=stream)
                cuda.check("cuEventRecord", event, stream)
                cuda.check("cuEventSynchronize", event)
                at = chooser.randrange(granules * GRANULE)
                assert ctypes.string_at(base + at, 1)[0] == value
                cuda.check("cuMemUnmap", base, granules * GRANULE)
            cuda.check("cuMemAddressFree", base, 4 * GRANULE)
            cuda.check("cuEventDestroy_v2", event)
            cuda.check("cuStreamDestroy_v2", stream)
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert (cuda.leaks, cuda.used_bytes) == (0, 0)
