"""transformers' ``model.generate``: padded batches, one after the other.

Each batch runs until its longest output is done; a request's tokens past its own length count for
nothing.

Owns: the model.  Thread-safety: one thread.
"""

from __future__ import annotations

import os
import time
from typing import Any

from hf import Libraries, token_bytes
from measured import Completion, Job, Request, main


class Generate:
    """Options ``cache``: dynamic or static; ``batch``: prompts at once, 0 for all."""

    def load(self) -> None:
        self._libraries = Libraries()

    def construct(self, job: Job) -> None:
        self._job = job
        self._model = self._libraries.load_model(job)
        self._most_rows = 0

    def run(self, requests: list[Request]) -> list[Completion]:
        batch = self._job.options["batch"] or len(requests)
        completions: list[Completion] = []
        self._most_rows = 0
        for first in range(0, len(requests), batch):
            completions += self._run_batch(first, requests[first : first + batch])
        return completions

    def _run_batch(self, first: int, requests: list[Request]) -> list[Completion]:
        torch, n = self._libraries.torch, requests[0].n
        width = max(len(request.prompt) for request in requests)
        longest = max(request.max_tokens for request in requests)
        pads = [width - len(request.prompt) for request in requests]
        ids = [[0] * pad + one.prompt for pad, one in zip(pads, requests, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in pads]
        config = self._libraries.generation_config(
            self._job, max_new_tokens=longest, num_return_sequences=n, disable_compile=True
        )
        if self._job.options["cache"] == "static":
            config.cache_implementation = "static"
        clock = _clock(self._libraries.transformers, torch)
        with torch.no_grad():
            output = self._model.generate(
                torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                generation_config=config,
                stopping_criteria=self._libraries.transformers.StoppingCriteriaList([clock]),
            )
        self._most_rows = max(self._most_rows, len(requests) * n * (width + longest))
        rows = output[:, width:].tolist()
        return [
            Completion(
                first + row // n,
                tokens[: requests[row // n].max_tokens],
                clock.times[0],
                clock.times[requests[row // n].max_tokens - 1],
            )
            for row, tokens in enumerate(rows)
        ]

    def kv_bytes(self) -> dict[str, int]:
        """Rows of the largest padded batch."""
        size = self._most_rows * token_bytes(self._model)
        return {"reserved": size, "committed": size}

    def versions(self) -> dict[str, str]:
        return self._libraries.versions()

    def pid(self) -> int:
        return os.getpid()

    def close(self) -> None:
        pass


def _clock(transformers: Any, torch: Any) -> Any:
    """Stops nothing, and notes when each token of the batch was there."""

    class Clock(transformers.StoppingCriteria):
        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            self.times.append(time.monotonic())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    return Clock()


if __name__ == "__main__":
    main(Generate())
