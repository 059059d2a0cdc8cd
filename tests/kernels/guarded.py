"""A process of its own: Triton kernels over slots whose memory ends with each sequence's last page.

What is not committed is PROT_NONE, so a read or write of it ends the process with SIGSEGV: the CPU
twin of a GPU's error 700. Slots are 16 GiB apart, and in one case rows 32 MiB, so offsets that are
cut to 32 bits end it too.
Run under ``TRITON_INTERPRET=1`` as ``python -m tests.kernels.guarded CASE...``; prints "safe" after
each.

Owns: the mapping.  Thread-safety: a process of its own.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tests.kernels.paged import PagedBatch, assert_close, reference
from vmalloc.backend import KVBatchView
from vmalloc.config import LayerKVSpec
from vmalloc.kernels.contiguous.dispatch import ContiguousKernels

PAGE = mmap.PAGESIZE
MAP_NORESERVE = 0x4000  # Linux's value; the module has no name for it
SLOT_BYTES = 16 << 30
NUM_SLOTS, NUM_ROWS = 3, 400
NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 5, 3, 40
ROW_ELEMENTS = NUM_LAYERS * 2 * NUM_KV_HEADS * HEAD_DIM  # 4800 bytes: rows straddle pages
ITEM = 4


def tensor_over_guarded_memory(lengths: list[int], row_elements: int) -> Tensor:
    """``[NUM_SLOTS, rows, row_elements]`` with pages behind the rows of each length alone.

    Committed pages hold NaN, unless that would be gigabytes.
    """
    size = NUM_SLOTS * SLOT_BYTES
    region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    whole = torch.frombuffer(region, dtype=torch.float32)
    libc = ctypes.CDLL(None, use_errno=True)

    def protect(offset: int, num_bytes: int, protection: int) -> None:
        address = ctypes.c_void_p(whole.data_ptr() + offset)
        if libc.mprotect(address, ctypes.c_size_t(num_bytes), protection) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")

    protect(0, size, 0)
    for slot, length in enumerate(lengths):
        pages = -(-length * row_elements * ITEM // PAGE)
        if pages:
            protect(slot * SLOT_BYTES, pages * PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
            first = slot * SLOT_BYTES // ITEM
            if row_elements == ROW_ELEMENTS:
                whole[first : first + pages * PAGE // ITEM] = float("nan")
    return whole.as_strided(
        (NUM_SLOTS, NUM_ROWS, row_elements), (SLOT_BYTES // ITEM, row_elements, 1)
    )


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        q_lens, used: new rows and lengths of the three slots.
        window_left: as in attention.
        excess: how many rows too many are claimed.
        row_elements: from one row to the next.
    """

    q_lens: tuple[int, ...]
    used: tuple[int, ...]
    window_left: int = -1
    excess: int = 0
    row_elements: int = ROW_ELEMENTS


CASES = {
    "decode": Case((1, 1, 1), (300, 17, 1)),
    "decode-window": Case((1, 1, 1), (300, 17, 1), window_left=20),
    "prefill": Case((40, 17, 1), (70, 17, 64)),
    "empty-slot": Case((1, 0, 5), (33, 0, 5)),
    "wide-rows": Case((1, 3, 1), (300, 17, 1), row_elements=1 << 23),
    # The guard itself: a kernel told of rows that are not there must not live.
    "decode-past-the-end": Case((1, 1, 1), (300, 17, 1), excess=1),
    "prefill-past-the-end": Case((40, 17, 1), (70, 17, 64), excess=8),
}


def int32(values: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def run(case: Case) -> None:
    torch.manual_seed(0)
    memory = tensor_over_guarded_memory(list(case.used), case.row_elements)
    k_cache, v_cache = (
        memory[:, :, part * NUM_KV_HEADS * HEAD_DIM :][:, :, : NUM_KV_HEADS * HEAD_DIM].unflatten(
            2, (NUM_KV_HEADS, HEAD_DIM)
        )
        for part in (8, 9)  # the last layer, at the very end of a row
    )
    bounds = torch.tensor([0, *case.q_lens]).cumsum(0).tolist()
    view = KVBatchView(
        int32((0, 1, 2)), int32(tuple(bounds)), int32(case.used), max(case.q_lens), max(case.used)
    )
    keys = [torch.randn(length, NUM_KV_HEADS, HEAD_DIM) for length in case.used]
    values = [torch.randn(length, NUM_KV_HEADS, HEAD_DIM) for length in case.used]
    for slot, (length, new) in enumerate(zip(case.used, case.q_lens, strict=True)):
        k_cache[slot, : length - new] = keys[slot][: length - new]
        v_cache[slot, : length - new] = values[slot][: length - new]
    new_keys, new_values = (
        torch.cat([rows[len(rows) - new :] for rows, new in zip(cached, case.q_lens, strict=True)])
        for cached in (keys, values)
    )
    layer = LayerKVSpec(num_kv_heads=NUM_KV_HEADS, k_head_dim=HEAD_DIM, v_head_dim=HEAD_DIM)
    kernels = ContiguousKernels([layer], "cpu", prefer=["triton"])
    kernels.append_kv(new_keys, new_values, k_cache, v_cache, view)
    query = torch.randn(bounds[-1], 2 * NUM_KV_HEADS, HEAD_DIM)
    settings = {"softmax_scale": 0.2, "window_left": case.window_left}
    claimed = replace(
        view,
        seqused_k=view.seqused_k + case.excess,
        max_seqlen_k=view.max_seqlen_k + case.excess,
    )
    out = kernels.varlen_attention(query, k_cache, v_cache, claimed, **settings)
    batch = PagedBatch(k_cache, v_cache, view, keys, values)
    assert_close(out, reference(query, batch, **settings))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run(CASES[name])
        print("safe", name)
