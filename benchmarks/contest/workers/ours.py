"""vmalloc's offline ``LLM``, on the virtual or the paged backend.

Owns: the engine.  Thread-safety: one thread.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

from measured import Completion, Job, Request, main


class Ours:
    """Option ``kv_backend``."""

    def load(self) -> None:
        import vmalloc.engine

        self._engine: Any = vmalloc.engine

    def construct(self, job: Job) -> None:
        self._job = job
        self._llm = self._engine.LLM(
            job.model,
            skip_tokenizer_init=True,
            dtype="float32",
            kv_backend=job.options["kv_backend"],
            kv_cache_memory_bytes=job.kv_bytes,
            max_model_len=job.max_model_len,
            max_num_seqs=job.max_num_seqs,
            max_num_batched_tokens=job.max_batched_tokens,
            seed=job.seed,
        )

    def run(self, requests: list[Request]) -> list[Completion]:
        params = [
            self._engine.SamplingParams(
                n=request.n,
                temperature=0.0 if self._job.is_greedy else 1.0,
                seed=None if self._job.is_greedy else request.seed,
                max_tokens=request.max_tokens,
                ignore_eos=True,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [request.prompt for request in requests]
        self._before = self._llm.kv_stats()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [
            Completion(idx, one.token_ids, times.first_token_time, times.last_token_time)
            for idx, (output, times) in enumerate((output, output.metrics) for output in outputs)
            for one in output.outputs
        ]

    def kv_bytes(self) -> dict[str, int]:
        """``reserved`` is a cap; the byte counts over steps are those of the last run."""
        stats, before = self._llm.kv_stats(), self._before
        return {
            "reserved": stats.capacity_bytes,
            "committed": stats.peak_committed_bytes,
            "live": stats.peak_live_bytes,
            "committed_byte_steps": stats.committed_byte_steps - before.committed_byte_steps,
            "live_byte_steps": stats.live_byte_steps - before.live_byte_steps,
        }

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("torch", "transformers")}

    def pid(self) -> int:
        return os.getpid()

    def close(self) -> None:
        self._llm.close()


if __name__ == "__main__":
    main(Ours())
