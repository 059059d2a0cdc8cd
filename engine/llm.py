"""Offline generation with the shape of vLLM's ``LLM``.

Owns: one engine.  Thread-safety: none; one thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch

from ..backend import KVCacheStats
from ..config import CommitPolicy
from ..errors import ConfigError, VmallocError
from .config import (
    DEFAULT_RANK_TIMEOUT_S,
    DtypeName,
    EngineConfig,
    FusedMode,
    KVBackendName,
    KVDriverName,
    PreemptionMode,
    SchedulingPolicy,
)
from .loading import load_engine
from .outputs import CompletionOutput, RequestOutput
from .progress import GenerationProgress
from .sampling_params import RequestOutputKind, SamplingParams

Prompt = str | dict[str, Any] | Sequence[int]
OnToken = Callable[[RequestOutput], None]


class LLM:
    """A model, ready to generate.

    Args:
        model: ``"demo"`` for the bundled checkpoint, a local folder, a hub id, or a transformers
            module (whose attention is ours until ``close``), on the device it is to run on.
        tokenizer: folder, hub id or tokenizer object. None: the model's own; a module that is
            passed ready built has none.
        skip_tokenizer_init: work with token ids only.

    The other arguments are those of ``EngineConfig``. With ``tensor_parallel_size`` above 1 the
    other ranks are processes of their own until ``close``. Raises ``ConfigError``,
    ``UnsupportedModelError`` and, where a rank ends, ``RankLostError``.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | torch.nn.Module,
        tokenizer: Any = None,
        *,
        skip_tokenizer_init: bool = False,
        device: str = "auto",
        dtype: DtypeName = "auto",
        kv_backend: KVBackendName = "auto",
        kv_driver: KVDriverName = "auto",
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        compile: bool = False,
        fused: FusedMode = "auto",
        cuda_graph_sizes: tuple[int, ...] | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None,
        scheduling_policy: SchedulingPolicy = "fcfs",
        preemption_mode: PreemptionMode = "auto",
        swap_space_bytes: int | None = None,
        enable_prefix_caching: bool = True,
        block_size: int = 16,
        commit_policy: CommitPolicy = "on_demand",
        page_size: int | None = None,
        layers_per_group: int | None = None,
        commit_ahead_tokens: int = 4,
        seed: int = 0,
        batch_invariant: bool = False,
        max_logprobs: int = 20,
        tensor_parallel_size: int = 1,
        tensor_parallel_port: int | None = None,
        tensor_parallel_timeout_s: float = DEFAULT_RANK_TIMEOUT_S,
    ) -> None:
        config = EngineConfig(
            device=device,
            dtype=dtype,
            kv_backend=kv_backend,
            kv_driver=kv_driver,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=enforce_eager,
            compile=compile,
            fused=fused,
            cuda_graph_sizes=cuda_graph_sizes,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            scheduling_policy=scheduling_policy,
            preemption_mode=preemption_mode,
            swap_space_bytes=swap_space_bytes,
            enable_prefix_caching=enable_prefix_caching,
            block_size=block_size,
            commit_policy=commit_policy,
            page_size=page_size,
            layers_per_group=layers_per_group,
            commit_ahead_tokens=commit_ahead_tokens,
            seed=seed,
            batch_invariant=batch_invariant,
            max_logprobs=max_logprobs,
            tensor_parallel_size=tensor_parallel_size,
            tensor_parallel_port=tensor_parallel_port,
            tensor_parallel_timeout_s=tensor_parallel_timeout_s,
        )
        self.engine = load_engine(model, tokenizer, config, skip_tokenizer_init=skip_tokenizer_init)
        self._num_requests = 0
        self._is_generating = False

    @property
    def config(self) -> EngineConfig:
        """Settings with every default filled in."""
        return self.engine.config

    def get_tokenizer(self) -> Any:
        """The tokenizer, or None."""
        return self.engine.tokenizer

    def kv_stats(self) -> KVCacheStats:
        """What the KV memory is doing."""
        return self.engine.kv_stats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        on_token: OnToken | None = None,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, batched continuously; one output per prompt, in their order.

        Args:
            prompts: text, ``{"prompt_token_ids": [...]}`` or a list of token ids; or a list of
                these.
            sampling_params: one for all prompts, or one for each.
            use_tqdm: show a progress bar on stderr.
            on_token: called after each step for each request that has new tokens, with only what
                is new: ``outputs`` holds the completions that got something, with their
                ``index``, and of those only the new text and tokens; ``request_id`` is the index
                of the prompt. Requests whose best completions are chosen at the end (``best_of``,
                beam search) come once.
            priority: one number for each prompt; lower runs first under
                ``scheduling_policy="priority"``.

        Raises ``ConfigError``, before anything runs, if any prompt or setting cannot work. A
        request that does not fit the KV cache ends alone with ``finish_reason="error"``.
        """
        if self._is_generating:
            raise VmallocError("generate() was called within its own on_token callback")
        prompt_list = _as_prompts(prompts)
        params_list = _as_params(sampling_params, len(prompt_list))
        priorities = _as_priorities(priority, len(prompt_list))
        prompt_list = [
            self.engine.check_request(prompt, params)
            for prompt, params in zip(prompt_list, params_list, strict=True)
        ]
        kind = RequestOutputKind.FINAL_ONLY if on_token is None else RequestOutputKind.DELTA
        first = self._num_requests
        self._num_requests += len(prompt_list)
        names = [str(first + idx) for idx in range(len(prompt_list))]
        collected = _Collector(names)
        progress = GenerationProgress(len(prompt_list), is_shown=use_tqdm)
        self._is_generating = True
        try:
            for name, prompt, params, rank in zip(
                names, prompt_list, params_list, priorities, strict=True
            ):
                self.engine.add_request(name, prompt, replace(params, output_kind=kind), rank)
            with progress:
                while self.engine.has_unfinished_requests():
                    for output in self.engine.step():
                        collected.add(output)
                        if on_token is not None:
                            on_token(output)
                        progress.update(output)
        finally:
            self._is_generating = False
            self.engine.abort_request(names)
        return collected.outputs()

    def close(self) -> None:
        """Give the KV memory back. Idempotent."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


class _Collector:
    """Puts streamed pieces together again, one whole output per request."""

    def __init__(self, names: list[str]) -> None:
        self._idx = {name: idx for idx, name in enumerate(names)}
        self._whole: dict[int, RequestOutput] = {}

    def add(self, output: RequestOutput) -> None:
        """Take a piece; its ``request_id`` becomes the index of the prompt."""
        idx = self._idx[output.request_id]
        output.request_id = str(idx)
        before = self._whole.get(idx)
        completions = {} if before is None else {one.index: one for one in before.outputs}
        for new in output.outputs:
            whole = completions.get(new.index)
            if whole is None:
                logprobs = None if new.logprobs is None else list(new.logprobs)
                first = replace(new, token_ids=list(new.token_ids), logprobs=logprobs)
                completions[new.index] = first
            else:
                _extend(whole, new)
        in_order = sorted(completions.values(), key=lambda completion: completion.index)
        self._whole[idx] = replace(output, outputs=in_order)

    def outputs(self) -> list[RequestOutput]:
        return [self._whole[idx] for idx in range(len(self._idx))]


def _extend(whole: CompletionOutput, new: CompletionOutput) -> None:
    whole.text += new.text
    whole.token_ids.extend(new.token_ids)
    if whole.logprobs is not None:
        whole.logprobs.extend(new.logprobs or [])
    whole.cumulative_logprob = new.cumulative_logprob
    whole.finish_reason, whole.stop_reason = new.finish_reason, new.stop_reason


def _as_prompts(prompts: Any) -> list[Any]:
    if isinstance(prompts, str | dict):
        return [prompts]
    if not isinstance(prompts, list | tuple):
        raise ConfigError(f"prompts is a {type(prompts).__name__}; it must be a prompt or a list")
    is_one_token_list = bool(prompts) and all(isinstance(item, int) for item in prompts)
    return [list(prompts)] if is_one_token_list else list(prompts)


def _as_params(params: Any, num_prompts: int) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * num_prompts
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if not isinstance(params, list | tuple):
        raise ConfigError(
            f"sampling_params is a {type(params).__name__}; it must be SamplingParams or a list"
        )
    for entry in params:
        if not isinstance(entry, SamplingParams):
            raise ConfigError(f"sampling_params holds {entry!r}; it must hold SamplingParams")
    if len(params) != num_prompts:
        raise ConfigError(f"sampling_params has {len(params)} entries for {num_prompts} prompts")
    return list(params)


def _as_priorities(priority: Any, num_prompts: int) -> list[int]:
    if priority is None:
        return [0] * num_prompts
    if not isinstance(priority, list | tuple):
        raise ConfigError(f"priority is {priority!r}; it must be a list, one number a prompt")
    if len(priority) != num_prompts:
        raise ConfigError(f"priority has {len(priority)} entries for {num_prompts} prompts")
    return list(priority)
