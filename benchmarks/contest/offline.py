"""Our engine on a contest's job, in this process: for benchmarks that look into it.

Owns: nothing; the caller closes the engine.  Thread-safety: one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vmalloc.engine import LLM, SamplingParams

from .workers.measured import Job, Request


def open_llm(job: Job, **settings: Any) -> LLM:
    """An engine with the job's model and limits, as ``workers/ours.py`` has, and ``settings``."""
    return LLM(
        job.model,
        skip_tokenizer_init=True,
        dtype="float32",
        kv_cache_memory_bytes=job.kv_bytes,
        max_model_len=job.max_model_len,
        max_num_seqs=job.max_num_seqs,
        max_num_batched_tokens=job.max_batched_tokens,
        seed=job.seed,
        **settings,
    )


def serve(llm: LLM, job: Job, requests: Sequence[Request]) -> int:
    """Serve requests of the job; the tokens that they gave."""
    params = [
        SamplingParams(
            n=one.n,
            temperature=0.0 if job.is_greedy else 1.0,
            seed=None if job.is_greedy else one.seed,
            max_tokens=one.max_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        for one in requests
    ]
    outputs = llm.generate([one.prompt for one in requests], params, use_tqdm=False)
    return sum(len(one.token_ids) for output in outputs for one in output.outputs)
