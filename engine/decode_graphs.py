"""Decode steps over inputs that stay in place, recorded once per shape and replayed.

Owns: the static inputs, and one recording per (batch size, length bucket).
Thread-safety: none; one engine thread.

A CUDA graph repeats kernel launches with the very addresses and shapes it was captured with. Slots
keep their addresses for the life of a cache, also through sleep and wake, so all that changes from
step to step is in small static tensors: token ids, positions, and the cache's ``KVBatchBuffers``. A
batch is filled up to a recorded size with sequences of one row in the cache's scratch slot, and
lengths are rounded up to a bucket that kernels choose their splits by.

What records is a strategy. ``EagerRecorder`` calls the same function on the same static inputs,
which is how all of this runs, and is tested, where there is no GPU.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceABC
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..backend import KVBackend, KVBatchBuffers, KVBatchView
from ..errors import VmallocError
from ..kernels.buckets import bucket_rows
from .packed_batch import PackedBatch
from .packed_forward import ForwardPass
from .transfer import copy_into

logger = logging.getLogger(__name__)

MAX_RECORDINGS = 256
"""Recordings kept; those not used for longest go first."""

_NOTHING = PackedBatch([], [], [], [], [])

NUM_WARM_UPS = 2
"""Runs before a capture: libraries load kernels and take their workspaces in the first."""

Run = Callable[[], Tensor]


class Recorder(Protocol):
    """Turns a function over static tensors into one that repeats it."""

    def record(self, run: Run) -> Run:
        """A function that does what ``run`` does, which may be run before, and more than once.

        Raises ``CaptureError`` if ``run`` works and cannot be recorded.
        """
        ...


class CaptureError(VmallocError):
    """A forward pass that cannot be captured, e.g. as it reads back what it computes."""


class EagerRecorder:
    """Repeats by calling: for compiled models without graphs, and to run decodes as graphs do."""

    def record(self, run: Run) -> Run:
        return run


class CudaGraphRecorder:
    """Captures CUDA graphs that share one memory pool. Not yet run on a GPU.

    Graphs of one engine run one after another, so each may use what the others use for themselves.
    """

    def __init__(self, device: torch.device) -> None:
        cuda: Any = torch.cuda
        self._device = device
        self._pool = cuda.graph_pool_handle()
        self._stream = cuda.Stream(device)
        self._failed: list[Any] = []

    def record(self, run: Run) -> Run:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(NUM_WARM_UPS):
                run()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: other threads may call the driver meanwhile.
            with (
                torch.cuda.stream(current),  # current again, also where a capture fails
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                output = run()
        except RuntimeError as error:
            self._failed.append(graph)  # torch 2.11 goes on asking it about allocations
            self._clean_up()
            raise CaptureError(str(error).partition("\n")[0]) from error

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    def _clean_up(self) -> None:
        """Take back what a failed capture leaves set in torch up to 2.11; later ones do so.

        The allocator would hold that a capture is under way (pytorch pull request 180395), and
        random numbers on the device would be refused until a capture ends well.
        """
        core: Any = torch._C
        with suppress(AttributeError, RuntimeError):
            core._cuda_endAllocateToPool(self._device.index, self._pool)
        current = torch.cuda.current_stream()
        with suppress(RuntimeError):
            number = torch.zeros(1, device=self._device)
            torch.cuda.synchronize(self._device)
            with (
                torch.cuda.stream(current),
                torch.cuda.graph(
                    torch.cuda.CUDAGraph(), stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                number.add_(1)


class StaticInputs:
    """The inputs of a decode step, always at the same addresses.

    Attributes:
        rows: int64 ``[max_batch]``, 0, 1, 2 ...: one row of logits for each sequence.
        buffers: the cache's index tensors.
    """

    def __init__(self, max_batch: int, max_blocks: int, device: torch.device) -> None:
        self._ids = torch.zeros(2 * max_batch, dtype=torch.int64, device=device)
        self.rows = torch.arange(max_batch, device=device)
        self.buffers = KVBatchBuffers.allocate(max_batch, max_blocks, device)

    def fill(self, token_ids: list[int], positions: list[int], size: int) -> None:
        """Write the token of each sequence and its position; zeros up to ``size``."""
        ids = np.zeros((2, size), dtype=np.int64)
        ids[0, : len(token_ids)] = token_ids
        ids[1, : len(positions)] = positions
        copy_into(self._ids[: 2 * size], ids.reshape(-1))

    def of_size(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, positions and rows of a batch of ``size``."""
        return self._ids[:size], self._ids[size : 2 * size], self.rows[:size]


class DecodeGraphs:
    """Runs batches of one new token a sequence through recordings.

    Args:
        forward: the forward pass.
        backend: its cache. The scratch slot is taken here, and kept.
        recorder: what repeats a shape.
        sizes: batch sizes to record, rising; larger batches are not taken.
        device: where the model computes.

    Attributes:
        num_recorded: recordings made so far.
        num_replayed: how often one was used again.
    """

    def __init__(
        self,
        forward: ForwardPass,
        backend: KVBackend,
        recorder: Recorder,
        sizes: SequenceABC[int],
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._backend = backend
        self._recorder = recorder
        self.sizes = tuple(sizes)
        config = backend.config
        max_blocks = -(-config.max_seq_len // config.block_size) if backend.name == "paged" else 0
        self._inputs = StaticInputs(self.sizes[-1], max_blocks, device)
        # Where each result goes: graphs with results of their own would hold a vocabulary's width
        # for every row of every size and bucket.
        self._logits: Tensor | None = None
        self._recordings: OrderedDict[tuple[int, int], Run] = OrderedDict()
        self._is_on = True
        self.num_recorded = 0
        self.num_replayed = 0
        backend.batch_view((), (), pad_to=1)  # while there is memory for it

    def takes(self, batch: PackedBatch) -> bool:
        """Whether a batch is all decodes, and of a size that is recorded."""
        return self._is_on and batch.is_decode and 0 < len(batch.seq_ids) <= self.sizes[-1]

    def run(self, batch: PackedBatch) -> Tensor:
        """Logits ``[num_seqs, vocab_size]`` of a batch that ``takes`` takes; good until the next
        step."""
        num_seqs = len(batch.seq_ids)
        size = self.sizes[bisect_left(self.sizes, num_seqs)]
        bucket = self._bucket(max(batch.positions) + 1)
        view = self._fill(batch, size, bucket)
        return self._recorded(size, bucket, view)()[:num_seqs]

    def warm_up(self, watch: Callable[[SequenceABC[int]], Iterable[int]] = iter) -> None:
        """Record every size for short sequences, the largest first: the others fit its memory.

        Longer buckets are recorded when they are met. ``watch`` goes over the sizes and may show
        how far it is. To be called within a step.
        """
        bucket = self._bucket(1)
        for size in watch(self.sizes[::-1]):
            if self._is_on:
                self._recorded(size, bucket, self._fill(_NOTHING, size, bucket))()

    def close(self) -> None:
        """Let go of all recordings, and of what they hold on the device."""
        self._is_on = False
        self._recordings.clear()
        self._logits = None
        self._forward.close()

    def _bucket(self, num_tokens: int) -> int:
        return bucket_rows(num_tokens, self._backend.config.max_seq_len)

    def _fill(self, batch: PackedBatch, size: int, bucket: int) -> KVBatchView:
        self._inputs.fill(batch.token_ids, batch.positions, size)
        return self._backend.batch_view(
            batch.seq_ids,
            batch.num_new_tokens,
            out=self._inputs.buffers,
            pad_to=size,
            max_seqlen_k=bucket,
        )

    def _recorded(self, size: int, bucket: int, view: KVBatchView) -> Run:
        """What computes a shape: its recording, made now if there is none."""
        recording = self._recordings.get((size, bucket))
        if recording is not None:
            self._recordings.move_to_end((size, bucket))
            self.num_replayed += 1
            return recording
        token_ids, positions, rows = self._inputs.of_size(size)

        def run() -> Tensor:
            logits = self._forward(token_ids, positions, rows, view)
            if self._logits is None:
                self._logits = logits.new_empty(self.sizes[-1], logits.shape[1])
            return self._logits[:size].copy_(logits)

        # No driver call of the cache's worker may fall into a capture.
        self._backend.wait_worker()
        try:
            recording = self._recorder.record(run)
        except CaptureError as error:
            logger.warning("decodes run without CUDA graphs, one cannot be captured: %s", error)
            self._is_on = False
            self._recordings.clear()
            return run
        self._recordings[size, bucket] = recording
        self.num_recorded += 1
        if len(self._recordings) > MAX_RECORDINGS:
            self._recordings.popitem(last=False)
        return recording


def batch_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, the multiples of 8 and ``max_num_seqs``: padding stays below 8 rows."""
    sizes = {1, 2, 4, *range(8, max_num_seqs + 1, 8), max_num_seqs}
    return tuple(sorted(size for size in sizes if size <= max_num_seqs))
