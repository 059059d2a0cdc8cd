"""The command line: ``vmalloc generate`` and ``vmalloc info``.

Owns: argument parsing and what people read.  Thread-safety: none; one process, one command.

The one file that may import the engine from the library, and it does so lazily: ``--help`` loads
neither torch nor transformers.
"""

from __future__ import annotations

import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.style import Style

from .errors import ConfigError, VmallocError

if TYPE_CHECKING:
    from .engine import RequestOutput

EXIT_FAILED_REQUEST = 1
EXIT_BAD_INPUT = 2

app = typer.Typer(
    name="vmalloc",
    help="KV-cache memory for LLM inference as virtual memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


class Dtype(str, Enum):
    """Element types, as the option lists them."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Backend(str, Enum):
    """KV backends, as the option lists them."""

    AUTO = "auto"
    VIRTUAL = "virtual"
    PAGED = "paged"


_BOLD = Style(bold=True)
_SAMPLING = "Sampling"
_MEMORY = "Memory"


@app.command()
def generate(
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to go on from. Repeatable.")
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option(help="One prompt a line; a line that is a JSON string may hold newlines."),
    ] = None,
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="'demo' (bundled), a local folder, or a hub id."),
    ] = "demo",
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or hub id, if it is not the model's own.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Weights, activations and KV; auto is float32 on CPU.")
    ] = Dtype.AUTO,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
    ] = False,
    max_tokens: Annotated[
        int, typer.Option(help="Most tokens to generate per prompt.", rich_help_panel=_SAMPLING)
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(help="0 always takes the likeliest token.", rich_help_panel=_SAMPLING),
    ] = 0.0,
    top_k: Annotated[
        int,
        typer.Option(help="Sample from the k likeliest; 0 or -1: all.", rich_help_panel=_SAMPLING),
    ] = -1,
    top_p: Annotated[
        float,
        typer.Option(help="Sample from the likeliest that add up to p.", rich_help_panel=_SAMPLING),
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Same seed, same text; with --batch-invariant whatever else runs in the batch.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End a text at this string. Repeatable.", rich_help_panel=_SAMPLING),
    ] = None,
    ignore_eos: Annotated[
        bool, typer.Option(help="Go on past the end token.", rich_help_panel=_SAMPLING)
    ] = False,
    kv_backend: Annotated[
        Backend, typer.Option(help="Where K and V live.", rich_help_panel=_MEMORY)
    ] = Backend.AUTO,
    kv_cache_memory_bytes: Annotated[
        int | None,
        typer.Option(
            help="Hard cap on physical KV memory. Default: a quarter of what is available, at "
            "most what the sequences can use.",
            rich_help_panel=_MEMORY,
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Most tokens of a sequence, prompt included.", rich_help_panel=_MEMORY),
    ] = None,
    max_num_seqs: Annotated[
        int, typer.Option(help="Most sequences in one step.", rich_help_panel=_MEMORY)
    ] = 64,
    page_size: Annotated[
        int | None,
        typer.Option(help="Bytes of one physical page. Default: 64 KiB.", rich_help_panel=_MEMORY),
    ] = None,
    layers_per_group: Annotated[
        int | None,
        typer.Option(
            help="Layers whose K and V share one row; 1: a buffer per layer. Default: all.",
            rich_help_panel=_MEMORY,
        ),
    ] = None,
    commit_ahead: Annotated[
        int,
        typer.Option(
            help="Tokens backed ahead of each sequence by the worker thread; 0: no worker.",
            rich_help_panel=_MEMORY,
        ),
    ] = 4,
    batch_invariant: Annotated[
        bool,
        typer.Option(
            help="Make logits bitwise independent of batch mates.", rich_help_panel=_MEMORY
        ),
    ] = False,
) -> None:
    """Generate text, and show what the KV cache did meanwhile."""
    prompts = _read_prompts(prompt or [], prompts_file)
    _prepare_process(model)
    from .engine import LLM, SamplingParams

    params = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        max_tokens=max_tokens,
        stop=stop or None,
        ignore_eos=ignore_eos,
    )
    with LLM(
        model,
        tokenizer=tokenizer,
        dtype=dtype.value,
        kv_backend=kv_backend.value,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        page_size=page_size,
        layers_per_group=layers_per_group,
        commit_ahead_tokens=commit_ahead,
        seed=seed or 0,
        batch_invariant=batch_invariant,
    ) as llm:
        if as_json:
            outputs = llm.generate(prompts, params)
        else:
            printer = TextPrinter(prompts)
            outputs = llm.generate(prompts, params, use_tqdm=False, on_token=printer.add)
        from .memory_table import memory_report, memory_summary

        stats = llm.kv_stats()
        max_model_len = llm.config.max_model_len or 0
        max_length_bytes = stats.peak_live_seqs * llm.engine.backend.bytes_for(max_model_len)
        if as_json:
            result = {
                "outputs": [_output_dict(output) for output in outputs],
                "memory": memory_summary(stats, max_length_bytes),
            }
            sys.stdout.write(json.dumps(result) + "\n")
        else:
            console = Console()
            console.print(
                memory_report(stats, max_length_bytes, max_model_len, width=console.width)
            )
    errors = [output.error for output in outputs if output.error is not None]
    for error in errors:
        _complain(error)
    if errors:
        raise typer.Exit(EXIT_FAILED_REQUEST)


@app.command()
def info(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
    ] = False,
) -> None:
    """Show drivers, attention kernels, the backend that auto picks, and this host's limits."""
    _prepare_process()
    from .host_info import host_info, host_report

    facts = host_info()
    if as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        Console().print(host_report(facts))


class TextPrinter:
    """Prints texts in the order of the prompts, each as it comes."""

    def __init__(self, prompts: list[str]) -> None:
        self._prompts = prompts
        self._console = Console()
        self._pending = [""] * len(prompts)
        self._is_finished = [False] * len(prompts)
        self._current = -1
        self._next()

    def add(self, output: RequestOutput) -> None:
        """Take what is new of one request; show it if its prompt is the one on screen."""
        idx = int(output.request_id)
        self._pending[idx] += output.outputs[0].text
        self._is_finished[idx] = output.is_finished
        while self._current < len(self._prompts):
            self._write(self._pending[self._current])
            self._pending[self._current] = ""
            if not self._is_finished[self._current]:
                break
            self._write("\n\n")
            self._next()

    def _next(self) -> None:
        self._current += 1
        if self._current < len(self._prompts):
            prompt = self._prompts[self._current]
            self._write(_BOLD.render(prompt) if self._console.is_terminal else prompt)

    def _write(self, text: str) -> None:
        # Past the console, which would expand tabs and drop carriage returns of the model's text.
        self._console.file.write(text)
        self._console.file.flush()


def _read_prompts(prompts: list[str], prompts_file: Path | None) -> list[str]:
    """Prompts of the options, then those of the file."""
    result = list(prompts)
    if prompts_file is not None:
        try:
            # Bytes, and cut at newlines alone: form feeds and the like belong to a prompt.
            text = prompts_file.read_bytes().decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"prompts file is {str(prompts_file)!r}: {error}") from error
        lines = [line.removesuffix("\r") for line in text.split("\n")]
        result += [_read_prompt_line(line) for line in lines if line.strip()]
    if not result:
        raise ConfigError("there is no prompt; give --prompt TEXT or --prompts-file FILE")
    return result


def _read_prompt_line(line: str) -> str:
    if line.startswith('"') and line.rstrip().endswith('"'):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            return line
        if isinstance(value, str):
            return value
    return line


def _output_dict(output: RequestOutput) -> dict[str, object]:
    completion = output.outputs[0]
    result: dict[str, object] = {
        "prompt": output.prompt,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
    }
    if output.error is not None:
        result["error"] = output.error
    return result


def _prepare_process(model: str = "demo") -> None:
    os.environ.setdefault("GOMP_SPINCOUNT", "0")  # see vmalloc/engine/__init__.py
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if model == "demo":
        # Its weights load in milliseconds; a bar for them is noise above the text.
        from transformers.utils import logging

        logging.disable_progress_bar()


def _complain(text: object) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).out(f"error: {text}", highlight=False)


def main() -> None:
    """Entry point of the ``vmalloc`` command."""
    try:
        app()
    except VmallocError as error:
        _complain(error)
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    main()
