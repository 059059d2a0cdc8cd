"""The command line over the bundled model: what goes to stdout, exit codes, and clear errors."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vmalloc import cli

EXECUTABLE = Path(sys.executable).with_name("vmalloc")
OUTPUT_KEYS = {"prompt", "index", "text", "token_ids", "finish_reason", "num_cached_tokens"}


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process; (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["vmalloc", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return call


def generate_json(run, *arguments):
    code, out, _ = run("generate", "--model", "demo", "--json", "--max-tokens", "12", *arguments)
    assert code == 0
    return json.loads(out)


def test_json_is_one_object_and_nothing_else_on_stdout():
    result = subprocess.run(
        [EXECUTABLE, "generate", "--json", "-p", "def ", "-p", "import ", "--max-tokens", "8"],
        capture_output=True,
        text=True,
        check=True,
    )
    document = json.loads(result.stdout)
    assert set(document) == {
        *("outputs", "memory", "ranks", "kernel", "forward", "scheduler", "prefix_cache"),
    }
    assert document["ranks"] == []  # one process is no rank
    assert [output["prompt"] for output in document["outputs"]] == ["def ", "import "]
    for output in document["outputs"]:
        assert set(output) == OUTPUT_KEYS
        assert len(output["token_ids"]) == 8
        assert output["text"]
        assert output["finish_reason"] == "length"
    memory = document["memory"]
    assert memory["reserved_bytes"] > memory["max_length_bytes"] > memory["peak_committed_bytes"]
    assert memory["peak_committed_bytes"] >= memory["peak_live_bytes"] > 0
    assert memory["critical_pages"] + memory["background_pages"] > 0
    assert memory["created_pages"] == (
        memory["committed_pages"]
        + memory["ahead_pages"]
        + memory["parked_pages"]
        + memory["cached_pages"]
        + memory["free_pages"]
        + memory["retired_pages"]
    )


def test_text_is_printed_in_the_order_of_the_prompts_with_the_memory_table(run):
    code, out, _ = run("generate", "-p", "def ", "-p", "import ", "--max-tokens", "8")
    assert code == 0
    assert out.index("def ") < out.index("import ") < out.index("KV cache memory")
    for words in (
        "Address space reserved",
        "Pages created",
        "parked now",
        "Map calls",
        "Stall time",
    ):
        assert words in out


def test_several_completions_are_numbered_and_share_their_prompt(run):
    several = ("-p", "def ", "--n", "3", "--seed", "2")
    document = generate_json(run, *several)
    assert [output["index"] for output in document["outputs"]] == [0, 1, 2]
    assert document["memory"]["cow_copies"] > 0
    code, out, _ = run("generate", *several, "--max-tokens", "12")
    assert code == 0
    for idx, output in enumerate(document["outputs"]):
        assert f"[{idx + 1}/3] def {output['text']}" in out


@pytest.mark.parametrize("backend", ["virtual", "paged"])
def test_beams_come_best_first_and_name_their_kernel(run, backend):
    document = generate_json(
        run, "-p", "def ", "--n", "2", "--use-beam-search", "--kv-backend", backend
    )
    first, second = document["outputs"]
    assert first["cumulative_logprob"] > second["cumulative_logprob"]
    assert ("block_table" in document["kernel"]) == (backend == "paged")


def test_a_shared_prompt_is_computed_once_unless_told_otherwise(run):
    text = "x = 1\n" * 40
    twice = ("-p", text, "-p", text, "--max-num-seqs", "1")
    shared = generate_json(run, *twice)
    assert shared["outputs"][1]["num_cached_tokens"] > 50
    assert shared["prefix_cache"]["hit_tokens"] > 50
    alone = generate_json(run, *twice, "--no-enable-prefix-caching")
    assert alone["outputs"][1]["num_cached_tokens"] == 0
    for one, other in zip(shared["outputs"], alone["outputs"], strict=True):
        assert one["token_ids"] == other["token_ids"]


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_preemption_shows_in_the_table_and_not_in_the_text(run, mode):
    prompts = ("-p", "import ", "-p", "def ", "-p", "class ", "--max-tokens", "60")
    free = generate_json(run, *prompts)
    tight = (*prompts, "--preemption-mode", mode, "--page-size", "4096")
    tight = (*tight, "--kv-cache-memory-bytes", str(4096 * 100))
    document = generate_json(run, *tight)
    assert document["scheduler"][f"preempt_{mode}"] > 0
    for one, other in zip(free["outputs"], document["outputs"], strict=True):
        assert one["token_ids"] == other["token_ids"]
    _, out, _ = run("generate", *tight)
    assert f"Preempted by {mode}" in out


def test_printed_text_is_the_generated_text(run):
    expected = generate_json(run, "-p", "class Stack:")["outputs"][0]["text"]
    code, out, _ = run("generate", "-p", "class Stack:", "--max-tokens", "12")
    assert code == 0
    assert ("class Stack:" + expected) in out


def test_seed_repeats_a_sample_whatever_runs_beside_it(run):
    alone = generate_json(run, "-p", "def ", "--temperature", "0.9", "--seed", "7")
    again = generate_json(run, "-p", "def ", "-p", "x", "--temperature", "0.9", "--seed", "7")
    other = generate_json(run, "-p", "def ", "--temperature", "0.9", "--seed", "8")
    assert alone["outputs"][0]["token_ids"] == again["outputs"][0]["token_ids"]
    assert alone["outputs"][0]["token_ids"] != other["outputs"][0]["token_ids"]


def test_prompts_file_has_a_prompt_a_line_and_json_strings_for_newlines(run, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('def f(x):\n\n"class A:\\n    x"\n"not json\n')
    outputs = generate_json(run, "--prompts-file", str(path))["outputs"]
    assert [output["prompt"] for output in outputs] == ["def f(x):", "class A:\n    x", '"not json']


def test_page_size_and_layers_per_group_change_memory_and_not_the_text(run):
    prompt = ("-p", "import ", "--max-tokens", "24")
    plain = generate_json(run, *prompt)
    small = generate_json(run, *prompt, "--page-size", "4096", "--layers-per-group", "1")
    assert small["outputs"] == plain["outputs"]
    assert small["memory"]["page_bytes"] == 4096
    assert small["memory"]["peak_committed_bytes"] < plain["memory"]["peak_committed_bytes"]


def test_a_request_that_cannot_fit_fails_alone_and_is_named(run):
    code, out, err = run(
        *("generate", "--json", "-p", "def ", "-p", "x = 1\n" * 60, "--max-tokens", "4"),
        *("--kv-cache-memory-bytes", str(4 * 65536)),
    )
    assert code == cli.EXIT_FAILED
    outputs = json.loads(out)["outputs"]
    assert outputs[0]["finish_reason"] == "length"
    assert outputs[1]["finish_reason"] == "error"
    assert "262144 bytes" in outputs[1]["error"]
    assert "262144 bytes" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "x", "--model", "no/such-model"], "no/such-model"),
        ([], "there is no prompt"),
        (["-p", ""], "prompt is empty"),
        (["-p", "x" * 20_000], "max_model_len, 2048"),
        (["-p", "x", "--max-tokens", "-1"], "max_tokens is -1"),
        (["-p", "x", "--max-tokens", "0"], "max_tokens is 0"),
        (["-p", "x", "--temperature", "-2"], "temperature is -2"),
        (["-p", "x", "--top-p", "1.5"], "top_p is 1.5"),
        (["-p", "x", "--page-size", "5000"], "page_bytes is 5000.*4096"),
        (["-p", "x", "--layers-per-group", "9"], "layers_per_group is 9.*4"),
        (["-p", "x", "--kv-cache-memory-bytes", "65536"], "holds 4 pages of 16384 bytes"),
        (["-p", "x", "--device", "tpu"], "device is 'tpu'.*cuda:N"),
        (["-p", "x", "--device", "cuda:4095"], "device is 'cuda:4095'.*GPU"),
        (["-p", "x", "--device", "cpu", "--dtype", "float16"], "dtype is 'float16'.*bfloat16"),
        (["-p", "x", "--kv-driver", "null"], "kv_driver is 'null'"),
        (["-p", "x", "--gpu-memory-utilization", "0"], "gpu_memory_utilization is 0"),
        (["-p", "x", "--max-model-len", "4096"], "max_model_len is 4096.*2048"),
        (["-p", "x", "--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["-p", "x", "--max-num-seqs", "100000000"], "200000000 slots"),
        (["-p", "x", "--block-size", "0"], "block_size is 0"),
        (["-p", "x", "--swap-space", "-1"], "swap_space_bytes is -1073741824"),
        (["-p", "x", "--n", "65"], "n is 65.*max_num_seqs, 64"),
        (["-p", "x", "--n", "2", "--best-of", "1"], "best_of is 1"),
        (["-p", "x", "--priority", "3"], "priority is 3.*scheduling_policy"),
        (["--prompts-file", "no/such/file"], "no/such/file"),
    ],
)
def test_bad_input_exits_with_2_and_names_the_value(run, arguments, words):
    code, out, err = run("generate", "--json", *arguments)
    assert code == cli.EXIT_BAD_INPUT
    assert out == ""
    assert err.startswith("error: ")
    assert re.search(words, err.replace("\n", " "))


def test_a_model_that_is_no_decoder_is_refused_by_name(run, tmp_path):
    from transformers import T5Config

    T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=1, vocab_size=32).save_pretrained(
        tmp_path
    )
    code, _, err = run("generate", "-p", "x", "--model", str(tmp_path))
    assert code == cli.EXIT_BAD_INPUT
    assert "encoder-decoder" in err


@pytest.mark.parametrize(
    "arguments", [["--no-such-option"], ["--dtype", "int3"], ["--max-tokens", "x"]]
)
def test_unknown_options_exit_with_2(run, arguments):
    code, _, _ = run("generate", "-p", "x", *arguments)
    assert code == cli.EXIT_BAD_INPUT


def test_the_commands_are_listed_and_bench_explains_itself(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = run("--help")
    assert code == 0
    for command in ("generate", "serve", "bench", "top", "info"):
        assert command in out
    code, out, _ = run("bench", "--help")
    assert code == 0
    for option in (
        *("--num-prompts", "--request-rate", "--max-concurrency", "--seed", "--endpoint"),
        *("--model", "--api-key", "--goodput", "--json", "--output", "--time-limit"),
        *("--input-len", "--output-len", "--length-spread", "--ignore-eos"),
    ):
        assert option in out


def test_help_shows_every_option_with_a_text(run):
    code, out, _ = run("generate", "--help")
    assert code == 0
    for option in ("--prompt", "--max-tokens", "--temperature", "--kv-backend", "--page-size"):
        assert option in out
