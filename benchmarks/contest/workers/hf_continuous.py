"""transformers' continuous batching, with the blocks and the token budget that the workload needs.

Its cache is by default sized to most of the memory; here it holds every request of the workload at
once, which is what a user with a known workload would give it.

Owns: the model and its manager thread.  Thread-safety: one caller.
"""

from __future__ import annotations

import os

from hf import Libraries, token_bytes
from measured import Completion, Job, Request, main

PAGE_TOKENS = 32
POLL_S = 0.5


class Continuous:
    """Option ``attention``: an implementation that continuous batching supports."""

    def load(self) -> None:
        self._libraries = Libraries()

    def construct(self, job: Job) -> None:
        self._job = job
        self._model = self._libraries.load_model(job)
        self._model.set_attn_implementation(job.options["attention"])
        self._num_blocks = max(map(num_blocks, (job.requests, job.warm_up)))
        most = max(job.requests, key=lambda request: request.max_tokens)
        self._manager = self._model.init_continuous_batching(
            generation_config=self._libraries.generation_config(
                job,
                eos_token_id=-1,
                max_new_tokens=most.max_tokens,
                num_return_sequences=most.n,
            ),
            continuous_batching_config=self._libraries.transformers.ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=self._num_blocks,
                max_batch_tokens=job.max_batched_tokens,
                max_requests_per_batch=job.max_num_seqs,
                allow_block_sharing=True,
                seed=job.seed,
            ),
        )
        self._manager.start()

    def run(self, requests: list[Request]) -> list[Completion]:
        names: dict[str, int] = {}
        # Sorted as its own add_requests does, for more hits in the prefix cache.
        order = sorted(range(len(requests)), key=lambda idx: requests[idx].prompt, reverse=True)
        for idx in order:
            request = requests[idx]
            name = self._manager.add_request(
                request.prompt, max_new_tokens=request.max_tokens, record_timestamps=True
            )
            names[name] = idx
        completions: list[Completion] = []
        while len(completions) < sum(request.n for request in requests):
            output = self._manager.get_result(timeout=POLL_S)
            if output is None:
                if not self._manager.is_running():
                    raise RuntimeError("the generation thread ended")
                continue
            if output.error is not None:
                raise RuntimeError(output.error)
            if output.is_finished():
                idx = names[output.request_id.partition("__child#")[0]]
                times = output.timestamps  # of perf_counter: the same clock as monotonic on Linux
                completions.append(Completion(idx, output.generated_tokens, times[0], times[-1]))
        return completions

    def kv_bytes(self) -> dict[str, int]:
        size = self._num_blocks * PAGE_TOKENS * token_bytes(self._model)
        return {"reserved": size, "committed": size}

    def versions(self) -> dict[str, str]:
        return self._libraries.versions()

    def pid(self) -> int:
        return os.getpid()

    def close(self) -> None:
        self._manager.stop(block=True, timeout=10)


def num_blocks(requests: list[Request]) -> int:
    """Blocks for all requests at once, with one to spare for each sequence and a tenth on top."""
    blocks = sum(
        request.n * (-(-(len(request.prompt) + request.max_tokens) // PAGE_TOKENS) + 1)
        for request in requests
    )
    return blocks + blocks // 10


if __name__ == "__main__":
    main(Continuous())
