"""The command line with several ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmalloc import cli
from vmalloc.engine import ConfigError, RankLostError, VmallocError

REPOSITORY = Path(__file__).parents[1]


def generate(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "vmalloc.cli", "generate", "-p", "def ", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
        check=False,
    )


def test_generate_tells_what_each_rank_did():
    result = generate("--max-tokens", "8", "--tensor-parallel-size", "2", "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert len(document["outputs"][0]["token_ids"]) == 8
    first, second = document["ranks"]
    assert (first["rank"], second["rank"]) == (0, 1)
    whole = document["memory"]
    for rank in (first, second):
        memory = rank["memory"]
        assert 2 * memory["page_bytes"] == whole["page_bytes"]
        assert 2 * memory["peak_committed_bytes"] == whole["peak_committed_bytes"] > 0
        assert 2 * memory["max_length_bytes"] == whole["max_length_bytes"]
        assert memory["created_pages"] == whole["created_pages"] > 0
        assert rank["peak_rss_bytes"] > 50 << 20
    assert "Loading weights" not in result.stderr


def test_generate_has_a_table_of_ranks():
    result = generate("--max-tokens", "2", "--tensor-parallel-size", "2")
    assert result.returncode == 0, result.stderr
    assert "KV cache memory of 2 ranks" in result.stdout
    assert "Each rank" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tensor-parallel-size", "0"), "tensor_parallel_size is 0"),
        (("--tensor-parallel-size", "3"), "tensor_parallel_size is 3"),
        (("--tensor-parallel-timeout", "0"), "tensor_parallel_timeout_s is 0"),
        (("--tensor-parallel-port", "70000"), "tensor_parallel_port is 70000"),
    ],
)
def test_what_cannot_work_is_bad_input(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["vmalloc", "generate", "-p", "x", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == cli.EXIT_BAD_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_a_lost_rank_is_no_bad_input(monkeypatch, capsys):
    for error, code in (
        (RankLostError(1, "it ended"), cli.EXIT_FAILED),
        (ConfigError("n is 0"), cli.EXIT_BAD_INPUT),
        (VmallocError("nothing answers"), cli.EXIT_BAD_INPUT),
    ):

        def fail(error=error):
            raise error

        monkeypatch.setattr(cli, "app", fail)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == code
        assert capsys.readouterr().err == f"error: {error}\n"
