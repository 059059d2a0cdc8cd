"""vLLM's real block pool over our queue of free blocks, against a plain model."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, make_block_hash_with_group_id

from vmalloc.integrations.vllm.block_pool import ElasticBlockPool
from vmalloc.integrations.vllm.extents import Extents, Piece


def make_pool(num_blocks, blocks_per_extent):
    extents = Extents(
        num_blocks=num_blocks,
        num_bytes=num_blocks * 4096,
        pieces=(Piece(0, 4096),),
        page_bytes=4096 * blocks_per_extent,
        blocks_per_extent=blocks_per_extent,
    )
    pool = BlockPool(num_gpu_blocks=num_blocks, enable_caching=True, hash_block_size=16)
    return ElasticBlockPool.take_over(pool, extents)


def cache(pool, block, name):
    key = make_block_hash_with_group_id(BlockHash(str(name).encode()), 0)
    pool._insert_block_hash(key, block, num_tokens=16)


def lookup(pool, name):
    found = pool.get_cached_block(BlockHash(str(name).encode()), [0])
    return found[0] if found else None


def test_freed_blocks_come_before_blocks_without_memory():
    pool = make_pool(100, 1)
    first = pool.get_new_blocks(5)
    pool.free_blocks(first)
    again = pool.get_new_blocks(5)
    assert {block.block_id for block in again} == {block.block_id for block in first}
    assert pool.free_block_queue.num_backed == 6  # and the null block's


def test_cached_blocks_are_not_sacrificed_while_there_is_memory():
    pool = make_pool(100, 1)
    (block,) = pool.get_new_blocks(1)
    cache(pool, block, "prefix")
    pool.free_blocks([block])
    pool.get_new_blocks(50)
    assert lookup(pool, "prefix") is block
    pool.get_new_blocks(48)
    assert lookup(pool, "prefix") is block
    pool.get_new_blocks(1)
    assert lookup(pool, "prefix") is None


def test_trimming_forgets_the_prefixes_that_were_idle_longest():
    pool = make_pool(100, 4)
    taken = pool.get_new_blocks(3)  # the rest of the null block's extent
    groups = [pool.get_new_blocks(4) for _ in range(4)]
    for number, group in enumerate(groups):
        cache(pool, group[0], number)
        pool.free_blocks(group)
    queue = pool.free_block_queue
    assert queue.num_idle == 4
    pool.touch([lookup(pool, 0)])  # used again, and idle again last
    pool.free_blocks([lookup(pool, 0)])
    queue.take_changes()
    queue.trim(2)
    assert [lookup(pool, number) is not None for number in range(4)] == [True, False, False, True]
    assert queue.take_changes() == ((), (2, 3))
    assert taken


def test_a_limit_hides_blocks_and_eviction_goes_on_below_it():
    pool = make_pool(100, 1)
    pool.free_block_queue.limit = 11
    assert pool.get_num_free_blocks() == 10
    blocks = pool.get_new_blocks(10)
    for block in blocks:
        cache(pool, block, block.block_id)
    pool.free_blocks(blocks)
    assert pool.get_num_free_blocks() == 10
    pool.get_new_blocks(3)
    assert pool.free_block_queue.num_backed == 11
    with pytest.raises(ValueError, match="Cannot get"):
        pool.get_new_blocks(8)
    assert pool.get_usage() == pytest.approx(3 / 99)


def test_resetting_the_prefix_cache_works_below_a_limit():
    pool = make_pool(100, 4)
    pool.free_block_queue.limit = 3
    blocks = pool.get_new_blocks(7)
    assert not pool.reset_prefix_cache()
    pool.free_blocks(blocks)
    assert pool.reset_prefix_cache()
    assert pool.free_block_queue.limit == 3


class PoolMachine(RuleBasedStateMachine):
    """What is held, what is cached, and which extents a worker was told have memory."""

    @initialize(blocks_per_extent=st.integers(1, 5), num_blocks=st.integers(2, 40))
    def start(self, blocks_per_extent, num_blocks):
        self.pool = make_pool(num_blocks, blocks_per_extent)
        self.queue = self.pool.free_block_queue
        self.extents = self.queue._extents
        self.held = []
        self.names = {}
        self.next_name = 0
        self.worker = set()

    @rule(count=st.integers(1, 10))
    def allocate(self, count):
        count = min(count, self.pool.get_num_free_blocks())
        blocks = self.pool.get_new_blocks(count)
        assert len({block.block_id for block in blocks}) == count
        assert not {block.block_id for block in blocks} & {block.block_id for block in self.held}
        assert all(block.ref_cnt == 1 and block.block_hash is None for block in blocks)
        self.held += blocks

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data):
        count = data.draw(st.integers(1, len(self.held)))
        gone, self.held = self.held[:count], self.held[count:]
        self.pool.free_blocks(gone)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def cache(self, data):
        block = data.draw(st.sampled_from(self.held))
        if block.block_hash is None:
            cache(self.pool, block, self.next_name)
            self.names[self.next_name] = block.block_id
            self.next_name += 1

    @rule(data=st.data())
    def hit(self, data):
        live = [name for name in self.names if lookup(self.pool, name) is not None]
        if live:
            name = data.draw(st.sampled_from(live))
            block = lookup(self.pool, name)
            assert block.block_id == self.names[name]
            assert self.queue._is_backed[self.extents.extent_of(block.block_id)]
            if block not in self.held:
                self.pool.touch([block])
                self.held.append(block)

    @rule(max_idle=st.integers(0, 10))
    def trim(self, max_idle):
        self.queue.trim(max_idle)
        assert self.queue.num_idle <= max_idle

    @rule(limit=st.integers(1, 40))
    def limit(self, limit):
        self.queue.limit = limit

    @rule()
    def start_over(self):
        self.queue.drop_cached()
        assert self.queue.num_idle == 0
        self.worker = set(self.queue.take_all())

    @rule()
    def tell_worker(self):
        commit, decommit = self.queue.take_changes()
        assert not set(commit) & self.worker
        assert set(decommit) <= self.worker
        self.worker = (self.worker | set(commit)) - set(decommit)
        backed = {idx for idx, is_backed in enumerate(self.queue._is_backed) if is_backed}
        assert self.worker == backed
        needed = {self.extents.extent_of(block.block_id) for block in self.held} | {0}
        assert needed <= self.worker

    @invariant()
    def books_balance(self):
        if hasattr(self, "queue"):
            self.queue.check_invariants()
            assert self.queue.num_used_blocks == 1 + len(self.held)


PoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPoolMachine = PoolMachine.TestCase
