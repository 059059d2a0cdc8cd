"""The command line: ``vmalloc generate``, ``serve``, ``top``, ``bench``, ``ab`` and ``info``.

Owns: what people read; the options are in the ``*_options.py`` files.
Thread-safety: none; one process, one command.

The one file that may import the engine from the library, and it does so lazily: ``--help`` loads
neither torch nor transformers.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from . import ab_options as comparing
from . import bench_options as benching
from . import cli_options as options
from . import serve_options as serving
from .errors import ConfigError, VmallocError
from .prompt_text import TextPrinter, read_prompts

if TYPE_CHECKING:
    from .engine import LLM, EngineConfig, RequestOutput

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2

app = typer.Typer(
    name="vmalloc",
    help="KV-cache memory for LLM inference as virtual memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.command()
def generate(
    context: typer.Context,
    prompt: options.Prompts = None,
    prompts_file: options.PromptsFile = None,
    model: options.Model = "demo",
    tokenizer: options.Tokenizer = None,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.Device = "auto",
    enforce_eager: options.EnforceEager = False,
    compile: options.Compile = False,
    fused: options.FusedOption = options.Fused.AUTO,
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
    tensor_parallel_size: options.TensorParallelSize = 1,
    tensor_parallel_port: options.TensorParallelPort = None,
    tensor_parallel_timeout: options.TensorParallelTimeout = 60.0,
) -> None:
    """Generate text, and show what the KV cache did meanwhile."""
    prompts = read_prompts(prompt or [], prompts_file)
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
    with LLM(model, tokenizer=tokenizer, **_engine_settings(context.params)) as llm:
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
        raise typer.Exit(EXIT_FAILED)


@app.command()
def serve(
    context: typer.Context,
    model_argument: serving.ModelArgument = None,
    model: serving.Model = None,
    tokenizer: options.Tokenizer = None,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.Device = "auto",
    enforce_eager: options.EnforceEager = False,
    compile: options.Compile = False,
    fused: options.FusedOption = options.Fused.AUTO,
    config: serving.Config = None,
    dry_run: serving.DryRun = False,
    as_json: serving.AsJson = False,
    host: serving.Host = "127.0.0.1",
    port: serving.Port = 8000,
    uds: serving.Uds = None,
    served_model_name: serving.ServedModelName = None,
    chat_template: serving.ChatTemplate = None,
    allowed_origins: serving.AllowedOrigins = None,
    sse_keep_alive_interval: serving.SseKeepAliveInterval = 15.0,
    root_path: serving.RootPath = "",
    ssl_certfile: serving.SslCertfile = None,
    ssl_keyfile: serving.SslKeyfile = None,
    api_key: serving.ApiKey = None,
    admin_api_key: serving.AdminApiKey = None,
    max_num_queued_reqs: serving.MaxNumQueuedReqs = 512,
    queue_timeout: serving.QueueTimeout = None,
    request_timeout: serving.RequestTimeout = None,
    max_body_bytes: serving.MaxBodyBytes = 8 << 20,
    body_timeout: serving.BodyTimeout = 30.0,
    max_logprobs: serving.MaxLogprobs = 20,
    shutdown_timeout: serving.ShutdownTimeout = 60.0,
    health_timeout: serving.HealthTimeout = 120.0,
    release_idle_after: serving.ReleaseIdleAfter = 30.0,
    log_format: serving.LogFormatOption = serving.LogFormat.TEXT,
    enable_log_requests: serving.EnableLogRequests = False,
    disable_log_stats: serving.DisableLogStats = False,
    otlp_traces_endpoint: serving.OtlpTracesEndpoint = None,
    replicas: serving.Replicas = None,
    max_replicas: serving.MaxReplicas = None,
    routing: serving.RoutingOption = serving.Routing.PREFIX,
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
    scheduling_policy: serving.SchedulingPolicyOption = options.SchedulingPolicy.FCFS,
    preemption_mode: options.PreemptionModeOption = options.PreemptionMode.AUTO,
    seed: serving.EngineSeed = 0,
    batch_invariant: options.BatchInvariant = False,
    tensor_parallel_size: options.TensorParallelSize = 1,
    tensor_parallel_port: options.TensorParallelPort = None,
    tensor_parallel_timeout: options.TensorParallelTimeout = 60.0,
) -> None:
    """Serve a model over HTTP, to any OpenAI client. The page at / shows it at work.

    SIGTERM drains: running requests end, new ones get 503. With --replicas 2 two engines share the
    work behind one address; requests go where the beginning of their prompt is cached.
    """
    model = _one_model(context, model_argument, model)
    if as_json and not dry_run:
        raise ConfigError("--json is the form of the plan that --dry-run prints; give both")
    _prepare_process(model)
    from .engine import EngineConfig

    engine_config = EngineConfig(**_engine_settings(context.params))
    if dry_run:
        _show_plan(model, engine_config, as_json=as_json)
        return
    _check_extra("server", ("fastapi", "uvicorn", "prometheus_client"))
    from .server.config import ServerConfig
    from .server.run import serve as run_server

    server_config = ServerConfig(
        host=host,
        port=port,
        uds=None if uds is None else str(uds),
        api_keys=tuple(api_key or ()),
        admin_api_keys=tuple(admin_api_key or ()),
        served_model_names=tuple(served_model_name or ()),
        chat_template=None if chat_template is None else str(chat_template),
        max_queued_requests=max_num_queued_reqs,
        queue_timeout_s=queue_timeout,
        request_timeout_s=request_timeout,
        max_body_bytes=max_body_bytes,
        body_timeout_s=body_timeout,
        allowed_origins=tuple(allowed_origins or ()),
        sse_keep_alive_s=sse_keep_alive_interval,
        shutdown_timeout_s=shutdown_timeout,
        health_timeout_s=health_timeout,
        release_idle_after_s=release_idle_after or None,
        root_path=root_path,
        ssl_certfile=None if ssl_certfile is None else str(ssl_certfile),
        ssl_keyfile=None if ssl_keyfile is None else str(ssl_keyfile),
        log_format=log_format.value,
        log_requests=enable_log_requests,
        log_stats=not disable_log_stats,
        otlp_traces_endpoint=otlp_traces_endpoint,
    )
    if replicas is None and max_replicas is None:
        raise typer.Exit(run_server(model, tokenizer, engine_config, server_config))
    from .server.ray import check_ray

    check_ray()
    from .server.ray.local import serve_replicas, with_cores
    from .server.ray.settings import ReplicaConfig, ReplicaSettings

    settings = ReplicaSettings(
        model=model,
        tokenizer=tokenizer,
        engine=engine_config,
        server=server_config,
        replicas=ReplicaConfig(
            num_replicas=1 if replicas is None else replicas,
            max_replicas=max_replicas,
            routing=routing.value,
        ),
    )
    raise typer.Exit(serve_replicas(with_cores(settings)))


@app.command()
def bench(
    url: benching.Url,
    endpoint: benching.EndpointOption = benching.Endpoint.COMPLETIONS,
    model: benching.Model = "auto",
    api_key: benching.ApiKey = None,
    num_prompts: benching.NumPrompts = 100,
    request_rate: benching.RequestRate = math.inf,
    max_concurrency: benching.MaxConcurrency = None,
    seed: benching.Seed = 0,
    input_len: benching.InputLen = 128,
    output_len: benching.OutputLen = 64,
    length_spread: benching.LengthSpread = 0.5,
    ignore_eos: benching.IgnoreEos = True,
    time_limit: benching.TimeLimit = 600.0,
    request_timeout: benching.RequestTimeout = 120.0,
    goodput: benching.Goodput = None,
    as_json: benching.AsJson = False,
    output: benching.Output = None,
) -> None:
    """Send a server a ragged load and report latencies, throughput and goodput as clients see them.

    The load is the same for the same seed: log-normal lengths, random arrivals. Ctrl-C ends it
    early and shows what there is.
    """
    _check_extra("server", ("httpx",))
    from .server.bench_client import run_bench
    from .server.bench_load import BenchSettings, read_goodput
    from .server.bench_progress import BenchProgress
    from .server.bench_result import bench_report

    settings = BenchSettings(
        url=url,
        endpoint=endpoint.value,
        model=model,
        api_key=(api_key or "").partition(" ")[0] or None,  # a server may have several
        num_prompts=num_prompts,
        request_rate=request_rate,
        max_concurrency=max_concurrency,
        seed=seed,
        input_len=input_len,
        output_len=output_len,
        length_spread=length_spread,
        goodput=read_goodput(goodput or ()),
        time_limit_s=time_limit,
        request_timeout_s=request_timeout,
        ignore_eos=ignore_eos,
    )
    with BenchProgress(num_prompts) as progress:
        result = run_bench(settings, progress.add)
    document = json.dumps(result.summary())
    if output is not None:
        _write_text(output, document + "\n")
    if as_json:
        sys.stdout.write(document + "\n")
    else:
        Console().print(bench_report(result))
    if result.failures or result.num_unfinished:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def ab(
    context: typer.Context,
    model: options.Model = "demo",
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.Device = "auto",
    enforce_eager: options.EnforceEager = False,
    fused: options.FusedOption = options.Fused.AUTO,
    backends: comparing.Backends = None,
    workload: comparing.Workloads = None,
    trace: comparing.Traces = None,
    quick: comparing.Quick = False,
    repeats: comparing.Repeats = None,
    seed: comparing.Seed = 0,
    kv_cache_memory_bytes: comparing.KVCacheMemoryBytes = None,
    json_file: comparing.Json = Path("vmalloc-ab.json"),
    html_file: comparing.Html = Path("vmalloc-ab.html"),
    swap_space: options.SwapSpace = None,
    enable_prefix_caching: options.EnablePrefixCaching = True,
    page_size: options.PageSize = None,
    block_size: options.BlockSize = 16,
    layers_per_group: options.LayersPerGroup = None,
    commit_ahead: options.CommitAhead = 4,
    max_model_len: options.MaxModelLen = None,
    max_num_seqs: options.MaxNumSeqs = 64,
    max_num_batched_tokens: options.MaxNumBatchedTokens = None,
    preemption_mode: options.PreemptionModeOption = options.PreemptionMode.AUTO,
    batch_invariant: options.BatchInvariant = False,
    tensor_parallel_size: options.TensorParallelSize = 1,
) -> None:
    """Compare KV caches side by side: the same seeded requests, in turns, over one model.

    Every side serves every workload several times, each time in a fresh engine. Reported are
    throughput, latencies, memory by state, waste, the largest batch under a cap, preemptions and
    the allocator's time: medians with the range of the runs, and the ratio of the first side over
    the others. Where ranges overlap, it is a tie. All outputs are compared token for token; if they
    differ, the exit status is 1.

    Try: vmalloc ab --quick. Against what reserves ahead of need: vmalloc ab -w offline --backends
    virtual,paged,max_length,power_of_two
    """
    _prepare_process(model)
    from .engine import EngineConfig
    from .engine.ab.command import compare_backends
    from .engine.ab.experiment import ABSettings
    from .engine.ab.workload import KINDS

    names = [name for text in backends or ("virtual,paged",) for name in text.split(",")]
    settings = ABSettings(
        model=model,
        backends=tuple(name.strip() for name in names),
        workloads=tuple(workload or (() if trace else KINDS)),
        traces=tuple(trace or ()),
        repeats=repeats,
        is_quick=quick,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        seed=seed,
        config=EngineConfig(**_engine_settings(context.params)),
    )
    if not compare_backends(settings, json_file, html_file):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def top(
    url: Annotated[
        list[str],
        typer.Argument(help="Where the server is, e.g. http://localhost:8000. Repeatable."),
    ],
    api_key: Annotated[
        str | None,
        typer.Option(help="Key that the servers ask for.", envvar="VMALLOC_API_KEY"),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print frames as JSON, one a line, with their url.")
    ] = False,
) -> None:
    """Watch the pages of running servers in the terminal. Ctrl-C ends it."""
    _check_extra("server", ("httpx",))
    from .server.top import top as run_top

    raise typer.Exit(run_top(url, api_key=api_key, once=once, as_json=as_json))


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


def _show_memory(llm: LLM, outputs: list[RequestOutput], *, as_json: bool) -> None:
    """The figures of the KV memory; with ``as_json`` the outputs too, in one object."""
    from .engine import stats_of_all
    from .memory_table import memory_report, memory_summary, rank_report

    engine, num_ranks = llm.engine, llm.engine.num_ranks
    stats, scheduler = stats_of_all(llm.kv_stats(), num_ranks), engine.stats()
    prefixes, reports = engine.prefix_stats(), engine.rank_reports()
    max_model_len = llm.config.max_model_len or 0
    longest_bytes = num_ranks * engine.backend.bytes_for(max_model_len)
    max_length_bytes = stats.peak_live_seqs * longest_bytes
    if as_json:
        result = {
            "outputs": [entry for output in outputs for entry in _output_dicts(output)],
            "memory": memory_summary(stats, max_length_bytes),
            "ranks": [
                {
                    "rank": report.rank,
                    "peak_rss_bytes": report.peak_rss_bytes,
                    "memory": memory_summary(report.kv_stats, max_length_bytes // num_ranks),
                }
                for report in reports
            ],
            "kernel": engine.kernel_name,
            "forward": engine.forward_name,
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
        memory_report(
            stats,
            max_length_bytes,
            max_model_len,
            width=console.width,
            events=events,
            num_ranks=num_ranks,
        )
    )
    if reports:
        ranks = [(report.kv_stats, report.peak_rss_bytes) for report in reports]
        console.print(rank_report(ranks))


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


def _engine_settings(params: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``EngineConfig`` among a command's options, which mostly have their names."""
    from .engine import EngineConfig

    names = {field.name for field in fields(EngineConfig)} & set(params)
    settings = {name: getattr(params[name], "value", params[name]) for name in names}
    num_gib = params["swap_space"]
    settings["swap_space_bytes"] = None if num_gib is None else int(num_gib * 2**30)
    settings["commit_ahead_tokens"] = params["commit_ahead"]
    settings["seed"] = params["seed"] or 0
    if "tensor_parallel_timeout" in params:
        settings["tensor_parallel_timeout_s"] = params["tensor_parallel_timeout"]
    return settings


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output is {str(path)!r}; it cannot be written: {error}") from error


def _one_model(context: typer.Context, argument: str | None, option: str | None) -> str:
    source: Any = context.get_parameter_source("model")
    if argument is not None and source.name == "DEFAULT_MAP":  # of a config file
        return argument
    if argument is not None and option is not None and argument != option:
        raise ConfigError(f"the model is {argument!r} and --model is {option!r}; give one of them")
    return argument or option or "demo"


def _show_plan(model: str, config: EngineConfig, *, as_json: bool) -> None:
    from .engine.memory_plan import plan_memory
    from .engine.memory_plan_table import memory_plan_report

    plan = plan_memory(model, config)
    if as_json:
        sys.stdout.write(json.dumps(asdict(plan)) + "\n")
    else:
        Console().print(memory_plan_report(plan))


def _check_extra(extra: str, modules: Sequence[str]) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} cannot be imported; pip install 'vmalloc[{extra}]'"
        )


def _prepare_process(model: str | None) -> None:
    os.environ.setdefault("GOMP_SPINCOUNT", "0")  # see vmalloc/engine/__init__.py
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if model == "demo":
        # Its weights load in milliseconds; a bar for them is noise above the text.
        from transformers.utils import logging

        logging.disable_progress_bar()
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # for other ranks


def _complain(text: object) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).out(f"error: {text}", highlight=False)


def main() -> None:
    """Entry point of the ``vmalloc`` command."""
    try:
        app()
    except VmallocError as error:
        _complain(error)
        sys.exit(_exit_code(error))


def _exit_code(error: VmallocError) -> int:
    """Bad input, but for a rank that was lost: nothing that was typed is at fault there."""
    if "vmalloc.engine" not in sys.modules:  # only an engine has ranks
        return EXIT_BAD_INPUT
    from .engine import RankLostError

    return EXIT_FAILED if isinstance(error, RankLostError) else EXIT_BAD_INPUT


if __name__ == "__main__":
    main()
