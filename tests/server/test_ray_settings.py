"""Settings of an application of replicas: by name, typed, and what is refused."""

from __future__ import annotations

import multiprocessing
import socket
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from vmalloc import cli
from vmalloc.engine import EngineConfig
from vmalloc.errors import ConfigError
from vmalloc.server import ray as replicas
from vmalloc.server.ray.local import serve_replicas
from vmalloc.server.ray.settings import ReplicaConfig, ReplicaSettings

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "serve.yaml"
Run = Callable[..., tuple[int, str]]

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``vmalloc serve`` in this process; (exit code, stderr)."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vmalloc", "serve", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), capsys.readouterr().err

    return call


def test_arguments_are_read_as_text_and_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMALLOC_API_KEY", "one two")
    settings = ReplicaSettings.from_args(
        {
            "model": "demo",
            "num_replicas": "2",
            "max_replicas": 4,
            "routing": "random",
            "max_num_seqs": "8",
            "enable_prefix_caching": "false",
            "shutdown_timeout_s": "2.5",
            "served_model_names": "a b",
            "tensor_parallel_size": "2",
        }
    )
    assert settings.replicas.num_replicas == 2
    assert settings.replicas.max_replicas == 4
    assert settings.replicas.routing == "random"
    assert settings.engine.max_num_seqs == 8
    assert settings.engine.enable_prefix_caching is False
    assert settings.engine.tensor_parallel_size == 2
    assert settings.server.shutdown_timeout_s == 2.5
    assert settings.server.served_model_names == ("a", "b")
    assert settings.server.api_keys == ("one", "two")
    assert ReplicaSettings.from_args({}) == ReplicaSettings(
        server=ReplicaSettings.from_args({}).server
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"num_replica": 2}, ["num_replica is not a known argument", "num_replicas"]),
        ({"num_replicas": 0}, ["num_replicas is 0", "between 1 and"]),
        ({"num_replicas": "two"}, ["num_replicas is 'two'", "integer"]),
        ({"num_replicas": 3, "max_replicas": 2}, ["max_replicas is 2", "between 3 and"]),
        ({"routing": "nearest"}, ["routing is 'nearest'", "'prefix' or 'random'"]),
        ({"port": 80}, ["port", "http_options"]),
        ({"max_num_seqs": 0}, ["max_num_seqs is 0"]),
        ({"target_page_usage": 1.5}, ["target_page_usage is 1.5", "at most 1"]),
        ({"cpus_per_replica": 0}, ["cpus_per_replica is 0", "above 0"]),
    ],
)
def test_what_is_unknown_or_cannot_work_is_named(args: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        ReplicaSettings.from_args(args)
    for word in words:
        assert word in str(caught.value)


def test_a_routing_that_is_none() -> None:
    with pytest.raises(ConfigError, match="supported: prefix, random"):
        ReplicaConfig(routing="nearest")  # type: ignore[arg-type]


@needs_ray
def test_no_replicas_are_refused(run: Run) -> None:
    code, err = run("demo", "--replicas", "0")
    assert code == cli.EXIT_BAD_INPUT
    assert "num_replicas is 0; it must be between 1 and 1024" in err


@needs_ray
def test_replicas_have_no_socket_of_unix(run: Run, tmp_path: Path) -> None:
    code, err = run("demo", "--replicas", "2", "--uds", str(tmp_path / "socket"))
    assert code == cli.EXIT_BAD_INPUT
    assert "uds is" in err


@needs_ray
def test_a_port_that_is_taken(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, err = run("demo", "--replicas", "2", "--port", str(port))
    assert code == cli.EXIT_BAD_INPUT
    assert f"port is {port}" in err


def test_ranks_of_several_replicas_have_no_port_in_common() -> None:
    engine = EngineConfig(tensor_parallel_size=2, tensor_parallel_port=4000)
    with pytest.raises(ConfigError, match="tensor_parallel_port is 4000"):
        serve_replicas(ReplicaSettings(engine=engine))


WITHOUT_RAY = ("run", "ray", *(f"ray.{name}" for name in ("local", "settings", "placement")))
WITHOUT_RAY += ("ray.prefix_keys", "ray.scaling", "ray.exchange")


def test_no_file_of_the_package_needs_ray_to_be_imported_but_those_that_serve_it() -> None:
    """``vmalloc serve`` and the tests of routing do without."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.server.preload"])
    process = context.Process(target=_import_without_ray)
    process.start()
    process.join()
    assert process.exitcode == 0


def _import_without_ray() -> None:
    for name in list(sys.modules):
        if name.startswith(("vmalloc.server", "ray.")):
            del sys.modules[name]
    sys.modules["ray"] = None  # type: ignore[assignment]
    for name in WITHOUT_RAY:
        import_module(f"vmalloc.server.{name}")


@needs_ray
def test_ranks_share_the_cores_of_their_replica() -> None:
    pytest.importorskip("ray.serve")  # which warns
    from vmalloc.server.ray.application import resources

    def threads(size: int, cores: float) -> str:
        settings = ReplicaSettings(
            engine=EngineConfig(tensor_parallel_size=size),
            replicas=ReplicaConfig(cpus_per_replica=cores),
        )
        found: str = resources(settings)["runtime_env"]["env_vars"]["OMP_NUM_THREADS"]
        return found

    assert [threads(*one) for one in ((1, 4.0), (2, 4.0), (4, 2.0), (1, 0.5))] == list("4211")


@needs_ray
def test_a_model_that_is_not_there(run: Run) -> None:
    code, err = run("/nowhere/at/all", "--replicas", "2", "--port", "0")
    assert code == cli.EXIT_BAD_INPUT
    assert "/nowhere/at/all" in err


def test_without_ray_it_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "find_spec", lambda name: None)
    code, err = run("demo", "--replicas", "2")
    assert code == cli.EXIT_BAD_INPUT
    assert "pip install 'vmalloc[ray]'" in err
    with pytest.raises(ConfigError, match="ray cannot be imported"):
        replicas.app({})


def test_the_example_is_one_that_serve_takes() -> None:
    schema = pytest.importorskip("ray.serve.schema")
    document = yaml.safe_load(EXAMPLE.read_text())
    deploy = schema.ServeDeploySchema.model_validate(document)
    (application,) = deploy.applications
    assert application.import_path == "vmalloc.server.ray:app"
    settings = ReplicaSettings.from_args(application.args)
    assert settings.replicas.max_replicas is not None
