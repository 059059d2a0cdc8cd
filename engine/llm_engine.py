"""The engine: requests in, one step at a time, outputs out. The only place where the parts meet.

Owns: the model, the KV cache and every live request.
Thread-safety: none; one thread calls everything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch

from ..backend import KVBackend, KVCacheStats, PrefixCacheStats
from ..errors import ClosedError, ConfigError, DriverError, VmallocError
from ..page_map import PageMap
from .assembly import assemble
from .compute_stream import StepTimer, current_stream_handle
from .config import EngineConfig
from .decode_graphs import DecodeGraphs, Recorder
from .errors import PlanVoidError
from .generation import Generation, scored_prompts
from .model_loader import end_token_ids, vocab_size
from .outputs import RequestOutput
from .preemption_cost import PreemptionCost
from .reporting import report
from .request_reader import Prompt, RequestReader
from .sampling_checks import check_salt
from .sampling_params import SamplingParams
from .schedule import ScheduledBatch, SchedulerStats
from .scheduler import Scheduler
from .sequence_group import SequenceGroup
from .startup import StartupPhases
from .token_counts import TokenStats

if TYPE_CHECKING:
    from .tensor_parallel.leader import RankLeader
    from .tensor_parallel.rank_report import RankReport

P = ParamSpec("P")
R = TypeVar("R")


def _on_stream(
    method: Callable[Concatenate[LLMEngine, P], R],
) -> Callable[Concatenate[LLMEngine, P], R]:
    """What the method enqueues goes to the engine's stream."""

    @wraps(method)
    def call(self: LLMEngine, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._stream.use():
            return method(self, *args, **kwargs)

    return call


class LLMEngine:
    """Continuous batching over one model and one KV cache.

    Args:
        model: a transformers decoder in eval mode, on the device it is to run on. Its attention is
            the engine's until ``close``.
        tokenizer: its tokenizer, or None to work with token ids only.
        config: settings; ``engine.config`` has every None filled in.
        recorder: what decodes are recorded with, for tests; None: CUDA graphs on a GPU.
        phases: times what is done before the first step.
        cost: what ``preemption_mode="auto"`` goes by until more was measured.
        clock: seconds; all that is timed or measured goes by it, but for work on a GPU.
        leader: the other ranks, which have their share of the model and are being assembled too.
            The engine ends them when it is closed.

    Attributes:
        config: its settings, every None filled in.
        fused_refusal: why the model's own forward pass computes; None where native code does.

    Raises ``UnsupportedModelError`` if the model fails the load probe, ``ConfigError`` for a
    setting that cannot work and for a model that another engine has.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any = None,
        config: EngineConfig | None = None,
        *,
        recorder: Recorder | None = None,
        phases: StartupPhases | None = None,
        cost: PreemptionCost | None = None,
        clock: Callable[[], float] = time.monotonic,
        leader: RankLeader | None = None,
    ) -> None:
        config = config or EngineConfig()
        num_ranks = 1 if leader is None else leader.size
        if config.tensor_parallel_size != num_ranks:
            raise ConfigError(
                f"tensor_parallel_size is {config.tensor_parallel_size} and the model is on "
                f"{num_ranks} rank(s): name the model, so that every rank loads its share"
            )
        parts = assemble(
            model,
            config,
            owner=self,
            recorder=recorder,
            phases=phases or StartupPhases(),
            least=list if leader is None else leader.least,
        )
        self.config = parts.config
        self._stream, self._lease = parts.stream, parts.lease
        self._backend, self._kernels = parts.backend, parts.kernels
        self._runner = parts.runner
        self._leader = leader
        if leader is not None:
            self._backend = leader.attach(parts)  # gives all of it back if that fails
            leader.end_with(self, model)
        self.fused_refusal = parts.fused_refusal
        self._clock = clock
        self._timer = StepTimer(parts.stream.device, clock)
        self._model = model
        self._tokenizer = tokenizer
        self._requests: dict[str, SequenceGroup] = {}
        # Ended groups that no step reported yet.
        self._ended: list[SequenceGroup] = []
        # Groups that were aborted while the cache slept.
        self._aborted_asleep: list[SequenceGroup] = []
        self._is_asleep = False
        self._is_closed = False
        self._reader = RequestReader(
            tokenizer,
            vocab_size=vocab_size(model),
            end_token_ids=end_token_ids(model, tokenizer),
            config=self.config,
            clock=clock,
        )
        self._scheduler = Scheduler(
            self._backend,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.step_tokens,
            policy=self.config.scheduling_policy,
            preemption_mode=self.config.preemption_mode,
            cost=cost,
            clock=clock,
        )
        self._generation = Generation(self._scheduler, tokenizer, self._reader.new_seq_id, clock)

    @property
    def backend(self) -> KVBackend:
        """The KV cache."""
        return self._backend

    @property
    def scheduler(self) -> Scheduler:
        """The queues, for reading."""
        return self._scheduler

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or None."""
        return self._tokenizer

    @property
    def is_asleep(self) -> bool:
        """Whether ``sleep`` was called, and ``wake`` not yet."""
        return self._is_asleep

    @property
    def kernel_name(self) -> str:
        """The attention kernel that works on the KV cache, e.g. ``"cpu_contiguous_avx2"``."""
        with self._stream.use():
            return self._kernels.kernel_name(self._backend.batch_view((), ()))

    @property
    def forward_name(self) -> str:
        """Who computes forward passes: ``"model"`` itself, or native code, ``"fused_avx2"``.

        The last word is the instruction set, as in ``kernel_name``.
        """
        return self._runner.forward_name

    @property
    def num_ranks(self) -> int:
        """Processes that compute together, this one included."""
        return self.config.tensor_parallel_size

    @property
    def leader(self) -> RankLeader | None:
        """The other ranks of a tensor-parallel engine."""
        return self._leader

    @property
    def decode_graphs(self) -> DecodeGraphs | None:
        """What decodes are recorded in; None where every step is launched kernel by kernel."""
        return self._runner.decodes

    def stats(self) -> SchedulerStats:
        """Queues and counters of preemption."""
        return self._scheduler.stats()

    def kv_stats(self) -> KVCacheStats:
        """What the KV memory is doing; with several ranks that of this one, as all settings are."""
        return self._backend.stats()

    def prefix_stats(self) -> PrefixCacheStats:
        """What the prefix cache did so far."""
        return self._backend.prefix_stats()

    def page_map(self) -> PageMap:
        """The pages of every slot, with the requests they belong to; while it sleeps too.

        With several ranks those of rank 0, which are where every other rank's are.
        """
        self._check_open()
        return self._backend.page_map().with_requests(self._request_of())

    @_on_stream
    def rank_reports(self) -> list[RankReport]:
        """How the memory of every rank is, by a round of messages; empty without ranks."""
        self._check_open()
        if self._leader is None:
            return []
        request_of = self._request_of()
        return [report.with_requests(request_of) for report in self._leader.reports()]

    def is_started(self, request_id: str) -> bool:
        """Whether a request got into a step, or is not live any more."""
        group = self._requests.get(request_id)
        return group is None or group.metrics.first_scheduled_time is not None

    def token_stats(self) -> TokenStats:
        """Tokens of prompts, written and computed so far."""
        return self._generation.tokens.stats()

    def has_unfinished_requests(self) -> bool:
        """Whether ``step`` has work."""
        return self._scheduler.has_unfinished or bool(self._ended)

    def prepare_structured_outputs(self) -> None:
        """Do now what the first structured output would wait for, if there can be any."""
        self._reader.prepare_structured_outputs()

    def check_request(self, prompt: Prompt, params: SamplingParams | None = None) -> dict[str, Any]:
        """Raise ``ConfigError`` where ``add_request`` would for these; takes nothing.

        Returns the prompt as ``add_request`` takes it without tokenising it again.
        """
        self._check_open()
        request = self._reader.read(prompt, params)
        return {"prompt": request.text, "prompt_token_ids": request.token_ids}

    @_on_stream
    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        priority: int = 0,
    ) -> None:
        """Queue a request: text, ``{"prompt_token_ids": [...]}`` or a list of token ids.

        ``priority``: lower runs first under ``scheduling_policy="priority"``.

        Raises ``ConfigError``, and takes nothing, for a prompt that is empty, longer than the
        context or outside the vocabulary, and for settings that cannot be honoured.
        """
        self._check_open()
        if request_id in self._requests:
            raise ConfigError(f"request_id is {request_id!r}; a live request has that name")
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise ConfigError(f"priority is {priority!r}; it must be an integer")
        if priority != 0 and self.config.scheduling_policy != "priority":
            raise ConfigError(
                f"priority is {priority}; other than 0 it needs scheduling_policy='priority'"
            )
        group = self._reader.make_group(request_id, self._reader.read(prompt, params), priority)
        self._requests[request_id] = group
        self._scheduler.add(group, may_prefetch=not self._is_asleep)

    @_on_stream
    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """End requests and free their KV; unknown and finished ones are ignored."""
        names = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        aborted = [group for name in names if (group := self._requests.pop(name, None)) is not None]
        for group in aborted:
            group.finish("abort")
        if self._is_asleep:
            self._aborted_asleep.extend(aborted)
        else:
            self._scheduler.release(aborted)
        if self._ended:
            self._ended = [group for group in self._ended if group not in aborted]

    @_on_stream
    def step(self) -> list[RequestOutput]:
        """Compute one step; outputs of the requests that have something to report.

        A request whose KV can never fit ends with ``finish_reason="error"``; the others go on.
        After an exception every request is still there: another step computes again what this one
        did not append, and reports what ended in it.
        """
        self._check_awake()
        if self._leader is not None:
            self._leader.check()
        batch = self._scheduler.schedule()
        self._ended.extend(batch.failed)
        started = self._clock()
        try:
            logits = self._compute(batch)
        except PlanVoidError:
            logits = None
            self._start_over()
        to_report = list(self._ended)
        if logits is not None:
            to_report.extend(self._generation.advance(batch, logits, self._ended, started))
        for num_tokens, seconds in self._timer.take_finished():
            self._scheduler.cost.observe_prefill(num_tokens, seconds)
        now = self._clock()
        outputs = []
        for group in to_report:
            if group.is_finished:
                group.metrics.finished_time = now
                self._requests.pop(group.request_id, None)
            output = report(group)
            if output is not None:
                outputs.append(output)
        self._ended.clear()
        if self._leader is not None and not self._scheduler.has_unfinished:
            self._leader.flush()  # nothing comes after it for now
        return outputs

    @_on_stream
    def sleep(self) -> None:
        """Give the KV memory back to the system until ``wake``; requests stay.

        Their KV goes to the swap space; where that is too small, it is dropped, and computed again
        afterwards. Cached prefixes are lost. Requests may be added and aborted meanwhile.
        """
        self._check_awake()
        try:
            if not self._backend.try_sleep():
                self._scheduler.preempt_all()
                if not self._backend.try_sleep():
                    raise VmallocError(
                        "the KV cache cannot sleep although no sequence is live: pinned prefixes "
                        f"exceed the cap, or a {self._backend.name} one on {self.config.device} "
                        "gives no memory back"
                    )
        except DriverError:
            self._is_asleep = True  # or not: only ``wake`` can tell
            raise
        self._is_asleep = True

    @_on_stream
    def wake(self) -> bool:
        """Go on after ``sleep``; False, and still asleep, if there is no memory for it now."""
        self._check_open()
        if self._is_asleep and self._backend.try_wake():
            self._is_asleep = False
            self._scheduler.release(self._aborted_asleep)
            self._aborted_asleep.clear()
        return not self._is_asleep

    @_on_stream
    def resize_kv_cache(self, num_bytes: int) -> None:
        """Move the cap on physical KV memory, also while requests run.

        Below what is in use it takes effect as pages are freed; running requests may be preempted
        for it.
        """
        self._check_awake()
        self._backend.resize(num_bytes)

    @_on_stream
    def trim_kv_cache(self) -> int:
        """Give KV pages that hold nothing back to the system; the pages given back."""
        self._check_awake()
        return self._backend.trim()

    @_on_stream
    def flush_prefix_cache(self) -> int:
        """Forget cached prefixes that are neither pinned nor in use; the pages set free."""
        self._check_awake()
        return self._backend.flush_prefixes()

    @_on_stream
    def pin_prefix(self, prompt: Prompt, cache_salt: str = "") -> int:
        """Keep what is cached of a prompt's KV until ``unpin_prefix``; the tokens pinned.

        Only what was computed before can be pinned: run the prompt once.
        """
        self._check_awake()
        check_salt(cache_salt)
        return self._backend.pin_prefix(self._reader.read_prompt(prompt)[1], cache_salt)

    @_on_stream
    def unpin_prefix(self, prompt: Prompt, cache_salt: str = "") -> int:
        """Undo one ``pin_prefix`` of the same prompt; the tokens unpinned."""
        self._check_awake()
        check_salt(cache_salt)
        return self._backend.unpin_prefix(self._reader.read_prompt(prompt)[1], cache_salt)

    @_on_stream
    def close(self) -> None:
        """Drop every request, give the KV memory back and the model its attention. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._requests.clear()
        self._ended.clear()
        try:
            self._stream.synchronize()
            self._runner.close()
            self._backend.close()
        finally:
            self._lease.give_back()
            if self._leader is not None:
                self._leader.close(self._model)

    def __enter__(self) -> LLMEngine:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ClosedError("the engine was closed")

    def _check_awake(self) -> None:
        self._check_open()
        if self._is_asleep:
            raise VmallocError("the engine sleeps; wake() it first")

    def _request_of(self) -> dict[int, str]:
        """The requests of sequences that have KV."""
        return {
            seq.seq_id: group.request_id
            for group in self._requests.values()
            for seq in group.seqs
            if seq.has_kv
        }

    def _start_over(self) -> None:
        """No rank computed a step, as one could not: all lose what they hold, but no request."""
        assert self._leader is not None
        self._scheduler.preempt_all()
        self._leader.recover()

    def _compute(self, batch: ScheduledBatch) -> torch.Tensor | None:
        """Run the model over a batch; its logits, None where the batch is empty."""
        kv_step = self._backend.begin_step(current_stream_handle(self._stream.device))
        try:
            if not batch.seqs:
                return None
            counts = batch.num_new_tokens
            self._generation.tokens.note_step(sum(counts))
            self._timer.start()
            logits = self._runner.forward(batch.seqs, counts, scored_prompts(batch))
            if max(counts) > 1:
                self._timer.stop(sum(counts))
            return logits
        finally:
            self._backend.end_step(kv_step)
