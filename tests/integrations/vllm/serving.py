"""Runs one vLLM engine in a process of its own and prints what happened as a line of JSON.

``python -m tests.integrations.vllm.serving MODEL WORKLOAD stock|elastic``; the tests start it.
"""

import json
import random
import sys
import threading
import time
from pathlib import Path

import psutil

MIB = 1 << 20
POOL_BYTES = 1024 * MIB  # of the ragged workload
SMALL_POOL_BYTES = 32 * MIB  # of the one that turns the pool over
IDLE_S = 3.0
VOCABULARY = 2048
TOKEN_BYTES = 4 * 2 * 2 * 64 * 4  # layers, K and V, heads, head_dim, float32


def main():
    model, workload, kind = sys.argv[1:]
    # Line that the test reads; vLLM writes to stdout too.
    print("RESULT " + json.dumps(WORKLOADS[workload](model, kind)), flush=True)


def ragged(model, kind):
    """32 prompts of different lengths at once, greedily."""
    llm = engine(model, kind, POOL_BYTES, max_num_seqs=32)
    worker = worker_process()
    start_bytes = worker.memory_info().rss
    with PeakRSS(worker) as peak:
        outputs = generate(llm, prompts(32, 10, 700), max_tokens=48, logprobs=2)
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "gaps": [gaps(output) for output in outputs],
        "start_rss": start_bytes,
        "peak_rss": peak.bytes,
        "pool_bytes": POOL_BYTES,
        "stats": stats(llm) if kind == "elastic" else {},
        "modules": [name for name in sys.modules if name.split(".")[0] == "vmalloc"],
    }


def turnover(model, kind):
    """Ten times the pool in requests, one at a time; then idle, a shortage, and a sleep."""
    del kind
    llm = engine(model, "elastic", SMALL_POOL_BYTES, max_num_seqs=8, block_size=32)
    committed, num_tokens = [], 0
    start = stats(llm)
    for prompt in prompts(1000, 400, 450):
        (output,) = generate(llm, [prompt], max_tokens=4)
        num_tokens += len(prompt["prompt_token_ids"]) + len(output.token_ids)
        committed.append(stats(llm)["created_bytes"])
        if num_tokens * TOKEN_BYTES >= 10 * SMALL_POOL_BYTES:
            break
    busy = stats(llm)
    return {
        "pool_bytes": SMALL_POOL_BYTES,
        "served_bytes": num_tokens * TOKEN_BYTES,
        "start": start,
        "committed": committed,
        "busy": busy,
        "idle": wait_until_empty(llm, start["created_bytes"]),
        "hits": prefix_hits(llm),
        **shortage(llm),
        **asleep(llm),
    }


def prefix_hits(llm):
    """Tokens of a second, equal request that came from the prefix cache."""
    (prompt,) = prompts(1, 600, 600, seed=5)
    settings = sampling(4)
    llm.generate([prompt], settings, use_tqdm=False)
    (again,) = llm.generate([prompt], settings, use_tqdm=False)
    return again.num_cached_tokens


def shortage(llm):
    """A worker that gets less memory than the scheduler counts on: fewer at a time, same tokens."""
    batch = prompts(6, 250, 400, seed=3)
    plenty = generate(llm, batch, max_tokens=60, logprobs=2)
    wait_until_empty(llm, 0)
    before = stats(llm)["refused_steps"]
    llm.collective_rpc("resize_kv_memory", args=(4 * MIB,))
    scarce = generate(llm, batch, max_tokens=60, logprobs=2)
    after = stats(llm)
    llm.collective_rpc("resize_kv_memory", args=(SMALL_POOL_BYTES,))
    return {
        "refusals": after["refused_steps"] - before,
        "scarce_bytes": after["created_bytes"],
        "plenty_tokens": [list(output.token_ids) for output in plenty],
        "plenty_gaps": [gaps(output) for output in plenty],
        "scarce_tokens": [list(output.token_ids) for output in scarce],
    }


def asleep(llm):
    """Memory while asleep, and whether it works afterwards."""
    (prompt,) = prompts(1, 300, 300, seed=4)
    before = generate(llm, [prompt], max_tokens=8)
    llm.sleep()
    sleeping = stats(llm)
    llm.wake_up()
    after = generate(llm, [prompt], max_tokens=8)
    known = stats(llm)["refused_steps"]
    llm.collective_rpc("discard", args=(("kv_cache",),))  # behind the scheduler's back
    discarded = stats(llm)
    again = generate(llm, [prompt], max_tokens=8)
    return {
        "sleeping": sleeping,
        "same_after_sleep": list(before[0].token_ids) == list(after[0].token_ids),
        "discarded": discarded,
        "same_after_discard": list(before[0].token_ids) == list(again[0].token_ids),
        "refused_after_discard": stats(llm)["refused_steps"] - known,
    }


def mixed(model, kind):
    """A model whose layers are of two kinds, which share one pool of blocks."""
    llm = engine(model, kind, 2 * SMALL_POOL_BYTES, max_num_seqs=16, block_size=32)
    outputs = generate(llm, prompts(16, 10, 700), max_tokens=40, logprobs=2)
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "gaps": [gaps(output) for output in outputs],
        "idle": wait_until_empty(llm, 0) if kind == "elastic" else {},
    }


WORKLOADS = {"ragged": ragged, "turnover": turnover, "mixed": mixed}


def engine(model, kind, pool_bytes, **settings):
    from vllm import LLM

    if kind == "elastic":
        from vmalloc.integrations.vllm import engine_args

        settings |= engine_args(idle_s=IDLE_S)
    return LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        kv_cache_memory_bytes=pool_bytes,
        seed=0,
        disable_log_stats=True,
        **settings,
    )


def sampling(max_tokens, logprobs=None):
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=logprobs
    )


def generate(llm, batch, max_tokens, logprobs=None):
    results = llm.generate(batch, sampling(max_tokens, logprobs), use_tqdm=False)
    return [result.outputs[0] for result in results]


def prompts(count, low, high, seed=1):
    chosen = random.Random(seed)
    lengths = [chosen.randint(low, high) for _ in range(count)]
    return [
        {"prompt_token_ids": [chosen.randrange(VOCABULARY) for _ in range(length)]}
        for length in lengths
    ]


def gaps(output):
    """By how much the best token beat the second, in logits."""
    tops = [
        sorted((entry.logprob for entry in step.values()), reverse=True) for step in output.logprobs
    ]
    return [top[0] - top[1] for top in tops]


def stats(llm):
    return llm.collective_rpc("kv_memory_stats")[0]


def wait_until_empty(llm, num_bytes, deadline_s=120):
    """What is still taken from the system once it is ``num_bytes``, or at the deadline."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        taken = stats(llm)
        if taken["created_bytes"] <= num_bytes or taken["held_extents"] == 1:
            break
        time.sleep(0.2)
    return taken


def worker_process():
    """The process that holds the model: vLLM names it so."""
    found = [
        process
        for process in psutil.Process().children(recursive=True)
        if "Worker" in " ".join(process.cmdline() or [process.name()])
    ]
    if len(found) != 1:
        raise RuntimeError(f"{len(found)} worker processes were found; one is expected")
    return found[0]


class PeakRSS:
    """The largest resident size of a process within a block."""

    def __init__(self, process):
        self._process = process
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.bytes = 0

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._is_done.set()
        self._thread.join()

    def _watch(self):
        while not self._is_done.wait(0.02):
            self.bytes = max(self.bytes, self._process.memory_info().rss)


if __name__ == "__main__":
    Path(sys.argv[1]).resolve(strict=True)
    main()
