"""Random operations on a KV cache against a dict model that knows the contents of every row."""

import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from vmalloc import KVCacheConfig, LayerKVSpec, SequenceGroupSpec, VirtualKVCache, _core

MAX_LEN = 96
CONFIGS = {
    # Rows of 4,800 bytes do not divide a page: they straddle, and pages end mid-row.
    "odd": {
        "layers": (LayerKVSpec(num_kv_heads=3, k_head_dim=40, v_head_dim=40),) * 5,
        "page_bytes": 4096,
        "capacity_bytes": 4096 * 150,
    },
    "odd, per layer": {
        "layers": (LayerKVSpec(num_kv_heads=3, k_head_dim=40, v_head_dim=40),) * 5,
        "layers_per_group": 1,
        "page_bytes": 4096,
        "capacity_bytes": 4096 * 150,
    },
    "split, uneven dims, pairs": {
        "layers": (LayerKVSpec(num_kv_heads=2, k_head_dim=24, v_head_dim=16, dtype="bfloat16"),)
        * 5,
        "layers_per_group": 2,
        "kv_split": True,
        "page_bytes": 8192,
        "capacity_bytes": 8192 * 40,
        "zero_on_reuse": True,
    },
    "plain, tight": {
        "layers": (LayerKVSpec(num_kv_heads=2, k_head_dim=64, v_head_dim=64),) * 4,
        "page_bytes": 16384,
        "capacity_bytes": 16384 * 30,
        "high_watermark": 0.5,
    },
}


class KVCacheMachine(RuleBasedStateMachine):
    """Rows get values that no other row ever had; every live row is compared after each rule."""

    seqs = Bundle("seqs")

    @initialize(
        name=st.sampled_from(sorted(CONFIGS)),
        commit_ahead=st.sampled_from([0, 3, 20]),
    )
    def start(self, name, commit_ahead):
        self.driver = _core.FaultDriver(_core.make_host_driver(CONFIGS[name]["page_bytes"]))
        self.cache = VirtualKVCache(
            KVCacheConfig(
                **CONFIGS[name],
                max_num_seqs=6,
                num_slots=8,
                max_seq_len=MAX_LEN,
                commit_ahead_tokens=commit_ahead,
            ),
            driver=self.driver,
        )
        self.views = [
            view
            for i in range(5 if "plain" not in name else 4)
            for view in self.cache.layer_views(i)
        ]
        self.model = {}  # seq_id -> one value per row, or None where nothing was written
        self.next_seq_id = 0
        self.next_value = 1
        self.step = None

    @rule(target=seqs, count=st.integers(1, 3), num_tokens=st.integers(0, MAX_LEN))
    def admit(self, count, num_tokens):
        ids = tuple(range(self.next_seq_id, self.next_seq_id + count))
        reservation = self.cache.try_admit(SequenceGroupSpec(ids, num_tokens))
        if reservation is None:
            return multiple()
        self.next_seq_id += count
        assert reservation.seq_ids == ids
        assert len(set(reservation.slots)) == count
        for seq_id in ids:
            self.model[seq_id] = [None] * num_tokens
            self._write(seq_id, 0)
        return multiple(*ids)

    @rule(seq_id=seqs, more=st.integers(0, 40))
    def extend(self, seq_id, more):
        self._extend([seq_id], [more])

    @rule(more=st.integers(0, 9))
    def extend_all(self, more):
        self._extend(list(self.model), [more] * len(self.model))

    def _extend(self, seq_ids, more):
        before = [len(self.model[seq_id]) for seq_id in seq_ids]
        after = [min(n + m, MAX_LEN) for n, m in zip(before, more, strict=True)]
        if not self.cache.try_extend(seq_ids, after):
            return
        for seq_id, old, new in zip(seq_ids, before, after, strict=True):
            self.model[seq_id] += [None] * (new - old)
            self._write(seq_id, old)

    @rule(seq_id=seqs, share=st.floats(0, 1))
    def truncate(self, seq_id, share):
        num_tokens = int(share * len(self.model[seq_id]))
        self.cache.truncate(seq_id, num_tokens)
        del self.model[seq_id][num_tokens:]

    @rule(seq_id=consumes(seqs))
    def free(self, seq_id):
        self.cache.free([seq_id])
        del self.model[seq_id]

    @rule(num_tokens=st.integers(1, MAX_LEN))
    def prefetch(self, num_tokens):
        self.cache.prefetch(num_tokens)

    @rule(keep=st.integers(0, 5))
    def trim(self, keep):
        self.cache.trim(keep)

    @rule(share=st.sampled_from([0.5, 0.8, 1.0]))
    def resize(self, share):
        self.cache.resize(int(self.cache.config.capacity_bytes * share))

    @rule(hold=st.booleans())
    def hold_fences(self, hold):
        self.driver.hold_fences(hold)

    @precondition(lambda self: self.step is None)
    @rule()
    def begin_step(self):
        self.step = self.cache.begin_step()

    @precondition(lambda self: self.step is not None)
    @rule()
    def end_step(self):
        self.cache.end_step(self.step)
        self.step = None

    @rule()
    def wait_worker(self):
        self.cache.wait_worker()

    @invariant()
    def books_balance(self):
        if not hasattr(self, "cache"):
            return
        self.cache.check_invariants()
        stats = self.cache.stats()
        assert stats.num_live_seqs == len(self.model)
        token_bytes = self.cache.config.token_bytes
        assert stats.live_bytes == token_bytes * sum(map(len, self.model.values()))
        assert stats.committed_bytes == sum(
            self.cache.bytes_for(len(rows)) for rows in self.model.values()
        )

    @invariant()
    def every_row_is_as_written(self):
        if not hasattr(self, "cache"):
            return
        for seq_id, rows in self.model.items():
            slot = self.cache.slot_of(seq_id)
            expected = torch.tensor(rows, dtype=torch.float32)
            for i, view in enumerate(self.views):
                written = view[slot, : len(rows)].float()
                assert torch.equal(written, (expected + i)[:, None, None].expand_as(written))

    def _write(self, seq_id, first):
        rows = self.model[seq_id]
        for row in range(first, len(rows)):
            rows[row] = self.next_value
            self.next_value = self.next_value % 240 + 1  # exact in bfloat16, offset included
        values = torch.tensor(rows[first:], dtype=torch.float32)
        slot = self.cache.slot_of(seq_id)
        for i, view in enumerate(self.views):
            view[slot, first : len(rows)] = (values + i)[:, None, None].to(view.dtype)

    def teardown(self):
        if hasattr(self, "cache"):
            self.driver.hold_fences(False)
            self.cache.close()
            counters = self.driver.counters()
            assert counters["create_calls"] == counters["destroy_calls"]


TestKVCacheModel = KVCacheMachine.TestCase
TestKVCacheModel.__test__ = True
