"""Options of ``vmalloc serve``: names, the config file, the dry run, and what is refused."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vmalloc import cli
from vmalloc.engine import EngineConfig
from vmalloc.engine.memory_plan import plan_memory
from vmalloc.errors import ConfigError
from vmalloc.server.config import ServerConfig

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``vmalloc serve`` in this process; (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vmalloc", "serve", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def plan(run: Run) -> Callable[..., dict[str, Any]]:
    """The plan that ``--dry-run --json`` prints."""

    def call(*arguments: str) -> dict[str, Any]:
        code, out, _ = run(*arguments, "--dry-run", "--json")
        assert code == 0
        document: dict[str, Any] = json.loads(out)
        return document

    return call


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "serve.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_the_model_is_named_as_an_argument_or_as_an_option(plan: Any, run: Run) -> None:
    settings = ("--kv-cache-memory-bytes", "10000000")
    by_argument, by_option = plan("demo", *settings), plan("--model", "demo", *settings)
    by_default, by_both = plan(*settings), plan("demo", "--model", "demo", *settings)
    for one in (by_argument, by_option, by_default, by_both):
        del one["available_bytes"]
        assert one == by_argument
    code, _, err = run("demo", "--model", "other")
    assert code == cli.EXIT_BAD_INPUT
    assert "'demo'" in err
    assert "'other'" in err


def test_the_dry_run_is_the_plan_of_the_same_settings(plan: Any) -> None:
    settings = {
        "max_num_seqs": 6,
        "max_model_len": 300,
        "page_size": 8192,
        "layers_per_group": 2,
        "kv_cache_memory_bytes": 4 << 20,
    }
    options = [
        text
        for name, value in settings.items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    options += ["--swap-space", "0.5", "--kv-backend", "virtual", "--commit-ahead", "0"]
    printed = plan("demo", *options)
    expected = plan_memory(
        "demo",
        EngineConfig(
            **settings, swap_space_bytes=2**29, kv_backend="virtual", commit_ahead_tokens=0
        ),
    )
    for name in ("cap_bytes", "reserved_bytes", "swap_space_bytes", "max_full_length_seqs"):
        assert printed[name] == getattr(expected, name)
    assert printed["layers_per_group"] == 2
    assert printed["swap_space_bytes"] == 2**29


def test_the_dry_run_prints_a_table_for_people(run: Run) -> None:
    code, out, _ = run("demo", "--dry-run")
    assert code == 0
    for words in ("Memory plan of demo", "KV cap", "Full sequences at once", "load probe"):
        assert words in out


def test_a_config_file_gives_options_and_the_command_line_wins(
    plan: Any, config_file: Callable[[str], str]
) -> None:
    path = config_file(
        "model: demo\nmax_num_seqs: 5\nkv-backend: paged\nkv_cache_memory_bytes: 10000000\n"
        "enable_prefix_caching: false\nseed:\n"
    )
    from_file = plan("--config", path)
    assert (from_file["max_num_seqs"], from_file["kv_backend"]) == (5, "paged")
    assert plan("--config", path, "--max-num-seqs", "7")["max_num_seqs"] == 7
    # Wherever it stands.
    assert plan("--max-num-seqs", "7", "--config", path)["max_num_seqs"] == 7
    assert plan("--config", config_file(""))["max_num_seqs"] == 64


def test_a_model_on_the_command_line_wins_over_the_one_in_a_config_file(
    plan: Any, config_file: Callable[[str], str]
) -> None:
    path = config_file("model: no/such/model\n")
    assert plan("demo", "--config", path)["model"] == "demo"
    assert plan("--model", "demo", "--config", path)["model"] == "demo"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_num_seq: 5", "'max_num_seq'.*did you mean 'max-num-seqs'"),
        ("bananas: 5", "'bananas'; there is no such option$"),
        ("config: x.yaml", "'config'.*no such option"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "'max-num-seqs' twice"),
        ("- max-num-seqs", "holds a list"),
        ("a: [", "cannot be read"),
        ("port: [1, 2]", "port is .1, 2.; it takes one value"),
        ("port: true", "port is True; it must be text or a number"),
        ("enforce-eager: 3", "enforce-eager is 3; it must be true or false"),
        ("api-key: {a: b}", "it must be text or a number"),
    ],
)
def test_a_bad_config_file_is_refused_by_name(
    run: Run, config_file: Callable[[str], str], text: str, words: str
) -> None:
    path = config_file(text)
    code, out, err = run("--config", path, "--dry-run")
    assert code == cli.EXIT_BAD_INPUT
    assert out == ""
    assert path in err
    assert re.search(words, err.strip().replace("\n", " "))


def test_values_of_a_config_file_are_checked_as_on_the_command_line(
    run: Run, config_file: Callable[[str], str]
) -> None:
    for text, words in (
        ("port: 80.5", "--port"),
        ("max-num-seqs: many", "--max-num-seqs"),
        ("kv-backend: blocks", "--kv-backend"),
    ):
        code, _, err = run("--config", config_file(text), "--dry-run")
        assert code == cli.EXIT_BAD_INPUT
        assert words in err
    code, _, err = run("--config", config_file("max-num-seqs: 0"), "--dry-run")
    assert (code, err.startswith("error: max_num_seqs is 0")) == (cli.EXIT_BAD_INPUT, True)


def test_a_config_file_that_is_not_there_is_named(run: Run) -> None:
    code, _, err = run("--config", "no/such.yaml")
    assert code == cli.EXIT_BAD_INPUT
    assert "no/such.yaml" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--json"], "--dry-run"),
        (["no/such-model", "--dry-run"], "no/such-model"),
        (["--dry-run", "--max-model-len", "4096"], "max_model_len is 4096.*2048"),
        (["--dry-run", "--swap-space", "-1"], "swap_space_bytes is -1073741824"),
        (["--dry-run", "--max-logprobs", "-1"], "max_logprobs is -1"),
    ],
)
def test_bad_input_exits_with_2_and_names_the_value(
    run: Run, arguments: list[str], words: str
) -> None:
    code, _, err = run(*arguments)
    assert code == cli.EXIT_BAD_INPUT
    assert re.search(words, err.replace("\n", " "))


@pytest.fixture
def serve_with(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, ...]]:
    """What the server would be run with."""
    import vmalloc.server.run

    def call(*arguments: str) -> tuple[Any, ...]:
        seen: list[tuple[Any, ...]] = []

        def keep(*args: Any) -> int:
            seen.append(args)
            return 7

        monkeypatch.setattr(vmalloc.server.run, "serve", keep)
        code, _, err = run(*arguments)
        assert code == 7, err
        return seen[0]

    return call


def test_the_defaults_are_those_of_the_configs(serve_with: Any) -> None:
    model, tokenizer, engine_config, server_config = serve_with()
    assert (model, tokenizer) == ("demo", None)
    assert engine_config == EngineConfig()
    assert server_config == ServerConfig()


def test_what_ranks_refuse_arrives_without_them(serve_with: Any) -> None:
    _, _, engine_config, _ = serve_with("--compile")
    assert engine_config.compile is True


def test_every_option_arrives(serve_with: Any, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("template", "cert", "key")}
    for path in files.values():
        path.write_text("x")
    model, tokenizer, engine_config, server_config = serve_with(
        *("some/model", "--tokenizer", "other", "--dtype", "bfloat16", "--device", "cpu"),
        *("--host", "0.0.0.0", "--port", "9", "--uds", "/tmp/s", "--root-path", "/llm"),
        *("--served-model-name", "a", "--served-model-name", "b"),
        *("--chat-template", str(files["template"]), "--allowed-origins", "https://x"),
        *("--sse-keep-alive-interval", "3", "--ssl-certfile", str(files["cert"])),
        *("--ssl-keyfile", str(files["key"]), "--api-key", "k1", "--api-key", "k2"),
        *("--admin-api-key", "k3", "--max-num-queued-reqs", "4", "--queue-timeout", "5"),
        *("--request-timeout", "6", "--max-body-bytes", "7", "--max-logprobs", "8"),
        *("--body-timeout", "9"),
        *("--shutdown-timeout", "9", "--health-timeout", "10", "--release-idle-after", "0"),
        *("--log-format", "json", "--enable-log-requests", "--disable-log-stats"),
        *("--otlp-traces-endpoint", "http://c", "--seed", "11", "--enforce-eager"),
        *("--fused", "off"),
        *("--no-enable-prefix-caching", "--batch-invariant", "--preemption-mode", "swap"),
        *("--scheduling-policy", "priority", "--commit-policy", "oracle", "--block-size", "12"),
        *("--gpu-memory-utilization", "0.5", "--kv-driver", "host", "--kv-backend", "virtual"),
        *("--tensor-parallel-size", "2", "--tensor-parallel-port", "7"),
        *("--tensor-parallel-timeout", "5.5"),
    )
    assert (model, tokenizer) == ("some/model", "other")
    assert server_config == ServerConfig(
        host="0.0.0.0",
        port=9,
        uds="/tmp/s",
        api_keys=("k1", "k2"),
        admin_api_keys=("k3",),
        served_model_names=("a", "b"),
        chat_template=str(files["template"]),
        max_queued_requests=4,
        queue_timeout_s=5.0,
        request_timeout_s=6.0,
        max_body_bytes=7,
        body_timeout_s=9.0,
        allowed_origins=("https://x",),
        sse_keep_alive_s=3.0,
        shutdown_timeout_s=9.0,
        health_timeout_s=10.0,
        release_idle_after_s=None,
        root_path="/llm",
        ssl_certfile=str(files["cert"]),
        ssl_keyfile=str(files["key"]),
        log_format="json",
        log_requests=True,
        log_stats=False,
        otlp_traces_endpoint="http://c",
    )
    assert engine_config == EngineConfig(
        device="cpu",
        dtype="bfloat16",
        kv_backend="virtual",
        kv_driver="host",
        gpu_memory_utilization=0.5,
        enforce_eager=True,
        fused="off",
        scheduling_policy="priority",
        preemption_mode="swap",
        enable_prefix_caching=False,
        block_size=12,
        commit_policy="oracle",
        seed=11,
        batch_invariant=True,
        max_logprobs=8,
        tensor_parallel_size=2,
        tensor_parallel_port=7,
        tensor_parallel_timeout_s=5.5,
    )


def test_keys_come_from_the_environment_and_from_a_file(
    serve_with: Any, config_file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file("api-key: [f1, f2]\nserved-model-name: one\nport: 81\n")
    server_config = serve_with("--config", path)[3]
    assert server_config.api_keys == ("f1", "f2")
    assert server_config.served_model_names == ("one",)
    assert server_config.port == 81
    monkeypatch.setenv("VMALLOC_API_KEY", "e1 e2")
    monkeypatch.setenv("VMALLOC_ADMIN_API_KEY", "e3")
    server_config = serve_with("--config", path)[3]
    assert server_config.api_keys == ("e1", "e2")
    assert server_config.admin_api_keys == ("e3",)
    assert serve_with("--config", path, "--api-key", "c1")[3].api_keys == ("c1",)


def test_what_is_not_installed_is_named_with_its_extra() -> None:
    with pytest.raises(ConfigError, match=r"no_such_module.*pip install 'vmalloc\[server\]'"):
        cli._check_extra("server", ("json", "no_such_module"))


def test_vllms_names_and_our_own_are_all_in_the_help(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("VMALLOC_API_KEY", "secret-key")
    code, out, _ = run("--help")
    assert code == 0
    for option in (
        *("--host", "--port", "--uds", "--api-key", "--admin-api-key", "--served-model-name"),
        *("--chat-template", "--max-num-queued-reqs", "--queue-timeout", "--request-timeout"),
        *("--max-body-bytes", "--max-logprobs", "--allowed-origins", "--sse-keep-alive-interval"),
        *("--body-timeout",),
        *("--shutdown-timeout", "--health-timeout", "--release-idle-after", "--root-path"),
        *("--ssl-certfile", "--ssl-keyfile", "--log-format", "--enable-log-requests"),
        *("--disable-log-stats", "--otlp-traces-endpoint", "--config", "--dry-run", "--tokenizer"),
        *("--max-model-len", "--max-num-seqs", "--max-num-batched-tokens", "--page-size"),
        *("--gpu-memory-utilization", "--kv-cache-memory-bytes", "--kv-backend", "--swap-space"),
        *("--layers-per-group", "--commit-ahead", "--block-size", "--enable-prefix-caching"),
        *("--scheduling-policy", "--preemption-mode", "--batch-invariant", "--dtype", "--device"),
    ):
        assert option in out
    for panel in ("HTTP", "Access", "Limits and timeouts", "Logs and traces", "KV memory"):
        assert panel in out
    assert "VMALLOC_API_KEY" in out
    assert "secret-key" not in out
