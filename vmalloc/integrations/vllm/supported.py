"""What the adapter refuses to run with, said before anything is allocated.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError
from .options import SCHEDULER_CLS, WORKER_CLS, ElasticOptions


def check_supported(vllm_config: Any) -> ElasticOptions:
    """The options of a configuration that the adapter can run.

    Raises:
        ConfigError: naming the setting, its value and what is supported.
    """
    parallel = vllm_config.parallel_config
    if parallel.worker_cls != WORKER_CLS:
        raise ConfigError(f"worker_cls is {parallel.worker_cls!r}; it must be {WORKER_CLS!r}")
    scheduler_cls = vllm_config.scheduler_config.scheduler_cls
    if scheduler_cls != SCHEDULER_CLS:
        raise ConfigError(f"scheduler_cls is {scheduler_cls!r}; it must be {SCHEDULER_CLS!r}")
    for name in (
        "pipeline_parallel_size",
        "data_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if getattr(parallel, name) != 1:
            raise ConfigError(f"{name} is {getattr(parallel, name)}; only 1 is supported")
    for name in ("kv_transfer_config", "speculative_config"):
        if getattr(vllm_config, name) is not None:
            raise ConfigError(f"{name} is set; the elastic KV cache does not support it")
    if vllm_config.attention_config.hisparse_config is not None:
        raise ConfigError("hisparse_config is set; the elastic KV cache does not support it")
    if vllm_config.device_config.device_type not in ("cpu", "cuda"):
        device = vllm_config.device_config.device_type
        raise ConfigError(f"the device is {device!r}; supported: cpu, cuda")
    return ElasticOptions.of(vllm_config)
