"""The process in which kernels are probed; see ``kernel_probes``, which starts it.

Prints a JSON line for each probe, so that what was found before a bad read is kept.

Owns: one cache at a time.  Thread-safety: none; one process, torch's current stream.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from vmalloc import SequenceGroupSpec, VirtualKVCache
from vmalloc.errors import ConfigError
from vmalloc.kernels.flash_paged import load_flash_attn
from vmalloc.kernels.select import select_kernels

from .attention_calls import Batch, check_on_meta, flash_attn_slots, make_batch, torch_fa2
from .caches import ModelShape, admit, attend_exactly, fill, make_cache, model_shape, relative_error
from .kernel_probes import GRAPH, Task
from .section import Section
from .timing import capture

GROWTH = (17, 18, 33, 500, 1000, 2049)
DRY_GROWTH = (17, 18, 65, 130)
NUM_SEQS = 4
LAYER = 1
MAX_LEN = 4096
EXACT_BELOW = 1e-2
Attend = Callable[[Batch, Tensor, Tensor, int], Tensor]


def child(tasks: list[Task], section: Section) -> None:
    """Probe what is asked for; a JSON line for each."""
    shape = model_shape(section)
    torch.manual_seed(section.seed)
    for kernel, group in groupby(tasks, key=lambda task: task[0]):
        attend, is_graph_safe = choose(kernel, shape, section)
        if isinstance(attend, str):
            print(json.dumps({"kernel": kernel, "absent": attend}), flush=True)
            continue
        for _, length in group:
            if length == GRAPH:
                report = probe_graph(section, shape, attend, is_graph_safe)
            else:
                report = probe(section, shape, attend, int(length))
            print(json.dumps({"kernel": kernel, "length": length, **report}), flush=True)


def choose(kernel: str, shape: ModelShape, section: Section) -> tuple[Attend | str, bool]:
    """The call that a name of ``EXPECTED`` stands for, or why there is none; may it be captured?"""
    if kernel == "raw torch":
        return torch_fa2, True
    if kernel == "raw fa2":
        flash_attn = load_flash_attn()
        if flash_attn is None:
            return "flash_attn is not installed or does not load", False
        return partial(flash_attn_slots, flash_attn), True
    prefer = tuple(kernel.split()[1:])
    if section.dry_run and prefer != ("triton",):
        return "no GPU", False
    try:
        chosen = select_kernels(
            shape.layers,
            device="cuda",
            has_block_table=False,
            num_heads=shape.num_heads,
            prefer=prefer,
        )
    except ConfigError as error:
        return str(error), False

    def attend(batch: Batch, k_cache: Tensor, v_cache: Tensor, rows: int) -> Tensor:
        return chosen.varlen_attention(
            batch.query, k_cache, v_cache, batch.view(rows), softmax_scale=batch.scale
        )

    return attend, chosen.is_graph_safe


def _make_cache(section: Section, shape: ModelShape, length: int) -> VirtualKVCache:
    """One whose slots nobody used: what is mapped is what the sequences need."""
    return make_cache(
        section,
        shape,
        max_num_seqs=NUM_SEQS + 1,
        max_seq_len=MAX_LEN,
        num_tokens=(NUM_SEQS + 1) * length,
    )


def probe(section: Section, shape: ModelShape, attend: Attend, length: int) -> dict[str, Any]:
    """One call with all sequences at ``length``, NaN in every mapped row past it."""
    cache = _make_cache(section, shape, length)
    slots = admit(cache, [length] * NUM_SEQS)
    views = cache.layer_views(LAYER)
    mapped = max(cache.mapped_rows(seq_id) for seq_id in range(NUM_SEQS))
    rows_per_page = -(-cache.layout.page_bytes // cache.layout.row_bytes[0])
    if mapped >= length + rows_per_page:
        raise RuntimeError(f"{mapped} rows are mapped for {length}; a page has {rows_per_page}")
    for view in views:
        for slot in slots:
            view[slot, :mapped].fill_(float("nan"))
    fill(cache, range(NUM_SEQS), LAYER + 1)
    batch = make_batch(shape, slots, [length] * NUM_SEQS, 1, section.device)
    row: dict[str, Any] = {"mapped_rows": mapped}
    if section.dry_run and attend is torch_fa2:
        check_on_meta(attend, batch, *views, cache.config.max_seq_len)
        row |= {"found": "exact", "rel_error": None, "note": "schema only"}
    else:
        out = attend(batch, *views, cache.config.max_seq_len)
        row |= judge(out, expected_of(batch, slots, views))
    cache.close()
    return row


def probe_graph(
    section: Section, shape: ModelShape, attend: Attend, is_graph_safe: bool
) -> dict[str, Any]:
    """Capture once; between replays sequences grow into new pages and one starts anew elsewhere.

    A kernel that may not be captured is called each time instead, and the report says so.
    """
    cache = _make_cache(section, shape, GROWTH[-1])
    slots = admit(cache, [GROWTH[0]] * NUM_SEQS)
    views = cache.layer_views(LAYER)
    fill(cache, range(NUM_SEQS), LAYER + 1)
    batch = make_batch(shape, slots, [GROWTH[0]] * NUM_SEQS, 1, section.device)
    if section.dry_run and attend is torch_fa2:
        cache.close()
        return {"lengths": [], "rel_errors": [], "found": "exact", "note": "schema only"}
    out = torch.empty_like(batch.query)
    rows = cache.config.max_seq_len

    def call() -> None:
        out.copy_(attend(batch, *views, rows))

    replay = capture(call, device=section.device) if is_graph_safe else call
    errors = []
    seq_ids = list(range(NUM_SEQS))
    growth = DRY_GROWTH if section.dry_run else GROWTH
    for index, length in enumerate(growth):
        if index == 3:
            # The last sequence ends and another one begins, in a slot of its own.
            cache.free([seq_ids[-1]])
            seq_ids[-1] = NUM_SEQS
            if cache.try_admit(SequenceGroupSpec((NUM_SEQS,), length)) is None:
                raise RuntimeError("no memory for a fifth sequence")
        if not cache.try_extend(seq_ids, [length] * NUM_SEQS):
            raise RuntimeError(f"no memory for {NUM_SEQS} sequences of {length}")
        fill(cache, seq_ids, LAYER + 1)
        slots = [cache.slot_of(seq_id) for seq_id in seq_ids]
        batch.lens.fill_(length)
        batch.slot_idx.copy_(torch.tensor(slots, dtype=torch.int32))
        batch.query.normal_()
        replay()
        now = Batch(batch.query, (length,) * NUM_SEQS, 1, batch.lens, batch.slot_idx,
                    batch.cu_seqlens_q)  # fmt: skip
        errors.append(judge(out, expected_of(now, slots, views)))
    cache.close()
    bad = [error["found"] for error in errors if error["found"] != "exact"]
    return {
        "is_captured": is_graph_safe,
        "lengths": list(growth),
        "rel_errors": [error["rel_error"] for error in errors],
        "found": bad[0] if bad else "exact",
    }


def expected_of(batch: Batch, slots: list[int], views: tuple[Tensor, Tensor]) -> Tensor:
    """What the formula gives for every sequence's one new row."""
    rows = [
        attend_exactly(batch.query[i : i + 1], views[0][slot, :length], views[1][slot, :length])
        for i, (slot, length) in enumerate(zip(slots, batch.lengths, strict=True))
    ]
    return torch.cat(rows)


def judge(out: Tensor, expected: Tensor) -> dict[str, Any]:
    """``found`` and ``rel_error`` of an output."""
    if not bool(out.isfinite().all()):
        return {"found": "nan", "rel_error": None}
    error = relative_error(out, expected)
    return {"found": "exact" if error < EXACT_BELOW else "wrong", "rel_error": error}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Probe kernels; one JSON line each.")
    parser.add_argument("tasks")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    asked: list[Task] = [(kernel, length) for kernel, length in json.loads(given.tasks)]
    child(asked, Section("kernel_probes", out=None, dry_run=given.dry_run))
