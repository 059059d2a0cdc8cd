"""Builds the Serve application: one ingress before the replicas of one model.

Owns: nothing.  Thread-safety: none; one process, one command.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from ...engine import EngineConfig
from .ingress import Ingress
from .replica import Replica
from .router import PrefixRouter
from .scaling import PagePolicy
from .settings import ReplicaConfig, ReplicaSettings

UNLIMITED = 1 << 20
"""Requests that Serve lets through: the engines count and refuse them themselves."""

STATS_SECONDS = 1.0
HEALTH_SECONDS = 5.0
HEALTH_TIMEOUT_SECONDS = 20.0
"""A replica that is silent so long is unwell; after three times Serve kills it."""

INGRESS_NAME = "ingress"
REPLICA_NAME = "replica"


def build_application(settings: ReplicaSettings) -> Any:
    """What ``serve.run`` takes, for these settings."""
    drain_s = settings.server.shutdown_timeout_s
    replica = serve.deployment(
        Replica,
        name=REPLICA_NAME,
        **_number(settings.replicas),
        max_ongoing_requests=UNLIMITED,
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=HEALTH_TIMEOUT_SECONDS,
        graceful_shutdown_timeout_s=drain_s + 5.0,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options=resources(settings),
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter,
            request_router_kwargs={
                "routing": settings.replicas.routing,
                "max_imbalance": settings.replicas.max_imbalance,
                "seed": settings.replicas.routing_seed,
            },
            request_routing_stats_period_s=STATS_SECONDS,
        ),
        logging_config=_quiet(),
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS_NAME,
        num_replicas=settings.replicas.num_ingresses,
        max_ongoing_requests=UNLIMITED,
        graceful_shutdown_timeout_s=drain_s + 5.0,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 0},
        logging_config=_quiet(),
    )
    # Which pages may call is the ingress's matter: a header that is there twice is none.
    server = replace(settings.server, allowed_origins=())
    return ingress.bind(settings, replica.bind(replace(settings, server=server)))


def num_gpus(settings: ReplicaSettings) -> float:
    """GPUs that Ray sets aside for one replica."""
    if settings.replicas.gpus_per_replica is not None:
        return settings.replicas.gpus_per_replica
    return float(settings.engine.tensor_parallel_size) if _runs_on_gpu(settings.engine) else 0.0


def _runs_on_gpu(config: EngineConfig) -> bool:
    if config.device != "auto":
        return config.device.startswith("cuda")
    import torch

    return torch.cuda.is_available()


def _number(config: ReplicaConfig) -> dict[str, Any]:
    if config.max_replicas is None:
        return {"num_replicas": config.num_replicas}
    scaling = AutoscalingConfig(
        min_replicas=config.num_replicas,
        max_replicas=config.max_replicas,
        upscale_delay_s=config.upscale_delay_s,
        downscale_delay_s=config.downscale_delay_s,
        policy=AutoscalingPolicy(
            policy_function=PagePolicy,
            policy_kwargs={
                "target_requests": config.target_requests,
                "target_page_usage": config.target_page_usage,
            },
        ),
    )
    return {"autoscaling_config": scaling}


def resources(settings: ReplicaSettings) -> dict[str, Any]:
    """What Ray sets aside for one replica, and the environment of its process."""
    num_cpus = settings.replicas.cpus_per_replica
    # Ranks share the cores of their replica.
    num_threads = max(1, int(num_cpus / settings.engine.tensor_parallel_size))
    variables = {
        # Read when the libraries are loaded, before any code of ours runs there.
        "OMP_NUM_THREADS": str(num_threads),
        "GOMP_SPINCOUNT": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    return {
        "num_cpus": num_cpus,
        "num_gpus": num_gpus(settings),
        "runtime_env": {"env_vars": variables},
    }


def _quiet() -> LoggingConfig:
    """The replicas log each request themselves."""
    return LoggingConfig(log_level="WARNING", enable_access_log=False)
