"""An 8B-shaped model served end to end: virtual against paged, with CUDA graphs and without.

A Llama of 32 layers, hidden 4096, 32 query and 8 KV heads of 128, intermediate 14336, bfloat16,
random weights made on the GPU. Seeded requests of ShareGPT-like lengths
(``benchmarks/workload.py``), cut so that a run takes seconds, all there at the start; greedy,
prefix caching off, so that both backends do the same work. Runs take turns: the order turns round
in every round. With graphs, all requests are served once before the timed run.

result: ``copy_gb_per_s``; ``model`` {parameters, seconds to make}; ``workload``; ``runs``
[{kv_backend, cuda_graphs, round, kernel, driver, warm_up_s, output_tokens_per_s,
total_tokens_per_s, seconds, steps, ttft_ms, tpot_ms, itl_ms (percentiles), peak_committed_bytes,
peak_live_bytes, capacity_bytes, utilisation, roofline (what a median step must read, as share of
the copy bandwidth), torch_peak_bytes, critical_pages, background_pages, stall_us, preemptions}];
``agreement`` {pair of runs: share of output tokens before the first difference}.

Expected: with graphs the step is bound by reading the weights (16 GB at the copy bandwidth) and
both backends tie; the virtual one commits what it needs where the paged one holds its whole pool.
Greedy outputs of two kernels part where random weights leave two logits within rounding; runs of
one backend, with graphs and without, should agree wholly if the kernels do the same splits.

Owns: the model and one engine at a time.  Thread-safety: none; one process.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import numpy as np
import torch

from vmalloc import KVCacheStats
from vmalloc.engine import EngineConfig, LLMEngine, RequestOutputKind, SamplingParams

from ..workload import SHAREGPT, Request, describe_trace, make_trace
from .section import STAND_IN, Section, run_section
from .timing import measure_copy, percentiles

CASES = (("virtual", True), ("paged", True), ("virtual", False), ("paged", False))
"""Backend, and whether decode runs in CUDA graphs."""

NUM_REQUESTS = 96
MAX_NUM_SEQS = 64
MAX_PROMPT = 768
MAX_OUTPUT = 192
MAX_MODEL_LEN = 1024
KV_BYTES = 16 << 30
VOCAB = 32_768
MAX_ROUNDS = 2


def main(section: Section) -> None:
    section.put("copy_gb_per_s", measure_copy(section.device))
    model = make_model(section)
    trace = make_requests(section)
    section.put("workload", describe_trace(SHAREGPT, trace) | {"max_num_seqs": MAX_NUM_SEQS})
    outputs: dict[str, dict[str, list[int]]] = {}
    longest, round_idx = 20.0, 0
    while round_idx < MAX_ROUNDS:
        for kind, has_graphs in CASES if round_idx % 2 == 0 else reversed(CASES):
            name = f"{kind}, {'graphs' if has_graphs else 'eager'}, round {round_idx}"
            if not section.has_time_for(name, 1.3 * longest):
                return
            start = time.monotonic()
            run, tokens = serve(section, model, trace, kind, has_graphs)
            longest = max(longest if round_idx else 0.0, time.monotonic() - start)
            section.add("runs", run | {"round": round_idx})
            outputs.setdefault(f"{kind}, {'graphs' if has_graphs else 'eager'}", tokens)
            section.put("agreement", compare_outputs(outputs))
        round_idx += 1
        if section.dry_run:
            return


def make_model(section: Section) -> torch.nn.Module:
    """The random Llama, made where it runs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": VOCAB,
    }
    if section.dry_run:
        sizes = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 512,
        }
    config = LlamaConfig(
        **sizes,
        head_dim=sizes["hidden_size"] // sizes["num_attention_heads"],
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        eos_token_id=None,
        bos_token_id=None,
    )
    start = time.monotonic()
    torch.manual_seed(section.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(section.device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    section.put(
        "model",
        {
            **sizes,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "seconds": round(time.monotonic() - start, 1),
        },
    )
    return model


def make_requests(section: Section) -> list[Request]:
    """ShareGPT-like lengths, cut to what a short run holds."""
    most_prompt, most_output = (MAX_PROMPT, MAX_OUTPUT) if not section.dry_run else (24, 6)
    trace = make_trace(SHAREGPT, NUM_REQUESTS if not section.dry_run else 5, section.seed)
    return [
        Request(min(request.num_prompt, most_prompt), min(request.num_output, most_output))
        for request in trace
    ]


def engine_config(section: Section, kind: str, has_graphs: bool) -> EngineConfig:
    """Settings of one run; a dry run serves on CPU, the virtual backend over the stand-in."""
    return EngineConfig(
        dtype="bfloat16",
        device=section.device,
        kv_driver="cuda" if section.dry_run and kind == "virtual" else "auto",
        kv_backend=kind,
        kv_cache_memory_bytes=KV_BYTES if not section.dry_run else 256 << 20,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=MAX_NUM_SEQS if not section.dry_run else 4,
        max_num_batched_tokens=4096 if not section.dry_run else 64,
        enable_prefix_caching=False,
        enforce_eager=not has_graphs,
        seed=section.seed,
    )


def serve(
    section: Section, model: torch.nn.Module, trace: list[Request], kind: str, has_graphs: bool
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """One run of all requests; its row and the tokens of every request."""
    vocab = int(model.get_input_embeddings().weight.shape[0])
    rng = np.random.default_rng(section.seed)
    prompts = [rng.integers(0, vocab, request.num_prompt).tolist() for request in trace]
    engine = LLMEngine(model, None, engine_config(section, kind, has_graphs))
    try:
        warm_up = time.perf_counter()
        # Every shape that the timed run will meet, so that no capture falls into it.
        few = len(prompts) if has_graphs else 2
        _run(engine, prompts[:few], trace[:few])
        if not section.dry_run:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = engine.kv_stats()
        start = time.perf_counter()
        arrivals, tokens, steps = _run(engine, prompts, trace)
        seconds = time.perf_counter() - start
        row = {
            "kv_backend": kind,
            "cuda_graphs": has_graphs,
            "kernel": engine.kernel_name,
            "driver": STAND_IN if section.dry_run and kind == "virtual" else "auto",
            "warm_up_s": round(start - warm_up, 3),
            "seconds": round(seconds, 3),
            "steps": steps,
            "output_tokens_per_s": sum(map(len, tokens.values())) / seconds,
            "total_tokens_per_s": sum(len(p) for p in prompts) / seconds
            + sum(map(len, tokens.values())) / seconds,
            **latencies(arrivals, start),
            **memory(engine, before, section),
        }
        row["roofline"] = roofline(model, engine, before, row["itl_ms"]["p50"])
        row["roofline"] /= section.result["copy_gb_per_s"]["median"]
    finally:
        engine.close()
        del engine
        gc.collect()
        if not section.dry_run:
            torch.cuda.empty_cache()
    if section.dry_run:
        section.set_driver(STAND_IN)
    else:
        section.set_driver("cuda")
    return row, tokens


def _run(
    engine: LLMEngine, prompts: list[list[int]], trace: list[Request]
) -> tuple[dict[str, list[float]], dict[str, list[int]], int]:
    """Queue everything, step until all is done; when tokens came, which, and the steps."""
    for idx, (prompt, request) in enumerate(zip(prompts, trace, strict=True)):
        params = SamplingParams(
            temperature=0.0,
            max_tokens=request.num_output,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        engine.add_request(str(idx), prompt, params)
    arrivals: dict[str, list[float]] = {str(idx): [] for idx in range(len(prompts))}
    tokens: dict[str, list[int]] = {str(idx): [] for idx in range(len(prompts))}
    num_steps = 0
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        num_steps += 1
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(f"request {output.request_id}: {output.error}")
            for completion in output.outputs:
                arrivals[output.request_id] += [now] * len(completion.token_ids)
                tokens[output.request_id] += completion.token_ids
    return arrivals, tokens, num_steps


def latencies(arrivals: dict[str, list[float]], start: float) -> dict[str, Any]:
    """Time to the first token, per output token of each request, and between tokens."""
    first = [(times[0] - start) * 1e3 for times in arrivals.values()]
    per_token = [
        (times[-1] - times[0]) / (len(times) - 1) * 1e3
        for times in arrivals.values()
        if len(times) > 1
    ]
    between = [gap * 1e3 for times in arrivals.values() for gap in np.diff(times).tolist()]
    return {
        "ttft_ms": percentiles(first),
        "tpot_ms": percentiles(per_token),
        "itl_ms": percentiles(between),
    }


def memory(engine: LLMEngine, before: KVCacheStats, section: Section) -> dict[str, Any]:
    """What the KV cache took since ``before``, and torch beside it."""
    stats = engine.kv_stats()
    return {
        "capacity_bytes": stats.capacity_bytes,
        "created_bytes": stats.created_pages * stats.page_bytes,
        "peak_committed_bytes": stats.peak_committed_bytes,
        "peak_live_bytes": stats.peak_live_bytes,
        "utilisation": stats.utilisation,
        "critical_pages": stats.critical_pages - before.critical_pages,
        "background_pages": stats.background_pages - before.background_pages,
        "stall_us": stats.stall_us - before.stall_us,
        "torch_peak_bytes": 0 if section.dry_run else torch.cuda.max_memory_allocated(),
        "device_used_bytes": 0 if section.dry_run else _device_used_bytes(),
        "preemptions": _preemptions(engine),
    }


def roofline(
    model: torch.nn.Module, engine: LLMEngine, before: KVCacheStats, step_ms: float
) -> float:
    """GB/s that a step of ``step_ms`` reads at least: the weights, and K and V of its tokens."""
    embeddings = model.get_input_embeddings().weight.numel()  # of which it looks up a few rows
    weights = sum(parameter.numel() for parameter in model.parameters()) - embeddings
    stats = engine.kv_stats()
    steps = max(1, stats.num_steps - before.num_steps)
    live_bytes = (stats.live_byte_steps - before.live_byte_steps) / steps
    return (2 * weights + live_bytes) / step_ms / 1e6


def compare_outputs(outputs: dict[str, dict[str, list[int]]]) -> dict[str, float]:
    """For each pair of runs, the share of tokens before the first that differs."""
    names = list(outputs)
    return {
        f"{one} | {other}": round(_common_share(outputs[one], outputs[other]), 4)
        for i, one in enumerate(names)
        for other in names[i + 1 :]
    }


def _common_share(one: dict[str, list[int]], other: dict[str, list[int]]) -> float:
    common = sum(_common_prefix(tokens, other[name]) for name, tokens in one.items())
    return common / sum(map(len, one.values()))


def _common_prefix(one: list[int], other: list[int]) -> int:
    for idx, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return idx
    return min(len(one), len(other))


def _device_used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _preemptions(engine: LLMEngine) -> dict[str, int]:
    stats = engine.stats()
    names = [name for name in dir(stats) if "preempt" in name and not name.startswith("_")]
    return {name: value for name in names if isinstance(value := getattr(stats, name), int)}


if __name__ == "__main__":
    run_section("serving", main)
