"""What is to be run: peers, shapes and workloads, and the jobs that follow from them.

Owns: nothing.  Thread-safety: pure, but that a missing checkpoint is written.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from typing import Any

from vmalloc.engine.ab.workload import make_workload

from . import environments as env
from .peers import Peer
from .runs import Limits
from .shapes import CONTEXT_TOKENS, Shape, checkpoint
from .workers.measured import Job, Request

WORKLOADS = ("offline", "prefix", "parallel")
KV_BYTES = 1 << 30
BATCHED_TOKENS = 512
NUM_CHECKED = 8


@dataclass(frozen=True)
class Plan:
    """What is to be run."""

    peers: tuple[Peer, ...]
    shapes: tuple[Shape, ...]
    workloads: tuple[str, ...]
    num_runs: int
    seed: int
    limits: Limits

    @property
    def num_turns(self) -> int:
        """Runs of the checks and of the rounds, without repetitions."""
        rounds = len(self.workloads) * self.num_runs
        return len(self.shapes) * len(self.peers) * (1 + rounds)

    def describe(self) -> dict[str, Any]:
        """Plain values, for the result file."""
        return {
            "peers": [peer.name for peer in self.peers],
            "shapes": {
                shape.name: {**asdict(shape), "num_parameters": shape.num_parameters}
                for shape in self.shapes
            },
            "workloads": self.workloads,
            "num_runs": self.num_runs,
            "limits": asdict(self.limits),
            "context_tokens": CONTEXT_TOKENS,
            "max_batched_tokens": BATCHED_TOKENS,
            "kv_bytes": KV_BYTES,
        }


def make_job(shape: Shape, workload: str, plan: Plan) -> Job:
    """The workload's requests within the limits that all peers get; options are the peer's."""
    drawn = make_workload(
        workload,
        vocab_size=shape.vocab_size,
        context_tokens=CONTEXT_TOKENS,
        num_requests=shape.num_requests[workload],
        seed=plan.seed,
        scale=shape.scale,
    )
    requests = [
        Request(list(one.prompt_token_ids), one.num_output_tokens, one.num_completions, one.seed)
        for one in drawn.requests
    ]
    return Job(
        model=str(checkpoint(shape, env.FOLDER / "models", plan.seed)),
        options={},
        threads=plan.limits.threads,
        is_greedy=workload != "parallel",
        seed=plan.seed,
        max_model_len=CONTEXT_TOKENS,
        max_num_seqs=shape.max_num_seqs,
        max_batched_tokens=BATCHED_TOKENS,
        kv_bytes=KV_BYTES,
        warm_up=make_warm_up(shape, requests[0].n),
        requests=requests,
    )


def make_check(shape: Shape, plan: Plan) -> Job:
    """The first requests of ``offline``, greedily."""
    job = make_job(shape, "offline", plan)
    return replace(job, requests=job.requests[:NUM_CHECKED])


def make_warm_up(shape: Shape, n: int) -> list[Request]:
    """A few short requests whose prompts begin unlike any of the workload's."""
    rng = random.Random(f"warm-up {shape.name}")
    prompts = [[rng.randrange(1, shape.vocab_size) for _ in range(64)] for _ in range(4)]
    return [Request(prompt, 16, n, seed) for seed, prompt in enumerate(prompts)]
