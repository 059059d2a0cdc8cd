"""Random operations on elastic tensors against a model that knows the contents of every row."""

from contextlib import ExitStack

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.drivers import PAGE, make_driver
from vmalloc import DriverError, _core, elastic_tensor

from .backends import stand_in_driver

NUM_ROWS = 60
COLUMNS = [150, 1024, 2500, 7]  # rows of a part of a page, of one, of two and a half; many a page
SPANS = st.tuples(st.integers(0, NUM_ROWS), st.integers(0, 25)).map(
    lambda pair: range(pair[0], min(pair[0] + pair[1], NUM_ROWS))
)
UNKNOWN = None  # what a row holds that was committed and not written yet


class ElasticMachine(RuleBasedStateMachine):
    """A committed row is a cell; rows that alias each other are the same one."""

    is_cuda = False

    @initialize(
        columns=st.sampled_from(COLUMNS),
        num_tensors=st.integers(1, 3),
        share=st.sampled_from([0.3, 0.7, 1.0]),
        spare=st.sampled_from([0, 5 * PAGE]),
        zero_on_reuse=st.booleans(),
    )
    def start(self, columns, num_tensors, share, spare, zero_on_reuse):
        self.stack = ExitStack()
        if self.is_cuda:
            self.stack.enter_context(stand_in_driver())
        self.driver = _core.FaultDriver(make_driver())
        self.row_bytes = columns * 4
        self.num_pages = -(-NUM_ROWS * self.row_bytes // PAGE)
        self.zero_on_reuse = zero_on_reuse
        self.elastic = elastic_tensor(
            (NUM_ROWS, columns),
            torch.float32,
            num_tensors=num_tensors,
            capacity_bytes=int(share * self.num_pages) * num_tensors * PAGE,
            spare_bytes=spare,
            zero_on_reuse=zero_on_reuse,
            driver=self.driver,
        )
        self.cells = {}  # row -> [value], shared by aliases
        self.is_held = False
        self.next_value = 1

    def attempt(self, call, *arguments):
        """What the call says; None if the injected error came out of it."""
        try:
            return call(*arguments)
        except DriverError as error:
            assert error.name == "INJECTED"
            return None
        finally:
            self.driver.fail_call(0, _core.Fault.NONE)
            self.driver.fail_release_call(1 << 40)

    def pages_of(self, rows):
        """Page indices that any of the rows lies in."""
        found = set()
        for row in rows:
            first, end = row * self.row_bytes, (row + 1) * self.row_bytes
            found.update(range(first // PAGE, -(-end // PAGE)))
        return found

    @rule(
        spans=st.lists(SPANS, min_size=1, max_size=3),
        fault=st.sampled_from([None, None, _core.Fault.OUT_OF_MEMORY, _core.Fault.ERROR]),
        call=st.integers(0, 8),
        release_call=st.sampled_from([None, None, 0, 1]),
    )
    def commit(self, spans, fault, call, release_call):
        if fault is not None:
            self.driver.fail_call(call, fault)
        if release_call is not None:
            self.driver.fail_release_call(release_call)
        before = self.elastic.committed_bytes
        done = self.attempt(self.elastic.commit, *spans)
        if done:
            for span in spans:
                for row in span:
                    self.cells.setdefault(row, [0 if self.zero_on_reuse else UNKNOWN])
            return
        assert self.elastic.committed_bytes == before
        if fault is None and release_call is None and not self.is_held:
            wanted = {*self.cells, *(row for span in spans for row in span)}
            num_pages = len(self.pages_of(wanted)) * len(self.elastic.tensors)
            assert done is False
            assert num_pages * PAGE > self.elastic.capacity_bytes or self.has_aliases()

    @rule(spans=st.lists(SPANS, min_size=1, max_size=3), fails=st.booleans())
    def decommit(self, spans, fails):
        if fails:
            self.driver.fail_release_call(0)
        self.attempt(self.elastic.decommit, *spans)
        for span in spans:
            for row in span:
                self.cells.pop(row, None)

    @precondition(lambda self: self.cells)
    @rule(data=st.data())
    def write(self, data):
        rows = data.draw(st.lists(st.sampled_from(sorted(self.cells)), min_size=1, max_size=9))
        for row in rows:
            for idx, tensor in enumerate(self.elastic.tensors):
                tensor[row] = self.next_value + idx * 0.25
            self.cells[row][0] = self.next_value
            self.next_value += 1

    @precondition(lambda self: self.row_bytes == PAGE and self.cells)
    @rule(data=st.data(), to=st.integers(0, NUM_ROWS - 1), length=st.integers(1, 5))
    def alias(self, data, to, length):
        first = data.draw(st.sampled_from(sorted(self.cells)))
        source = range(first, min(first + length, NUM_ROWS))
        end = min(to + len(source), NUM_ROWS)
        source = source[: end - to]
        if any(row not in self.cells for row in source):
            return
        if any(row in self.cells for row in range(to, end)):
            return
        done = self.attempt(self.elastic.alias, source, to)
        assert done or self.is_held
        if done:
            for idx, row in enumerate(source):
                self.cells[to + idx] = self.cells[row]

    @rule()
    def trim(self):
        self.attempt(self.elastic.trim)
        if not self.is_held:
            assert self.elastic.created_bytes == self.elastic.committed_bytes

    @rule(share=st.sampled_from([0.2, 0.6, 1.0]))
    def resize(self, share):
        num_pages = int(share * self.num_pages) * len(self.elastic.tensors)
        self.attempt(self.elastic.resize, num_pages * PAGE)

    @rule(num_pages=st.integers(0, 8))
    def create_spare(self, num_pages):
        before = self.elastic.created_bytes
        done = self.attempt(self.elastic.create_spare, num_pages * PAGE)
        if not done:
            assert self.elastic.created_bytes <= before

    @rule(hold=st.booleans())
    def hold_fences(self, hold):
        """Kernels of the device run on until they are let go."""
        self.driver.hold_fences(hold)
        self.is_held = hold

    def has_aliases(self):
        return len({id(cell) for cell in self.cells.values()}) < len(self.cells)

    @invariant()
    def rows_are_as_written(self):
        if not hasattr(self, "cells"):
            return
        for idx, tensor in enumerate(self.elastic.tensors):
            rows = sorted(row for row, cell in self.cells.items() if cell[0] is not UNKNOWN)
            values = torch.tensor([self.cells[row][0] for row in rows], dtype=torch.float32)
            values[values > 0] += idx * 0.25
            assert tensor[rows].eq(values.unsqueeze(1)).all()

    @invariant()
    def books_balance(self):
        if not hasattr(self, "cells"):
            return
        self.elastic.check_invariants()
        num_pages = len(self.pages_of(self.cells))
        if self.row_bytes == PAGE:
            num_pages = len({id(cell) for cell in self.cells.values()})
        assert self.elastic.committed_bytes == num_pages * len(self.elastic.tensors) * PAGE

    def teardown(self):
        if hasattr(self, "cells"):
            self.driver.hold_fences(False)
            self.elastic.close()
            del self.elastic, self.driver
            self.stack.close()


class CudaElasticMachine(ElasticMachine):
    is_cuda = True


TestElasticOnHost = ElasticMachine.TestCase
TestElasticOnCuda = CudaElasticMachine.TestCase
