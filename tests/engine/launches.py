"""A virtual cache whose kernels, over the stand-in driver, still read rows after their step.

The CPU computes at once, so what a GPU would do is said in the stand-in's own words: each step
launches a read of every row that its sequences have, and the device comes to it when the next step
begins (kernels run in the order of their launches). What is unmapped in between is error 700.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.fakecuda import FakeCuda
from vmalloc import KVCacheConfig, Step, VirtualKVCache, _core
from vmalloc.core_setup import make_driver


class LaunchingCache(VirtualKVCache):
    """Its driver is a ``FaultDriver`` around the one of the config.

    Attributes:
        is_slow: the device comes to nothing before somebody waits for it.
    """

    fake: FakeCuda
    num_launches = 0
    is_slow = False

    def __init__(self, config: KVCacheConfig) -> None:
        self.fault_driver = _core.FaultDriver(make_driver(config))
        super().__init__(config, driver=self.fault_driver)
        self._batch: Sequence[int] = ()

    def begin_step(self, stream: int | None = None) -> Step:
        if not self.is_slow:
            self.fake.run_stream()
        self._batch = ()
        return super().begin_step(stream)

    def batch_view(self, seq_ids: Sequence[int], *args: Any, **settings: Any) -> Any:
        self._batch = seq_ids
        return super().batch_view(seq_ids, *args, **settings)

    def end_step(self, step: Step) -> None:
        for seq_id in self._batch:
            self._launch(self.slot_of(seq_id), self.seq_len(seq_id))
        super().end_step(step)

    def _launch(self, slot: int, num_rows: int) -> None:
        layout = self.layout
        for layer_idx, place in enumerate(layout.placements):
            views = self.layer_views(layer_idx)
            for region, offset, view in (
                (place.k_region, place.k_offset, views[0]),
                (place.v_region, place.v_offset, views[1]),
            ):
                start = view.data_ptr() - offset + slot * layout.slot_bytes[region]
                self.fake.touch(start, num_rows * layout.row_bytes[region])
                type(self).num_launches += 1
