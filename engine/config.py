"""Settings of one engine: validated and frozen.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..config import CommitPolicy
from ..errors import ConfigError

DtypeName = Literal["auto", "float32", "bfloat16"]
KVBackendName = Literal["auto", "virtual", "paged"]
SchedulingPolicy = Literal["fcfs", "priority"]
PreemptionMode = Literal["auto", "swap", "recompute"]

MAX_INT = 2**63 - 1
"""Largest size the core counts with."""

DEFAULT_MAX_NUM_BATCHED_TOKENS = 512
"""Tokens a step computes at most: enough to feed the CPU's matrix units, short enough to stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine runs; None means "derived from the model and the host".

    Attributes:
        dtype: element type of weights, activations and KV. ``"auto"`` computes in float32 on CPU,
            whatever the checkpoint stores; a module that is passed ready built keeps its own.
        kv_backend: which KV cache; ``"auto"`` takes the best one for this host.
        kv_cache_memory_bytes: hard cap on physical KV memory. None: the smaller of a quarter of
            the available memory and what ``max_num_seqs`` full-length sequences take.
        max_model_len: most tokens of one sequence, prompt included. None: the model's context.
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: most tokens in one step; longer prompts are computed in chunks.
        scheduling_policy: ``"fcfs"`` goes by arrival; under ``"priority"`` requests with a lower
            ``priority`` go first, and waiting makes up for it in time.
        preemption_mode: what happens to a request that must give up its memory. ``"swap"`` copies
            its KV to host memory, as far as that goes; ``"recompute"`` drops it; ``"auto"`` takes
            what costs less time, as measured.
        swap_space_bytes: host memory for swapped-out KV. 0: none. None: the smaller of the KV cap
            and a tenth of the available memory; it is only taken when it is needed.
        enable_prefix_caching: let requests share the KV of equal prompt beginnings, also with
            requests that ended.
        block_size: tokens of one block of the paged backend.
        commit_policy: how much memory a request reserves when it starts, see ``CommitPolicy``.
        page_size: physical KV page in bytes. None: the driver's default.
        layers_per_group: layers that share one KV row. None: all of them.
        commit_ahead_tokens: rows kept backed past each sequence's end by a background thread.
        seed: seeds the generator that gives a seed to requests without one.
        batch_invariant: make logits bitwise independent of batch mates, at some cost for small
            batches.
        max_logprobs: most logprobs a request may ask for at one position.
    """

    dtype: DtypeName = "auto"
    kv_backend: KVBackendName = "auto"
    kv_cache_memory_bytes: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    scheduling_policy: SchedulingPolicy = "fcfs"
    preemption_mode: PreemptionMode = "auto"
    swap_space_bytes: int | None = None
    enable_prefix_caching: bool = True
    block_size: int = 16
    commit_policy: CommitPolicy = "on_demand"
    page_size: int | None = None
    layers_per_group: int | None = None
    commit_ahead_tokens: int = 4
    seed: int = 0
    batch_invariant: bool = False
    max_logprobs: int = 20

    def __post_init__(self) -> None:
        _check_choice("dtype", self.dtype, ("auto", "float32", "bfloat16"))
        _check_choice("kv_backend", self.kv_backend, get_args(KVBackendName))
        _check_choice("scheduling_policy", self.scheduling_policy, get_args(SchedulingPolicy))
        _check_choice("preemption_mode", self.preemption_mode, get_args(PreemptionMode))
        _check_choice("commit_policy", self.commit_policy, get_args(CommitPolicy))
        for name in (
            "kv_cache_memory_bytes",
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "page_size",
            "layers_per_group",
        ):
            _check_int(name, getattr(self, name), 1)
        for name in ("swap_space_bytes", "commit_ahead_tokens", "seed", "max_logprobs"):
            _check_int(name, getattr(self, name), 0)
        if (
            self.max_num_batched_tokens is not None
            and self.max_num_batched_tokens < self.max_num_seqs
        ):
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}; it must be at least "
                f"max_num_seqs, {self.max_num_seqs}, so that every running sequence gets a token"
            )

    @property
    def step_tokens(self) -> int:
        """``max_num_batched_tokens``, or its default."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(DEFAULT_MAX_NUM_BATCHED_TOKENS, self.max_num_seqs)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; supported: {', '.join(choices)}")


def _check_int(name: str, value: int | None, minimum: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {value!r}; it must be an integer, at least {minimum}")
    if not minimum <= value <= MAX_INT:
        raise ConfigError(f"{name} is {value}; it must be between {minimum} and {MAX_INT}")
