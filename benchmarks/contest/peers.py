"""Who takes part: a worker, an environment and options each.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .environments import Environments
from .shapes import Shape

WORKERS = Path(__file__).parent / "workers"


@dataclass(frozen=True)
class Peer:
    """One engine in one configuration.

    Attributes:
        name: as on the command line.
        summary: as in tables.
        worker: file in ``WORKERS``.
        environment: name of its environment.
        options: passed to the worker.
        variables: environment variables of its process.
        is_ours: whether it is this project.
    """

    name: str
    summary: str
    worker: str
    environment: str
    options: dict[str, Any]
    variables: dict[str, str] = field(default_factory=dict)
    is_ours: bool = False

    def resolved_options(self, shape: Shape, environments: Environments) -> dict[str, Any]:
        """Options for this shape on this machine. Raises ``Unavailable``."""
        options = dict(self.options)
        if "batch" in options and options["batch"] is None:
            options["batch"] = shape.generate_batch
        if self.environment == "llama":
            options["server"] = str(environments.server())
        return options


VLLM_VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "vmalloc",
            "vmalloc, virtual",
            "ours.py",
            "vmalloc",
            {"kv_backend": "virtual"},
            is_ours=True,
        ),
        Peer(
            "vmalloc-paged",
            "vmalloc, paged",
            "ours.py",
            "vmalloc",
            {"kv_backend": "paged"},
            is_ours=True,
        ),
        Peer(
            "hf-generate",
            "transformers generate, dynamic cache",
            "hf_generate.py",
            "transformers",
            {"cache": "dynamic", "batch": None},
        ),
        Peer(
            "hf-static",
            "transformers generate, static cache, one batch",
            "hf_generate.py",
            "transformers",
            {"cache": "static", "batch": 0},
        ),
        Peer(
            "hf-continuous",
            "transformers continuous batching",
            "hf_continuous.py",
            "transformers",
            {"attention": "sdpa"},
        ),
        Peer(
            "vllm",
            "vLLM CPU, compiled",
            "vllm_cpu.py",
            "vllm",
            {"enforce_eager": False},
            VLLM_VARIABLES,
        ),
        Peer(
            "vllm-eager",
            "vLLM CPU, eager",
            "vllm_cpu.py",
            "vllm",
            {"enforce_eager": True},
            VLLM_VARIABLES,
        ),
        Peer("llama.cpp", "llama.cpp server, f32 weights", "llama_server.py", "llama", {}),
    )
}
DEFAULT_PEERS = tuple(name for name in PEERS if name != "vmalloc-paged")
CONTINUOUS_BATCHING = "hf-continuous"
