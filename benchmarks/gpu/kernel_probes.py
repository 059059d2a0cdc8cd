"""Whether a kernel touches rows past a sequence's end, and whether its CUDA graphs survive growth.

Four sequences over our own cache, whole pages mapped and nothing after them, no lookahead; every
mapped row past the end holds NaN. A bad read ends a CUDA context: probes run in a child process,
and where one kills it, the rest get another one.

result: ``rows`` [{kernel, length, mapped_rows, expected, found, rel_error, is_as_expected}] with
``found`` one of "exact" (finite, relative error under 1e-2), "nan", "wrong", "error 700", or
another error; ``graphs``: the same for one capture replayed while sequences grow into new pages and
one ends and another begins, with ``lengths`` and ``rel_errors`` of the replays.

Expected: "exact" for torch's FlashAttention, flash-attn, Triton, flashinfer, SDPA and FA3 through
its identity table; "error 700" for FA3 by TMA, which loads whole tiles and here is denied its
lookahead rows. "raw" is the library called as it is, "ours" our dispatch told to use it, or its own
choice.

Owns: its child processes.  Thread-safety: none; one process at a time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from vmalloc.kernels.select import select_kernels

from vmalloc import SequenceGroupSpec, VirtualKVCache
from vmalloc.errors import ConfigError
from vmalloc.kernels.flash_paged import load_flash_attn

from .attention_calls import Batch, check_on_meta, flash_attn_slots, make_batch, torch_fa2
from .caches import ModelShape, admit, attend_exactly, fill, make_cache, model_shape, relative_error
from .prepare import ROOT
from .section import Section, run_section
from .timing import capture

LENGTHS = (17, 100, 1000)
GROWTH = (17, 18, 33, 500, 1000, 2049)
NUM_SEQS = 4
LAYER = 1
MAX_LEN = 4096
EXACT_BELOW = 1e-2
EXPECTED = {
    "ours": "exact",
    "ours torch": "exact",
    "ours fa2": "exact",
    "ours triton": "exact",
    "raw torch": "exact",
    "raw fa2": "exact",
    "ours fa3": "exact",
    "ours flashinfer": "exact",
    "ours sdpa": "exact",
    "ours fa3-tma": "error 700",
}
DRY_LENGTHS = (17, 70)  # Triton's interpreter takes its time
DRY_GROWTH = (17, 18, 65, 130)
GRAPH = "graph"
Task = tuple[str, int | str]
"""A kernel's name, and a length or ``GRAPH``."""

Attend = Callable[[Batch, Tensor, Tensor, int], Tensor]


def main(section: Section) -> None:
    lengths = DRY_LENGTHS if section.dry_run else LENGTHS
    left: list[Task] = [
        (kernel, length)
        for kernel, expected in EXPECTED.items()
        for length in ((*lengths, GRAPH) if expected == "exact" else lengths)
    ]
    while left and section.has_time_for(f"{len(left)} probes from {left[0]}", 10):
        left = run_in_child(section, left)
    reports = section.result.get("rows", []) + section.result.get("graphs", [])
    if section.dry_run and not (reports and all(one["is_as_expected"] for one in reports)):
        raise RuntimeError(f"not as expected: {reports}")


def run_in_child(section: Section, tasks: list[Task]) -> list[Task]:
    """Run tasks in one process until it dies; what is left for the next one."""
    command = [sys.executable, "-m", "benchmarks.gpu.kernel_probes", "--child", json.dumps(tasks)]
    command += ["--dry-run"] if section.dry_run else []
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False,
            timeout=max(5.0, section.left_s()),
        )  # fmt: skip
        text, log = done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        text, log = _decoded(error.stdout), f"{_decoded(error.stderr)}\nstopped: out of time"
    print(text + log[-3000:], flush=True)
    left = list(tasks)
    for line in text.splitlines():
        if line.startswith("{"):
            report = json.loads(line)
            _keep(section, report)
            is_absent = "absent" in report
            left = [
                task
                for task in left
                if task[0] != report["kernel"] or not (is_absent or task[1] == report["length"])
            ]
    if left:
        kernel, length = left.pop(0)
        found = _last_error(log)
        _keep(section, {"kernel": kernel, "length": length, "found": found, "rel_error": None})
    return left


def _keep(section: Section, report: dict[str, Any]) -> None:
    """Put a child's report where it belongs."""
    if "absent" in report:
        section.skip(report["kernel"], report["absent"])
        return
    expected = EXPECTED[report["kernel"]]
    report |= {"expected": expected, "is_as_expected": report["found"] == expected}
    section.add("graphs" if report["length"] == GRAPH else "rows", report)


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


def _last_error(log: str) -> str:
    if "illegal memory access" in log or "error 700" in log:
        return "error 700"
    lines = [line for line in log.strip().splitlines() if line and not line.startswith(" ")]
    return lines[-1][:200] if lines else "died without a word"


def _decoded(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


if __name__ == "__main__":
    if "--child" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--child")
        parser.add_argument("--dry-run", action="store_true")
        given = parser.parse_args()
        asked: list[Task] = [(kernel, length) for kernel, length in json.loads(given.child)]
        child(asked, Section("kernel_probes", out=None, dry_run=given.dry_run))
    else:
        run_section("kernel_probes", main)
