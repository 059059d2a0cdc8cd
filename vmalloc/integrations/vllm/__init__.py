"""vLLM (V1) with a KV cache that takes memory as it is used and gives it back.

Two of vLLM's own switches turn it on; nothing of vLLM is changed, and without them it is stock::

    from vllm import LLM
    from vmalloc.integrations.vllm import engine_args

    llm = LLM("my/model", **engine_args())

    vllm serve my/model --worker-cls vmalloc.integrations.vllm.ElasticWorker \\
        --scheduler-cls vmalloc.integrations.vllm.ElasticScheduler

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .versions import SUPPORTED, check_version

check_version()

from .options import ElasticOptions, engine_args  # noqa: E402

if TYPE_CHECKING:
    from .scheduler import ElasticScheduler
    from .worker import ElasticWorker

__all__ = ["SUPPORTED", "ElasticOptions", "ElasticScheduler", "ElasticWorker", "engine_args"]


def __getattr__(name: str) -> Any:
    # vLLM resolves the two classes by name in its own processes; importing this package for
    # engine_args must not load half of vLLM first.
    if name == "ElasticScheduler":
        from .scheduler import ElasticScheduler

        return ElasticScheduler
    if name == "ElasticWorker":
        from .worker import ElasticWorker

        return ElasticWorker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
