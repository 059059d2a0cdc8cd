"""Runs a few short sequences over a small KV cache of their own, for checks at load time.

Owns: nothing.  Thread-safety: stateless; the model must not be in use.
"""

from __future__ import annotations

from torch import Tensor

from ..backend import KVBackend, SequenceGroupSpec
from ..config import KVCacheConfig, LayerKVSpec
from ..errors import VmallocError
from .cache_factory import CacheFactory
from .compute_stream import current_stream_handle
from .model_runner import ModelRunner
from .packed_forward import MakeForward
from .sampling_params import SamplingParams
from .sequence import Sequence

TRIAL_BYTES = 64 * 1024 * 1024
"""Room for the pages of a few short sequences, on top of their rows; only what is used is taken."""

MAX_TRIAL_TOKENS = 128
"""Longest sequence of a check at load, which may be longer than ``max_model_len``."""


def run_trial(
    make_forward: MakeForward,
    layers: tuple[LayerKVSpec, ...],
    num_heads: int,
    prompts: list[list[int]],
    caches: CacheFactory,
    *,
    first_chunks: list[int] | None = None,
    pads_rows: bool = False,
) -> list[Tensor]:
    """Logits ``[vocab_size]`` at the end of each prompt, all packed together, on the host.

    The first step computes ``first_chunks[i]`` tokens of each prompt (None: all), the second the
    rest. ``pads_rows`` is ``ModelRunner``'s. Raises ``VmallocError`` if the cache has no room.
    """
    assert max(map(len, prompts)) <= MAX_TRIAL_TOKENS
    row_bytes = sum(map(len, prompts)) * sum(layer.token_bytes for layer in layers)
    config = KVCacheConfig(
        layers=layers,
        max_num_seqs=len(prompts),
        max_seq_len=max(map(len, prompts)),
        capacity_bytes=TRIAL_BYTES + 2 * row_bytes,
        commit_ahead_tokens=0,
    )
    backend, kernels = caches.make(config, num_heads)
    with backend:
        runner = ModelRunner(
            make_forward(backend, kernels), backend, caches.device, pads_rows=pads_rows
        )
        return _run(runner, backend, caches, prompts, first_chunks or list(map(len, prompts)))


def _run(
    runner: ModelRunner,
    backend: KVBackend,
    caches: CacheFactory,
    prompts: list[list[int]],
    chunks: list[int],
) -> list[Tensor]:
    params = SamplingParams()
    seqs = [
        Sequence(idx, str(idx), prompt, params, max_tokens=1) for idx, prompt in enumerate(prompts)
    ]
    for seq, num_tokens in zip(seqs, chunks, strict=True):
        if backend.try_admit(SequenceGroupSpec((seq.seq_id,), num_tokens)) is None:
            raise VmallocError("a short sequence found no KV memory")
    logits: dict[int, Tensor] = {}
    while seqs:
        seq_ids = [seq.seq_id for seq in seqs]
        totals = [seq.num_computed_tokens + n for seq, n in zip(seqs, chunks, strict=True)]
        if not backend.try_extend(seq_ids, totals):
            raise VmallocError("a short sequence found no KV memory")
        step = backend.begin_step(current_stream_handle(caches.device))
        try:
            rows = runner.forward(seqs, chunks).cpu().clone()
        finally:
            backend.end_step(step)
        for seq, total in zip(seqs, totals, strict=True):
            seq.num_computed_tokens = total
        ended = [seq for seq in seqs if seq.num_uncomputed_tokens == 0]
        for seq, row in zip(ended, rows, strict=True):
            logits[seq.seq_id] = row
        seqs = [seq for seq in seqs if seq.num_uncomputed_tokens]
        chunks = [seq.num_uncomputed_tokens for seq in seqs]
    return [logits[idx] for idx in range(len(prompts))]
