"""Settings of one engine: validated and frozen.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from ..config import CommitPolicy
from ..errors import ConfigError

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
KVBackendName = Literal["auto", "virtual", "paged"]
KVDriverName = Literal["auto", "host", "cuda", "null"]
SchedulingPolicy = Literal["fcfs", "priority"]
PreemptionMode = Literal["auto", "swap", "recompute"]
FusedMode = Literal["auto", "on", "off"]

MAX_INT = 2**63 - 1
"""Largest size the core counts with."""

DEFAULT_MAX_NUM_BATCHED_TOKENS = 512
"""Tokens a step computes at most: enough to feed the CPU's matrix units, short enough to stream."""

DEFAULT_RANK_TIMEOUT_S = 60.0
"""Longer than any step takes, and shorter than anybody waits for an answer."""

MAX_PORT = 65_535
MAX_RANK_TIMEOUT_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine runs; None means "derived from the model and the host".

    Attributes:
        device: where the model computes and K and V live: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.
            ``"auto"``: a GPU that torch can use, else the CPU; a module that is passed ready built
            stays where it is.
        dtype: element type of weights, activations and KV. ``"auto"`` computes in float32 on CPU,
            whatever the checkpoint stores, and on a GPU in the checkpoint's type if that has 16
            bits, else in bfloat16; a module that is passed ready built keeps its own.
        kv_backend: which KV cache; ``"auto"`` takes the best one for this host.
        kv_driver: where the KV cache's pages come from; ``"auto"`` goes by the device.
        kv_cache_memory_bytes: hard cap on physical KV memory. None on CPU: the smaller of a
            quarter of the available memory and what ``max_num_seqs`` full-length sequences take;
            on a GPU ``gpu_memory_utilization`` takes the place of the quarter.
        gpu_memory_utilization: share of a GPU's memory that everything together may take: weights,
            activations, KV and what others have there already.
        enforce_eager: launch every kernel of a decode step by itself instead of replaying CUDA
            graphs.
        compile: decode through ``torch.compile``; starting takes minutes.
        fused: whether a native loop over the layers computes in the place of the model's own
            forward pass, in float32 on the CPU. ``"auto"``: where the model's modules are known
            and its logits come out the same, as compared at start; ``"on"``: or not at all.
        cuda_graph_sizes: batch sizes to capture decode graphs for; smaller batches are filled up,
            larger ones launched kernel by kernel. None: 1, 2, 4 and each multiple of 8 up to
            ``max_num_seqs``.
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
        page_size: physical KV page in bytes. None: 16 to 64 KiB on the CPU, about 16 tokens of a
            row; on CUDA the driver's granularity.
        layers_per_group: layers that share one KV row. None: one on the CPU, or more where pages
            would be too small (see ``engine/cpu_layout.py``); all of them on CUDA.
        commit_ahead_tokens: rows kept backed past each sequence's end by a background thread.
        seed: seeds the generator that gives a seed to requests without one.
        batch_invariant: make logits bitwise independent of batch mates, at some cost for small
            batches.
        max_logprobs: most logprobs a request may ask for at one position.
        tensor_parallel_size: processes, one per device, that each compute a share of the heads of
            every layer and hold the K and V of these; the other settings are each rank's.
        tensor_parallel_port: TCP port on the loopback interface where the ranks meet. None: any
            that is free.
        tensor_parallel_timeout_s: seconds that a rank may be behind the others before it counts
            as lost.
    """

    device: str = "auto"
    dtype: DtypeName = "auto"
    kv_backend: KVBackendName = "auto"
    kv_driver: KVDriverName = "auto"
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    compile: bool = False
    fused: FusedMode = "auto"
    cuda_graph_sizes: tuple[int, ...] | None = None
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
    tensor_parallel_size: int = 1
    tensor_parallel_port: int | None = None
    tensor_parallel_timeout_s: float = DEFAULT_RANK_TIMEOUT_S

    def __post_init__(self) -> None:
        _check_device(self.device)
        _check_choice("dtype", self.dtype, get_args(DtypeName))
        _check_choice("kv_backend", self.kv_backend, get_args(KVBackendName))
        _check_choice("kv_driver", self.kv_driver, get_args(KVDriverName))
        _check_choice("scheduling_policy", self.scheduling_policy, get_args(SchedulingPolicy))
        _check_choice("preemption_mode", self.preemption_mode, get_args(PreemptionMode))
        _check_choice("fused", self.fused, get_args(FusedMode))
        _check_choice("commit_policy", self.commit_policy, get_args(CommitPolicy))
        for name in (
            "kv_cache_memory_bytes",
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "page_size",
            "layers_per_group",
            "tensor_parallel_size",
            "tensor_parallel_port",
        ):
            _check_int(name, getattr(self, name), 1)
        for name in ("swap_space_bytes", "commit_ahead_tokens", "seed", "max_logprobs"):
            _check_int(name, getattr(self, name), 0)
        _check_share("gpu_memory_utilization", self.gpu_memory_utilization)
        if self.tensor_parallel_port is not None and self.tensor_parallel_port > MAX_PORT:
            raise ConfigError(
                f"tensor_parallel_port is {self.tensor_parallel_port}; it must be at most "
                f"{MAX_PORT}"
            )
        if not 0.0 < self.tensor_parallel_timeout_s <= MAX_RANK_TIMEOUT_S:
            raise ConfigError(
                f"tensor_parallel_timeout_s is {self.tensor_parallel_timeout_s}; it must be above "
                f"0 and at most {MAX_RANK_TIMEOUT_S:g}"
            )
        if self.compile and self.tensor_parallel_size > 1:
            raise ConfigError(
                f"compile is True and tensor_parallel_size is {self.tensor_parallel_size}; models "
                "are compiled with one rank only"
            )
        _check_graph_sizes(self.cuda_graph_sizes, self.max_num_seqs)
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


def _check_device(device: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", device):
        raise ConfigError(f"device is {device!r}; supported: auto, cpu, cuda, cuda:N")


def _check_share(name: str, value: float) -> None:
    if not 0.0 < value <= 1.0:
        raise ConfigError(f"{name} is {value}; it must be above 0 and at most 1")


def _check_graph_sizes(sizes: tuple[int, ...] | None, max_num_seqs: int) -> None:
    if sizes is None:
        return
    if not sizes:
        raise ConfigError("cuda_graph_sizes is empty; use enforce_eager for no CUDA graphs")
    for size in sizes:
        _check_int("cuda_graph_sizes", size, 1)
        if size > max_num_seqs:
            raise ConfigError(
                f"cuda_graph_sizes holds {size}; it must be at most max_num_seqs, {max_num_seqs}"
            )


def _check_int(name: str, value: int | None, minimum: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {value!r}; it must be an integer, at least {minimum}")
    if not minimum <= value <= MAX_INT:
        raise ConfigError(f"{name} is {value}; it must be between {minimum} and {MAX_INT}")
