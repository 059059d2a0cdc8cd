"""Random serving over vLLM's real scheduler and real pages, where every row is read back.

A worker without a model: what it writes for a token follows from all tokens up to it, and in each
step it compares all that the requests of the step have written so far. So a block that lost its
memory, a prefix that was never computed or a plan that was not followed shows as a wrong row.
"""

import random
import time

import pytest
import torch
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from vmalloc.integrations.vllm.extents import Extents
from vmalloc.integrations.vllm.kv_memory import KVMemory
from vmalloc.integrations.vllm.plan import plan_of, without_tokens

from .scheduling import BLOCK, LAYERS, STRIDE, cache_config, make_scheduler, request_of

TOKEN = 7  # what every step samples
MAX_LEN = 256


def rows_of(tokens):
    """One number for each token, which depends on all before it."""
    rows, number = [], 1
    for token in tokens:
        number = (number * 1_000_003 + token + 17) & (1 << 62) - 1
        rows.append(number)
    return torch.tensor(rows)


class Worker:
    """What a worker knows of requests, over the memory of one."""

    def __init__(self, num_blocks, options):
        self.num_blocks = num_blocks
        self.extents = Extents.of(cache_config(num_blocks), "cpu", options.page_bytes)
        self.memory = KVMemory(self.extents, torch.device("cpu"), options, agree=lambda own: own)
        self.buffer = self.memory._elastic.tensor.view(torch.int64)
        self.blocks, self.rows, self.num_known = {}, {}, {}
        self.num_refused = 0

    def execute(self, step):
        refusal = self.memory.apply(plan_of(step))
        step = without_tokens(step) if refusal else step
        computed = self.learn(step)
        if refusal:
            self.num_refused += 1
            return refusal
        ends = {name: computed[name] + count for name, count in step.num_scheduled_tokens.items()}
        for name, end in ends.items():
            first = computed[name]
            for layer in range(len(LAYERS)):
                self.buffer[self.places(name, layer, first, end)] = self.rows[name][first:end]
        for name, end in ends.items():
            for layer in range(len(LAYERS)):
                found = self.buffer[self.places(name, layer, 0, end)]
                assert found.equal(self.rows[name][:end]), (name, computed[name], end)
        return ModelRunnerOutput(
            req_ids=list(ends),
            req_id_to_index={name: idx for idx, name in enumerate(ends)},
            sampled_token_ids=[self.sample(name, end) for name, end in ends.items()],
        )

    def learn(self, step):
        """Requests that come, go on and go; the tokens that each had computed before."""
        for name in step.finished_req_ids:
            for known in (self.blocks, self.rows, self.num_known):
                known.pop(name, None)
        computed = {}
        for new in step.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
            self.blocks[new.req_id] = list(new.block_ids[0])
            self.num_known[new.req_id] = len(new.prompt_token_ids)
            self.rows[new.req_id] = rows_of([*new.prompt_token_ids, *[TOKEN] * MAX_LEN])
        cached = step.scheduled_cached_reqs
        for idx, name in enumerate(cached.req_ids):
            computed[name] = cached.num_computed_tokens[idx]
            if name in cached.resumed_req_ids:
                self.blocks[name] = []
                self.num_known[name] = len(cached.all_token_ids[name])
            if cached.new_block_ids[idx]:
                self.blocks[name] += cached.new_block_ids[idx][0]
        return computed

    def sample(self, name, end):
        if end < self.num_known[name]:
            return []  # a part of a prompt
        self.num_known[name] += 1
        return [TOKEN]

    def places(self, name, layer, first, end):
        """Where the rows of the tokens are, in the buffer."""
        rows = torch.arange(first, end)
        blocks = torch.tensor(self.blocks[name])[rows // BLOCK]
        assert blocks.gt(0).all()  # none is the null block
        assert {self.extents.extent_of(int(block)) for block in blocks} <= self.memory._held
        byte = (layer * self.num_blocks + blocks) * STRIDE + rows % BLOCK * (STRIDE // BLOCK)
        return byte // 8


class Serving:
    """A scheduler, a worker, and requests that come and go by chance."""

    def __init__(self, model_path, seed):
        self.chance = chance = random.Random(seed)
        num_blocks = chance.choice([12, 20, 40, 90])
        self.is_async = chance.random() < 0.6
        options = {
            "cached_fraction": chance.choice([0.0, 0.05, 0.1, 0.5, 1.0]),
            "page_bytes": chance.choice([None, 4096, 65536, 131072]),
            "retry_s": chance.choice([0.001, 0.05, 1.0]),
            "idle_s": 1000.0,
        }
        extents = Extents.of(cache_config(num_blocks), "cpu", options["page_bytes"])
        self.extent_bytes = extents.max_extent_pages * extents.page_bytes
        least = -(-(MAX_LEN // BLOCK + 1) // extents.blocks_per_extent)
        if chance.random() < 0.4:
            most = max(least, extents.num_extents)
            options["capacity_bytes"] = self.extent_bytes * chance.randint(least, most)
        self.scheduler = make_scheduler(model_path, num_blocks, self.is_async, **options)
        self.worker = Worker(num_blocks, self.scheduler._options)
        self.full_bytes = self.worker.memory.stats()["capacity_bytes"]
        self.bases = [[chance.randrange(2000) for _ in range(MAX_LEN)] for _ in range(3)]
        self.on_their_way = []
        self.wanted, self.got = {}, {}

    def tick(self):
        """One step is scheduled; with asynchronous scheduling the one before comes back."""
        if self.scheduler.has_requests():
            step = self.scheduler.schedule()
            self.on_their_way.append((step, self.worker.execute(step)))
            self.scheduler._queue.check_invariants()
        while len(self.on_their_way) > self.is_async or (
            self.on_their_way and not self.scheduler.has_requests()
        ):
            for part in self.scheduler.update_from_output(*self.on_their_way.pop(0)).values():
                for output in part.outputs:
                    self.got.setdefault(output.request_id, []).extend(output.new_token_ids)

    def add(self):
        length = self.chance.randint(1, MAX_LEN - 30)
        tokens = self.chance.choice(self.bases)[:length]
        if self.chance.random() < 0.3:
            tokens[length // 2 :] = [self.chance.randrange(2000) for _ in tokens[length // 2 :]]
        name, count = f"r{len(self.wanted)}", self.chance.randint(1, 20)
        self.scheduler.add_request(request_of(name, tokens, count))
        self.wanted[name] = count

    def abort(self):
        if self.wanted:
            name = self.chance.choice(list(self.wanted))
            self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
            self.wanted[name] = 0  # what came of it before does not matter

    def shrink(self):
        num_extents = self.chance.randint(3, self.worker.extents.num_extents)
        self.worker.memory.resize(min(num_extents * self.extent_bytes, self.full_bytes))

    def recover(self):
        self.worker.memory.resize(self.full_bytes)

    def drop(self):
        self.worker.memory.drop()  # the scheduler does not know

    def idle(self):
        if self.scheduler._idle_since is not None:
            self.scheduler._idle_since -= 950

    def reset(self):
        self.scheduler.reset_prefix_cache(reset_running_requests=self.chance.random() < 0.5)

    def serve(self, num_events):
        rare = [self.abort, self.shrink, self.recover, self.drop, self.idle, self.reset]
        for _ in range(num_events):
            event = self.chance.choices(
                [self.tick, self.add, self.chance.choice(rare)], [70, 15, 15]
            )
            event[0]()
        self.recover()
        deadline = time.monotonic() + 60
        while self.scheduler.has_requests() or self.on_their_way:
            self.tick()
            assert time.monotonic() < deadline, "requests wait for ever"


@pytest.mark.parametrize("seed", range(12))
def test_every_row_is_there_when_it_is_read(model_path, seed):
    serving = Serving(model_path, seed)
    serving.serve(120)
    for name, count in serving.wanted.items():
        assert count == 0 or serving.got[name] == [TOKEN] * count
    queue, memory = serving.scheduler._queue, serving.worker.memory
    queue.check_invariants()
    assert queue.num_used_blocks == 1
    memory._elastic.check_invariants()
    memory.drop()
    assert memory.stats()["held_extents"] == 1
    memory.close()


def test_the_seeds_meet_refusals(model_path):
    servings = [Serving(model_path, seed) for seed in range(4)]
    for serving in servings:
        serving.serve(120)
    assert sum(serving.worker.num_refused for serving in servings) > 5
    assert {serving.is_async for serving in servings} == {True, False}
