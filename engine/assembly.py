"""Puts an engine together: checks the model, measures, makes the cache, records decodes.

Owns: nothing; it hands over what it made.  Thread-safety: none; one engine thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..backend import KVBackend
from ..errors import ConfigError
from ..kernels.decoder_cpu import CpuDecoder
from ..kernels.select import AttentionKernels
from .cache_factory import CacheFactory
from .cache_setup import create_cache, resolve_config, resolve_max_model_len
from .compiled_model import compile_model
from .compute_stream import ComputeStream, current_stream_handle
from .config import EngineConfig
from .decode_graphs import (
    CudaGraphRecorder,
    DecodeGraphs,
    EagerRecorder,
    Recorder,
    batch_sizes,
)
from .device_memory import GRAPH_BYTES, kv_capacity, measure_use, run_largest_step
from .devices import check_dtype, module_device
from .fused import FusedForward, choose_fused
from .invariance import check_batch_invariance
from .model_lease import ModelLease
from .model_runner import ModelRunner
from .packed_forward import ForwardPass, MakeForward, PackedForward
from .probe import probe_model
from .progress import watch_start_up
from .startup import StartupPhases

logger = logging.getLogger(__name__)

MAX_REASON_CHARS = 400
"""Compilers explain themselves at length."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of.

    Attributes:
        config: its settings, every None filled in.
        stream: where its work is enqueued.
        lease: its hold on the model.
        backend: the KV cache.
        kernels: the attention kernels over it.
        runner: the forward passes.
        fused_refusal: None where native code computes them; else why the model does so itself.
    """

    config: EngineConfig
    stream: ComputeStream
    lease: ModelLease
    backend: KVBackend
    kernels: AttentionKernels
    runner: ModelRunner
    fused_refusal: str | None


def assemble(
    model: torch.nn.Module,
    config: EngineConfig,
    owner: Any,
    *,
    phases: StartupPhases,
    recorder: Recorder | None = None,
    least: Callable[[Sequence[int]], list[int]] = list,
) -> EngineParts:
    """Make the parts of an engine, ``owner``, or leave the model as it was.

    ``recorder``: what decodes are recorded with; None: what the settings and the device say.
    ``phases`` times each part of it. ``least``: the smallest of what the ranks of an engine have of
    each of some numbers; ranks are assembled in lock step.

    Raises ``UnsupportedModelError`` if the model fails the load probe, ``ConfigError`` for a
    setting that cannot work and for a model that another engine has.
    """
    device = module_device(model, config.device)
    check_dtype(next(model.parameters()).dtype, device)
    max_model_len = resolve_max_model_len(model, config)
    caches = CacheFactory(device, config.kv_backend, config.kv_driver)
    stream = ComputeStream(device)
    lease = ModelLease(model, max_model_len, owner=owner)
    try:
        with stream.use():
            with phases.phase("probe model"):
                probed = probe_model(model, caches)
                decoder = choose_fused(model, probed, caches, config, max_model_len)
                make_forward = _forward_maker(model, decoder)
                # Its rows give the same bits in any batch as they are.
                pads_rows = config.batch_invariant and isinstance(decoder, str)
                if config.batch_invariant:
                    check_batch_invariance(model, probed, caches, make_forward, pads_rows=pads_rows)
            with phases.phase("reserve KV cache"):
                limit = _device_limit(model, config, device, max_model_len)
                config = resolve_config(config, probed.layers, max_model_len, device, limit, least)
                backend, kernels = create_cache(config, probed, caches)
            try:
                forward = make_forward(backend, kernels)
                with phases.phase("record decodes"):
                    decodes = _make_decodes(model, forward, backend, kernels, config, recorder)
            except BaseException:
                backend.close()
                raise
            runner = ModelRunner(
                forward,
                backend,
                device,
                pads_rows=pads_rows,
                decodes=decodes,
            )
            refusal = decoder if isinstance(decoder, str) else None
            return EngineParts(config, stream, lease, backend, kernels, runner, refusal)
    except BaseException:
        lease.give_back()
        raise


def _forward_maker(model: torch.nn.Module, decoder: CpuDecoder | str) -> MakeForward:
    if isinstance(decoder, str):
        return partial(PackedForward, model)
    return lambda backend, kernels: FusedForward(decoder, backend)


def _device_limit(
    model: torch.nn.Module, config: EngineConfig, device: torch.device, max_model_len: int
) -> int | None:
    """Bytes of KV that a GPU has room for; None on the CPU, and where the settings say."""
    if device.type == "cpu" or config.kv_cache_memory_bytes is not None:
        return None
    run = partial(
        run_largest_step,
        model,
        num_tokens=config.step_tokens,
        num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
    )
    return kv_capacity(measure_use(run, device, graph_bytes(config)), config.gpu_memory_utilization)


def graph_bytes(config: EngineConfig) -> int:
    """What is set aside on a GPU for the CUDA graphs of decodes."""
    return 0 if config.enforce_eager else GRAPH_BYTES * len(_sizes(config))


def _sizes(config: EngineConfig) -> tuple[int, ...]:
    if config.cuda_graph_sizes is not None:
        return tuple(sorted(set(config.cuda_graph_sizes)))
    return batch_sizes(config.max_num_seqs)


def _make_decodes(
    model: torch.nn.Module,
    forward: ForwardPass,
    backend: KVBackend,
    kernels: AttentionKernels,
    config: EngineConfig,
    recorder: Recorder | None,
) -> DecodeGraphs | None:
    """What decodes go through, recorded as far as that is done at start; None: nothing."""
    device = torch.device(config.device)
    if recorder is None:
        recorder = _choose_recorder(kernels, config, device)
        if recorder is None:
            return None
    if config.compile:
        forward = PackedForward(
            model, backend, kernels, partial(compile_model, num_sizes=len(_sizes(config)))
        )
    decodes = DecodeGraphs(forward, backend, recorder, _sizes(config), device)
    if not (config.compile or device.type == "cuda"):
        return decodes  # there is nothing to do ahead of time
    step = backend.begin_step(current_stream_handle(device))
    try:
        what = "Compiling decodes" if config.compile else "Capturing CUDA graphs"
        decodes.warm_up(partial(watch_start_up, what))
    except Exception as error:
        if not config.compile:
            raise
        reason = " ".join(str(error).split())[:MAX_REASON_CHARS]
        raise ConfigError(
            f"compile is True; {type(model).__name__} cannot be compiled: "
            f"{type(error).__name__}: {reason}"
        ) from error
    finally:
        backend.end_step(step)
    return decodes


def _choose_recorder(
    kernels: AttentionKernels, config: EngineConfig, device: torch.device
) -> Recorder | None:
    if config.batch_invariant:  # its rows are padded in another way
        return None
    if device.type == "cuda" and not config.enforce_eager:
        if kernels.is_graph_safe:
            return CudaGraphRecorder(device)
        logger.warning(
            "decodes run without CUDA graphs: %r kernels cannot be captured", kernels.name
        )
    return EagerRecorder() if config.compile else None
