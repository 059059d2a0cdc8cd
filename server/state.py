"""What all handlers of one server share.

Owns: the engine's front, the tokenizer's thread and the names of live requests.
Thread-safety: none; one event loop.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict

from .. import __version__
from ..engine import (
    AsyncLLMEngine,
    EngineUnavailableError,
    LLMEngine,
    RequestStream,
)
from .config import ServerConfig
from .metrics import ServerMetrics
from .page_map_feed import PageMapFeed
from .template_source import load_template
from .text import TextProcessor
from .tracing import RequestTracer

CLOSE_SECONDS = 60.0
"""Longest wait for the end of the engine's step."""

HURRIED_CLOSE_SECONDS = 5.0


class ServerState:
    """One served model.

    Args:
        engine: its engine, started or not.
        config: the server's settings.
        model: what the model was loaded by.

    Raises ``ConfigError`` for a chat template that is none.

    Attributes:
        model_names: names that requests may give the model; the first is reported.
        created: when the server started, in seconds of the Unix clock.
        is_draining: whether it is about to end; streams without an end should.
        is_hurried: whether it is to end at once, and nobody waits for a step that hangs.
        metrics: what ``/metrics`` shows.
        tracer: what makes a span of each request, or None.
        page_map: the page map for whoever watches it.
    """

    def __init__(
        self, engine: AsyncLLMEngine, config: ServerConfig, *, model: str, created: int
    ) -> None:
        self.engine = engine
        self.config = config
        self.model_names = config.served_model_names or (model,)
        self.created = created
        self.is_draining = False
        self.is_hurried = False
        self.metrics = ServerMetrics(engine, model_name=self.model_name, version=__version__)
        endpoint = config.otlp_traces_endpoint
        self.tracer = None if endpoint is None else RequestTracer(endpoint, self.model_name)
        self.page_map = PageMapFeed(engine, self.model_name)
        path = config.chat_template
        self._chat_template = None if path is None else load_template(path)
        self._text: TextProcessor | None = None
        self._streams: dict[str, set[RequestStream]] = defaultdict(set)

    @property
    def model_name(self) -> str:
        """The name that responses report."""
        return self.model_names[0]

    @property
    def is_started(self) -> bool:
        """Whether everything that a request needs is there."""
        return self._text is not None

    @property
    def max_model_len(self) -> int | None:
        """Most tokens of a prompt and its answer; None before the engine started."""
        config = self.engine.config
        return None if config is None else config.max_model_len

    @property
    def text(self) -> TextProcessor:
        """The tokenizer. Raises ``EngineUnavailableError`` before the engine started."""
        if self._text is None:
            raise EngineUnavailableError("starting", "the engine is starting", 1.0)
        return self._text

    async def finish_start(self) -> None:
        """Wait for the engine, and get ready for text. Raises what loading raised."""
        await self.engine.wait_started()
        tokenizer = await self.engine.call(lambda engine: engine.tokenizer)
        self.metrics.set_cache_info(await self.engine.call(_cache_info))
        self._text = TextProcessor(tokenizer, self._chat_template)

    def add_stream(self, stream: RequestStream, *names: str) -> None:
        """Let a request be aborted by these names."""
        for name in names:
            self._streams[name].add(stream)

    def remove_stream(self, stream: RequestStream, *names: str) -> None:
        """Undo ``add_stream``."""
        for name in names:
            self._streams[name].discard(stream)
            if not self._streams[name]:
                del self._streams[name]

    def abort(self, name: str) -> int:
        """Abort the requests of that name; how many there were."""
        streams = [stream for stream in self._streams.get(name, ()) if not stream.is_ended]
        if not streams:  # the engine's thread may not have taken it yet
            return int(self.engine.abort(name))
        return sum(self.engine.abort(stream.request_id) for stream in streams)

    async def close(self) -> None:
        """Give everything back."""
        self.is_draining = True
        await self.engine.close(HURRIED_CLOSE_SECONDS if self.is_hurried else CLOSE_SECONDS)
        if self._text is not None:
            self._text.close()
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)


def _cache_info(engine: LLMEngine) -> dict[str, object]:
    """Labels of ``vllm:cache_config_info``: vLLM's, where there is such a thing, and our own."""
    config, cache, stats = engine.config, engine.backend.config, engine.kv_stats()
    block_bytes = config.block_size * cache.token_bytes
    return {
        "block_size": config.block_size,
        "cache_dtype": cache.layers[0].dtype,
        "enable_prefix_caching": config.enable_prefix_caching,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "kv_cache_memory_bytes": stats.capacity_bytes,
        "num_gpu_blocks": stats.capacity_bytes // block_bytes,
        "kv_backend": engine.backend.name,
        "page_bytes": stats.page_bytes,
        "token_bytes": cache.token_bytes,
        "tensor_parallel_size": config.tensor_parallel_size,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "kernel": engine.kernel_name,
        "forward": engine.forward_name,
    }
