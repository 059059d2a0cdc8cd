"""The engine: requests in, one step at a time, outputs out. The only place where the parts meet.

Owns: the model, the KV cache and every live request.
Thread-safety: none; one thread calls everything.
"""

from __future__ import annotations

import gc
import random
import time
import weakref
from collections.abc import Iterable
from collections.abc import Sequence as SequenceABC
from types import TracebackType
from typing import Any

import torch

from .. import create_kv_backend
from ..backend import KVBackend, KVCacheStats
from ..errors import ClosedError, ConfigError
from .cache_setup import create_cache, resolve_config, resolve_max_model_len
from .config import EngineConfig
from .invariance import check_batch_invariance
from .model_loader import end_token_ids, vocab_size
from .model_runner import ModelRunner
from .outputs import CompletionOutput, RequestMetrics, RequestOutput
from .probe import own_attention, probe_model, restore_attention
from .prompt import read_prompt
from .rope import RopePin, pin_rope
from .sampler import SampledTokens, sample
from .sampling_params import MAX_SEED, RequestOutputKind, SamplingParams
from .scheduler import ScheduledBatch, Scheduler
from .sequence import Sequence
from .stop import check_stop, complete_text, visible_chars
from .tokenizer import Detokenizer

_users: weakref.WeakKeyDictionary[torch.nn.Module, weakref.ref[LLMEngine]] = (
    weakref.WeakKeyDictionary()
)
"""The engine that last had a model."""


class LLMEngine:
    """Continuous batching over one model and one KV cache.

    Args:
        model: a transformers decoder in eval mode on CPU. Its attention is the engine's until
            ``close``.
        tokenizer: its tokenizer, or None to work with token ids only.
        config: settings; ``engine.config`` has every None filled in.

    Raises ``UnsupportedModelError`` if the model fails the load probe, ``ConfigError`` for a
    setting that cannot work and for a model that another engine has.
    """

    def __init__(
        self, model: torch.nn.Module, tokenizer: Any = None, config: EngineConfig | None = None
    ) -> None:
        config = config or EngineConfig()
        _check_unused(model)
        self._model = model
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size(model)
        self._end_token_ids = end_token_ids(model, tokenizer)
        self._seeds = random.Random(config.seed)
        self._requests: dict[str, Sequence] = {}
        self._next_seq_id = 0
        # Ended sequences that no step reported yet.
        self._ended: list[Sequence] = []
        self._decoded_tokens: dict[int, str] = {}
        max_model_len = resolve_max_model_len(model, config)
        attention = own_attention(model)
        rope_pin = pin_rope(model, max_model_len)
        try:
            probed = probe_model(model, create_kv_backend)
            if config.batch_invariant:
                check_batch_invariance(model, probed.layers, create_kv_backend)
            self.config = resolve_config(config, probed.layers, max_model_len)
            self._backend = create_cache(self.config, probed.layers)
        except BaseException:
            _give_back(model, attention, rope_pin)
            raise
        # Also for an engine that is dropped without close().
        self._give_model_back = weakref.finalize(self, _give_back, model, attention, rope_pin)
        self._give_model_back.atexit = False
        self._runner = ModelRunner(model, self._backend, batch_invariant=config.batch_invariant)
        self._scheduler = Scheduler(
            self._backend,
            max_num_seqs=self.config.max_num_seqs,
            max_num_batched_tokens=self.config.step_tokens,
        )
        self._is_closed = False
        _users[model] = weakref.ref(self)

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

    def kv_stats(self) -> KVCacheStats:
        """What the KV memory is doing."""
        return self._backend.stats()

    def has_unfinished_requests(self) -> bool:
        """Whether ``step`` has work."""
        return self._scheduler.has_unfinished or bool(self._ended)

    def check_request(
        self,
        prompt: str | dict[str, Any] | SequenceABC[int],
        params: SamplingParams | None = None,
    ) -> dict[str, Any]:
        """Raise ``ConfigError`` where ``add_request`` would for these; takes nothing.

        Returns the prompt as ``add_request`` takes it without tokenising it again.
        """
        self._check_open()
        text, token_ids, _ = self._read_request(prompt, params)
        return {"prompt": text, "prompt_token_ids": token_ids}

    def add_request(
        self,
        request_id: str,
        prompt: str | dict[str, Any] | SequenceABC[int],
        params: SamplingParams | None = None,
    ) -> None:
        """Queue a request: text, ``{"prompt_token_ids": [...]}`` or a list of token ids.

        Raises ``ConfigError``, and takes nothing, for a prompt that is empty, longer than the
        context or outside the vocabulary, and for settings that cannot be honoured.
        """
        self._check_open()
        if request_id in self._requests:
            raise ConfigError(f"request_id is {request_id!r}; a live request has that name")
        text, token_ids, params = self._read_request(prompt, params)
        room = self._max_model_len() - len(token_ids)
        detokenizer = None
        if self._tokenizer is not None and params.detokenize:
            detokenizer = Detokenizer(
                self._tokenizer, token_ids, skip_special_tokens=params.skip_special_tokens
            )
        stop_token_ids = frozenset(params.stop_token_ids or ())
        if not params.ignore_eos:
            stop_token_ids |= self._end_token_ids
        # Drawn for every request, so that a later one does not depend on who brought a seed.
        drawn_seed = self._seeds.randint(0, MAX_SEED)
        seq = Sequence(
            self._next_seq_id,
            request_id,
            token_ids,
            params,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            seed=drawn_seed if params.seed is None else params.seed,
            stop_token_ids=stop_token_ids,
            prompt=text,
            arrival_time=time.monotonic(),
            detokenizer=detokenizer,
        )
        self._next_seq_id += 1
        self._requests[request_id] = seq
        self._scheduler.add(seq)

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """End requests and free their KV; unknown and finished ones are ignored."""
        names = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        aborted = [seq for name in names if (seq := self._requests.pop(name, None)) is not None]
        for seq in aborted:
            seq.finish("abort")
        self._scheduler.release(aborted)
        if self._ended:
            self._ended = [seq for seq in self._ended if seq not in aborted]

    def step(self) -> list[RequestOutput]:
        """Compute one step; outputs of the requests that have something to report.

        A request whose KV can never fit ends with ``finish_reason="error"``; the others go on.
        After an exception every request is still there: another step computes again what this one
        did not append, and reports what ended in it.
        """
        self._check_open()
        batch = self._scheduler.schedule()
        self._ended.extend(batch.failed)
        kv_step = self._backend.begin_step()
        try:
            if batch.seqs:
                view = self._backend.batch_view(
                    [seq.seq_id for seq in batch.seqs], batch.num_new_tokens
                )
                logits = self._runner.forward(batch.seqs, batch.num_new_tokens, view)
        finally:
            self._backend.end_step(kv_step)
        now = time.monotonic()
        to_report = list(self._ended)
        for seq in to_report:
            if seq.finish_reason == "error":
                complete_text(seq)
        if batch.seqs:
            to_report.extend(self._advance(batch, logits, now))
        outputs = []
        for seq in to_report:
            if seq.is_finished:
                seq.metrics.finished_time = now
                self._requests.pop(seq.request_id, None)
            output = self._report(seq)
            if output is not None:
                outputs.append(output)
        self._ended.clear()
        return outputs

    def close(self) -> None:
        """Drop every request, give the KV memory back and the model its attention. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._requests.clear()
        self._ended.clear()
        try:
            self._backend.close()
        finally:
            self._give_model_back()

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

    def _max_model_len(self) -> int:
        assert self.config.max_model_len is not None
        return self.config.max_model_len

    def _read_request(
        self, prompt: Any, params: SamplingParams | None
    ) -> tuple[str | None, list[int], SamplingParams]:
        """Text if there is one, token ids and settings of a request, all checked."""
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ConfigError(f"params is a {type(params).__name__}; it must be SamplingParams")
        text, token_ids = read_prompt(
            prompt,
            self._tokenizer,
            vocab_size=self._vocab_size,
            max_model_len=self._max_model_len(),
        )
        self._check_params(params)
        return text, token_ids, params

    def _check_params(self, params: SamplingParams) -> None:
        if params.logprobs is not None and params.logprobs > self.config.max_logprobs:
            raise ConfigError(
                f"logprobs is {params.logprobs}; it must not exceed max_logprobs, "
                f"{self.config.max_logprobs}"
            )
        if params.stop_strings and self._tokenizer is None:
            raise ConfigError(f"stop is {params.stop!r}; stop strings need a tokenizer")
        for token_id in params.stop_token_ids or ():
            if token_id >= self._vocab_size:
                raise ConfigError(
                    f"stop_token_ids holds {token_id}; it must be below {self._vocab_size}"
                )

    def _advance(self, batch: ScheduledBatch, logits: torch.Tensor, now: float) -> list[Sequence]:
        """Give each sequence whose end was computed its next token; those sequences.

        After an exception, sequences without a new token are as if their last one was never run.
        """
        sampled_seqs = [
            seq
            for seq, num_new_tokens in zip(batch.seqs, batch.num_new_tokens, strict=True)
            if seq.num_uncomputed_tokens == num_new_tokens
        ]
        sampled = sample(sampled_seqs, logits) if sampled_seqs else None
        try:
            self._scheduler.complete(batch)
            for seq in batch.seqs:
                if seq.metrics.first_scheduled_time is None:
                    seq.metrics.first_scheduled_time = now
            if sampled is not None:
                self._append(sampled_seqs, sampled, now)
        finally:
            ended = []
            for seq in sampled_seqs:
                if seq.is_finished:
                    ended.append(seq)
                elif seq.num_uncomputed_tokens == 0:
                    seq.num_computed_tokens -= 1
            if ended:
                self._ended.extend(ended)
                self._scheduler.release(ended)
        return sampled_seqs

    def _append(self, seqs: list[Sequence], sampled: SampledTokens, now: float) -> None:
        for seq, token_id, logprobs in zip(seqs, sampled.token_ids, sampled.logprobs, strict=True):
            if token_id is None:
                complete_text(seq)
                seq.error = f"request {seq.request_id}: the model's logits are not finite"
                seq.finish("error")
                continue
            if seq.metrics.first_token_time is None:
                seq.metrics.first_token_time = now
            num_tokens, cumulative_logprob = seq.num_tokens, seq.cumulative_logprob
            try:
                seq.token_ids.append(token_id)
                if logprobs is not None:
                    self._append_logprobs(seq, token_id, logprobs)
                check_stop(seq)
            except BaseException:
                if not seq.is_finished:
                    del seq.token_ids[num_tokens:]
                    del seq.logprobs[num_tokens - seq.num_prompt_tokens :]
                    seq.cumulative_logprob = cumulative_logprob
                raise

    def _decode_token(self, token_id: int) -> str:
        text = self._decoded_tokens.get(token_id)
        if text is None:
            text = self._decoded_tokens[token_id] = self._tokenizer.decode([token_id])
        return text

    def _append_logprobs(self, seq: Sequence, token_id: int, logprobs: dict[int, Any]) -> None:
        if self._tokenizer is not None:
            for candidate_id, entry in logprobs.items():
                entry.decoded_token = self._decode_token(candidate_id)
        seq.logprobs.append(logprobs)
        seq.cumulative_logprob += logprobs[token_id].logprob

    @staticmethod
    def _report(seq: Sequence) -> RequestOutput | None:
        """What ``params.output_kind`` wants to hear of a sequence now, or None."""
        kind = seq.params.output_kind
        if kind is RequestOutputKind.FINAL_ONLY and not seq.is_finished:
            return None
        num_tokens, num_chars = 0, 0
        text = "" if seq.detokenizer is None else seq.detokenizer.text
        if not seq.is_finished:
            text = text[: visible_chars(seq, text)]
        if kind is RequestOutputKind.DELTA:
            num_tokens, num_chars = seq.num_reported_tokens, seq.num_reported_chars
            seq.num_reported_tokens, seq.num_reported_chars = seq.num_output_tokens, len(text)
        has_logprobs = seq.params.logprobs is not None
        completion = CompletionOutput(
            index=0,
            text=text[num_chars:],
            token_ids=seq.token_ids[seq.num_prompt_tokens + num_tokens :],
            cumulative_logprob=seq.cumulative_logprob if has_logprobs else None,
            logprobs=seq.logprobs[num_tokens:] if has_logprobs else None,
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
        )
        return RequestOutput(
            request_id=seq.request_id,
            prompt=seq.prompt,
            prompt_token_ids=seq.prompt_token_ids,
            outputs=[completion],
            is_finished=seq.is_finished,
            error=seq.error,
            metrics=_copy_metrics(seq.metrics),
        )


def _check_unused(model: torch.nn.Module) -> None:
    """Raise ``ConfigError`` if an engine has ``model`` and was not closed."""
    user = _users.get(model)
    if user is None or not _is_open(user):
        return
    gc.collect()  # it may only wait, unreachable, to be collected
    if _is_open(user):
        raise ConfigError(
            f"model is a {type(model).__name__} that another engine uses; close that one first"
        )


def _is_open(user: weakref.ref[LLMEngine]) -> bool:
    engine = user()
    return engine is not None and not engine._is_closed


def _give_back(model: torch.nn.Module, attention: str | None, rope_pin: RopePin) -> None:
    """Leave a model as it was before an engine had it."""
    rope_pin.restore()
    restore_attention(model, attention)


def _copy_metrics(metrics: RequestMetrics) -> RequestMetrics:
    # Once per streamed token: five times as fast as dataclasses.replace.
    return RequestMetrics(
        metrics.arrival_time,
        metrics.first_scheduled_time,
        metrics.first_token_time,
        metrics.finished_time,
        metrics.num_preemptions,
    )
