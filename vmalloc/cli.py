"""The command line: ``vmalloc generate`` and ``vmalloc info``.

Owns: what people read; the options are in ``cli_options.py``.
Thread-safety: none; one process, one command.

The one file that may import the engine from the library, and it does so lazily: ``--help`` loads
neither torch nor transformers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.style import Style

from . import cli_options as options
from .errors import ConfigError, VmallocError

if TYPE_CHECKING:
    from .engine import LLM, RequestOutput

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


_BOLD = Style(bold=True)


@app.command()
def generate(
    prompt: options.Prompts = None,
    prompts_file: options.PromptsFile = None,
    model: options.Model = "demo",
    tokenizer: options.Tokenizer = None,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.Device = "auto",
    enforce_eager: options.EnforceEager = False,
    compile: options.Compile = False,
    as_json: options.AsJson = False,
    n: options.NumCompletions = 1,
    best_of: options.BestOf = None,
    use_beam_search: options.UseBeamSearch = False,
    length_penalty: options.LengthPenalty = 1.0,
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = None,
    top_k: options.TopK = -1,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    ignore_eos: options.IgnoreEos = False,
    regex: options.Regex = None,
    kv_backend: options.BackendOption = options.Backend.AUTO,
    kv_driver: options.KVDriver = options.Driver.AUTO,
    kv_cache_memory_bytes: options.KVCacheMemoryBytes = None,
    gpu_memory_utilization: options.GPUMemoryUtilization = 0.9,
    swap_space: options.SwapSpace = None,
    enable_prefix_caching: options.EnablePrefixCaching = True,
    commit_policy: options.CommitPolicyOption = options.CommitPolicy.ON_DEMAND,
    page_size: options.PageSize = None,
    block_size: options.BlockSize = 16,
    layers_per_group: options.LayersPerGroup = None,
    commit_ahead: options.CommitAhead = 4,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = 64,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    scheduling_policy: options.SchedulingPolicyOption = options.SchedulingPolicy.FCFS,
    priority: options.Priority = None,
    preemption_mode: options.PreemptionModeOption = options.PreemptionMode.AUTO,
    batch_invariant: options.BatchInvariant = False,
) -> None:
    """Generate text, and show what the KV cache did meanwhile."""
    prompts = _read_prompts(prompt or [], prompts_file)
    _prepare_process(model)
    from .engine import LLM, SamplingParams, StructuredOutputsParams

    if temperature is None:  # several samples of the likeliest token would all be the same
        temperature = 1.0 if (best_of or n) > 1 and not use_beam_search else 0.0
    params = SamplingParams(
        n=n,
        best_of=best_of,
        use_beam_search=use_beam_search,
        length_penalty=length_penalty,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_tokens=max_tokens,
        stop=stop or None,
        ignore_eos=ignore_eos,
        structured_outputs=None if regex is None else StructuredOutputsParams(regex=regex),
    )
    with LLM(
        model,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype.value,
        enforce_eager=enforce_eager,
        compile=compile,
        kv_backend=kv_backend.value,
        kv_driver=kv_driver.value,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        gpu_memory_utilization=gpu_memory_utilization,
        swap_space_bytes=_gib_to_bytes(swap_space),
        enable_prefix_caching=enable_prefix_caching,
        commit_policy=commit_policy.value,
        page_size=page_size,
        block_size=block_size,
        layers_per_group=layers_per_group,
        commit_ahead_tokens=commit_ahead,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        scheduling_policy=scheduling_policy.value,
        preemption_mode=preemption_mode.value,
        seed=seed or 0,
        batch_invariant=batch_invariant,
    ) as llm:
        if as_json:
            outputs = llm.generate(prompts, params, priority=priority or None)
        else:
            printer = TextPrinter(prompts, n)
            outputs = llm.generate(
                prompts, params, use_tqdm=False, on_token=printer.add, priority=priority or None
            )
        _show_memory(llm, outputs, as_json=as_json)
    errors = [output.error for output in outputs if output.error is not None]
    for error in errors:
        _complain(error)
    if errors:
        raise typer.Exit(EXIT_FAILED_REQUEST)


@app.command()
def info(as_json: options.AsJson = False) -> None:
    """Show drivers, devices, attention kernels, the backend that auto picks, and limits."""
    _prepare_process(model=None)
    from .host_info import host_info
    from .host_report import host_report

    facts = host_info()
    if as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        Console().print(host_report(facts))


class TextPrinter:
    """Prints texts in the order of the prompts and completions, each as it comes."""

    def __init__(self, prompts: list[str], num_completions: int = 1) -> None:
        self._prompts = prompts
        self._num_completions = num_completions
        self._console = Console()
        self._pending = [""] * len(prompts) * num_completions
        self._is_finished = [False] * len(prompts) * num_completions
        self._current = -1
        self._next()

    def add(self, output: RequestOutput) -> None:
        """Take what is new of one request; show it if its completion is the one on screen."""
        first = int(output.request_id) * self._num_completions
        for completion in output.outputs:
            self._pending[first + completion.index] += completion.text
            self._is_finished[first + completion.index] = completion.is_finished
        if output.is_finished:  # also of completions that there are none of
            self._is_finished[first : first + self._num_completions] = [
                True
            ] * self._num_completions
        while self._current < len(self._pending):
            self._write(self._pending[self._current])
            self._pending[self._current] = ""
            if not self._is_finished[self._current]:
                break
            self._write("\n\n")
            self._next()

    def _next(self) -> None:
        self._current += 1
        if self._current < len(self._pending):
            prompt_idx, idx = divmod(self._current, self._num_completions)
            prompt = self._prompts[prompt_idx]
            if self._num_completions > 1:
                self._write(f"[{idx + 1}/{self._num_completions}] ")
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


def _show_memory(llm: LLM, outputs: list[RequestOutput], *, as_json: bool) -> None:
    """The figures of the KV memory; with ``as_json`` the outputs too, in one object."""
    from .memory_table import memory_report, memory_summary

    stats, scheduler, prefixes = llm.kv_stats(), llm.engine.stats(), llm.engine.prefix_stats()
    max_model_len = llm.config.max_model_len or 0
    max_length_bytes = stats.peak_live_seqs * llm.engine.backend.bytes_for(max_model_len)
    if as_json:
        result = {
            "outputs": [entry for output in outputs for entry in _output_dicts(output)],
            "memory": memory_summary(stats, max_length_bytes),
            "kernel": llm.engine.kernel_name,
            "scheduler": asdict(scheduler),
            "prefix_cache": {**asdict(prefixes), "misses": dict(prefixes.misses)},
        }
        sys.stdout.write(json.dumps(result) + "\n")
        return
    console = Console()
    events = (
        ("Preempted by swap", scheduler.preempt_swap, "requests"),
        ("Preempted by recompute", scheduler.preempt_recompute, "requests"),
        ("Prompt tokens from the cache", prefixes.hit_tokens, f"of {prefixes.queried_tokens}"),
    )
    console.print(
        memory_report(stats, max_length_bytes, max_model_len, width=console.width, events=events)
    )


def _output_dicts(output: RequestOutput) -> Iterator[dict[str, object]]:
    """One entry for each completion of a prompt."""
    for completion in output.outputs:
        result: dict[str, object] = {
            "prompt": output.prompt,
            "index": completion.index,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
            "num_cached_tokens": output.num_cached_tokens,
        }
        if completion.cumulative_logprob is not None:
            result["cumulative_logprob"] = completion.cumulative_logprob
        if output.error is not None:
            result["error"] = output.error
        yield result


def _gib_to_bytes(num_gib: float | None) -> int | None:
    return None if num_gib is None else int(num_gib * 2**30)


def _prepare_process(model: str | None) -> None:
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
