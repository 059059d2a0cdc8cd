"""``vmalloc serve --replicas N``: a Ray of its own on this machine, the application in it, its end.

Owns: the local Ray, Serve in it, and the process's signals.
Thread-safety: none; the main thread.
"""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from ...engine import ConfigError, VmallocError
from ...engine.memory_plan import plan_memory
from ..config import ServerConfig
from ..logs import setup_logs
from ..run import EXIT_FAILED, EXIT_OK, listen
from ..template_source import load_template
from .settings import ReplicaSettings

logger = logging.getLogger(__name__)

APP_NAME = "default"
WATCH_SECONDS = 2.0
"""Between two looks at whether Serve still lives."""

OBJECT_STORE_BYTES = 256 << 20
"""Shared memory for what Ray does not send directly: bodies of some 100 KB and more."""

_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it sends nothing anywhere
    # Named for where Ray thought of it first: every process stays on the loopback interface.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
}


class _StoppedError(BaseException):
    """A signal came, and whatever the main thread waits for is not worth it any more."""


class _Signals:
    """What SIGTERM and SIGINT ask for.

    Attributes:
        has_come: set at the first one.
        is_hurried: whether there was a second one.
    """

    def __init__(self) -> None:
        self.has_come = threading.Event()
        self.is_hurried = False
        self._is_serving = False

    def catch(self) -> None:
        """From now on they come here."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._take)

    def wait(self, seconds: float) -> bool:
        """Whether one came within so long a time, while requests are served."""
        self._is_serving = True
        return self.has_come.wait(seconds)

    def _take(self, number: int, frame: FrameType | None) -> None:
        is_first = not self.has_come.is_set()
        self.has_come.set()
        if is_first and self._is_serving:
            logger.info("%s: running requests get time to end", signal.Signals(number).name)
            return
        self.is_hurried = not is_first
        raise _StoppedError


def serve_replicas(settings: ReplicaSettings) -> int:
    """Serve a model by several replicas until SIGTERM or SIGINT; the exit code.

    A first signal drains: new requests get 503, running ones end, up to ``shutdown_timeout_s``. A
    second one ends at once, with the exit code 1 as requests may be lost.

    Raises ``ConfigError`` where nothing can listen, and for a model or setting that cannot work.
    """
    server = settings.server
    if server.uds is not None:
        raise ConfigError(f"uds is {server.uds!r}; replicas listen on host and port only")
    tensor_port = settings.engine.tensor_parallel_port
    if tensor_port is not None:
        raise ConfigError(
            f"tensor_parallel_port is {tensor_port}; replicas on one machine cannot share a port, "
            "leave it out"
        )
    setup_logs(server.log_format)
    port = _free_port(server)
    # What no replica could load is refused here, in a second.
    plan_memory(settings.model, settings.engine)
    if server.chat_template is not None:
        load_template(server.chat_template)
    signals = _Signals()
    signals.catch()
    try:
        with _local_ray(settings, signals):
            _start(settings, port)
            signals.catch()  # Ray has handlers of its own
            scheme = "http" if server.ssl_certfile is None else "https"
            logger.info("listening on %s://%s:%d%s", scheme, server.host, port, server.root_path)
            logger.info("ready")
            if not _wait(signals):
                return EXIT_FAILED
            _drain(server.shutdown_timeout_s)
            _stop_serve()
    except _StoppedError:
        return EXIT_FAILED if signals.is_hurried else EXIT_OK
    return EXIT_OK


def _free_port(config: ServerConfig) -> int:
    """The port, which Serve's proxy opens later. Raises ``ConfigError`` for one that is taken."""
    listener: socket.socket = listen(config)
    try:
        return int(listener.getsockname()[1])
    finally:
        listener.close()


@contextmanager
def _local_ray(settings: ReplicaSettings, signals: _Signals) -> Iterator[None]:
    """A Ray that nobody else reaches, and that ends with this block."""
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    # Without a token Ray writes one to the home directory.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    logging.getLogger("ray").setLevel(logging.WARNING)
    config = settings.replicas
    most = config.max_replicas or config.num_replicas
    num_cores = os.cpu_count() or 1
    logger.info("starting Ray for %d replicas", config.num_replicas)
    # Ray's own folder stays for ever, and all users may read and write it. The temporary folder of
    # the environment may be too long a name for its sockets.
    parent = os.environ.get("RAY_TMPDIR", "/tmp")
    with TemporaryDirectory(
        prefix="vmalloc-ray-", dir=parent, ignore_cleanup_errors=True
    ) as folder:
        try:
            try:
                ray.init(
                    address="local",
                    num_cpus=max(num_cores, math.ceil(config.cpus_per_replica * most)),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    logging_level=logging.WARNING,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=os.path.join(folder, "ray"),  # which it opens to all
                )
            except (OSError, RuntimeError, ValueError) as error:
                raise VmallocError(f"Ray did not start: {error}") from error
            signals.catch()
            yield
        finally:
            ray.shutdown()


def _start(settings: ReplicaSettings, port: int) -> None:
    """Serve, and the application in it. Raises ``VmallocError`` where no replica starts."""
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation
    from ray.serve.schema import LoggingConfig

    from .application import build_application

    server = settings.server
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(
            host=server.host,
            port=port,
            ssl_certfile=server.ssl_certfile,
            ssl_keyfile=server.ssl_keyfile,
        ),
        logging_config=quiet,
    )
    try:
        serve.run(build_application(settings), name=APP_NAME, logging_config=quiet)
    except RuntimeError as error:
        raise VmallocError(f"the replicas did not start: {_reason() or error}") from error


def _reason() -> str:
    """The last line of what kept a replica from starting."""
    from ray import serve

    application = serve.status().applications[APP_NAME]
    texts = [deployment.message for deployment in application.deployments.values()]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    errors = [line for line in lines if re.match(r"[\w.]*Error: ", line)]
    return errors[-1].partition(": ")[2] if errors else ""


def _wait(signals: _Signals) -> bool:
    """Until a signal comes; False if Serve ended before."""
    from ray import serve
    from ray.exceptions import RayError

    while not signals.wait(WATCH_SECONDS):
        try:
            status = serve.status().applications.get(APP_NAME)
        except RayError as error:
            logger.error("Serve does not answer any more: %s", error)
            return False
        if status is None or status.status == "DEPLOY_FAILED":
            logger.error("the application is gone: %s", status and status.message)
            return False
    return True


def _drain(timeout_s: float) -> None:
    from ray import serve

    handle: Any = serve.get_app_handle(APP_NAME)
    response = handle.broadcast("drain", timeout_s)
    if not all(response.results(timeout_s=timeout_s + 10.0)):
        logger.warning("some requests did not end in time; they are aborted")


def _stop_serve() -> None:
    from ray import serve

    serve.shutdown()


def with_cores(settings: ReplicaSettings) -> ReplicaSettings:
    """The settings, with this machine's cores shared out among the replicas."""
    config = settings.replicas
    most = config.max_replicas or config.num_replicas
    cores = max(1, (os.cpu_count() or 1) // most)
    return replace(settings, replicas=replace(config, cpus_per_replica=float(cores)))
