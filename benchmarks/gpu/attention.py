"""The same kernel libraries over one address range a sequence and over block tables.

Decode (one new row) and prefill (a whole prompt) in the 8B shape: 32 layers, 32 query and 8 KV
heads of 128, bfloat16, layer-interleaved rows of 128 KiB a token. Contenders of a case take turns;
decode is timed in CUDA graphs that walk through the layers, so neither launches nor caches flatter
it. "raw" is the library called as it is, "ours" our dispatch told to use that kernel. Blocks are
drawn without order, as in a pool in use, from buffers of their own a layer. "dense" is torch's
kernel over an ordinary tensor [batch, rows, heads, head_dim]: what strides and mappings cost.
"whole view" leaves the view at full capacity instead of cutting it to a power of two.

result: ``copy_gb_per_s`` (read plus written; measured first); ``rows`` [{phase, batch, length,
num_new, bytes, layers, kernels {name: {us, roofline (decode: share of the copy bandwidth),
rel_error, is_captured, tflop_per_s (prefill)} or {error}}}], times a layer.

Expected: decode equal within noise at equal length for one library (both read each row once); the
contiguous one ahead where blocks of 16 rows cost address arithmetic; whole views behind for
flash-attn, whose splits follow the view's length.

Owns: the caches it makes.  Thread-safety: none; one process, torch's current stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vmalloc import VirtualKVCache
from vmalloc.errors import ConfigError
from vmalloc.kernels.buckets import bucket_rows
from vmalloc.kernels.flash_paged import load_flash_attn
from vmalloc.kernels.select import AttentionKernels, select_kernels

from .attention_calls import (
    FLASH_ATTN_BLOCK,
    Batch,
    check_on_meta,
    flash_attn_blocks,
    flash_attn_slots,
    make_batch,
    make_block_table,
    slot_starts,
    torch_fa2,
)
from .caches import ModelShape, admit, attend_exactly, fill, make_cache, model_shape, relative_error
from .section import Section, run_section
from .timing import capture, compare_us, measure_copy, spread

MAX_TOKENS = 262_144  # 32 GiB of K and V in the 8B shape, and as much again in blocks
MAX_LEN = 32_768
CASES = (
    ("decode", 1, 1024),
    ("decode", 32, 1024),
    ("decode", 8, 8192),
    ("decode", 64, 4096),
    ("prefill", 1, 2048),
    ("prefill", 4, 2048),
    ("decode", 1, 8192),
    ("decode", 128, 1024),
    ("prefill", 1, 8192),
    ("decode", 1, 32768),
    ("decode", 8, 1024),
    ("decode", 8, 32768),
    ("decode", 32, 8192),
)
"""Phase, sequences, rows of each; the chief ones first."""

SLOT_KERNELS = ("torch", "fa2", "fa3", "flashinfer", "triton")
BLOCK_KERNELS = ("fa2", "triton")
SMALL_BLOCK = 16
READ_BYTES = 512 << 20  # that a replay walks through at least, where the layers suffice
CHECKED_ROWS = 16
LayerCall = Callable[[int], Tensor]


@dataclass(frozen=True)
class Contender:
    """What attends in a layer, what its last rows should be, and whether a graph may capture it."""

    call: LayerCall
    exact: LayerCall
    is_graph_safe: bool = True


@dataclass(frozen=True)
class Blocks:
    """K and V in blocks: ``[num_layers, 2, num_tokens, num_kv_heads, head_dim]``."""

    storage: Tensor

    def of_layer(self, layer_idx: int, block_size: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer as ``[num_blocks, block_size, num_kv_heads, head_dim]``."""
        k_blocks, v_blocks = self.storage[layer_idx].unflatten(1, (-1, block_size))
        return k_blocks, v_blocks

    def num_blocks(self, block_size: int) -> int:
        """Blocks of that size."""
        return self.storage.shape[2] // block_size


def main(section: Section) -> None:
    shape = model_shape(section)
    torch.manual_seed(section.seed)
    copy = measure_copy(section.device)
    section.put("copy_gb_per_s", copy)
    cases, max_len, num_tokens = CASES, MAX_LEN, MAX_TOKENS
    if section.dry_run:
        cases, max_len, num_tokens = (("decode", 2, 20), ("prefill", 1, 20)), 32, 128
    max_batch = max(size for _, size, _ in cases)
    cache = make_cache(
        section, shape, max_num_seqs=max_batch, max_seq_len=max_len, num_tokens=num_tokens
    )
    # Every sequence may leave a part of its last block of 256 unused.
    rows = num_tokens + (max_batch + 1) * FLASH_ATTN_BLOCK
    rows -= rows % FLASH_ATTN_BLOCK
    blocks = Blocks(
        torch.empty(
            shape.num_layers, 2, rows, shape.num_kv_heads, shape.head_dim,
            dtype=shape.torch_dtype, device=section.device,
        ).normal_()
    )  # fmt: skip
    for phase, size, length in cases:
        if section.has_time_for(f"{phase} {size} x {length}", 6):
            row = measure_case(section, shape, cache, blocks, phase, size, length, copy["median"])
            section.add("rows", row)
    cache.close()


def measure_case(
    section: Section, shape: ModelShape, cache: VirtualKVCache, blocks: Blocks, phase: str,
    size: int, length: int, copy_gb_per_s: float,
) -> dict[str, Any]:  # fmt: skip
    """All contenders on one batch of ``size`` sequences of ``length`` rows."""
    slots = admit(cache, [length] * size)
    num_new = 1 if phase == "decode" else length
    batch = make_batch(shape, slots, [length] * size, num_new, section.device)
    layer_bytes = size * length * shape.layer_token_bytes
    num_layers = min(shape.num_layers, max(2, -(-READ_BYTES // layer_bytes)))
    fill(cache, range(size), num_layers)
    row: dict[str, Any] = {
        "phase": phase,
        "batch": size,
        "length": length,
        "num_new": num_new,
        "bytes": layer_bytes,
        "layers": num_layers,
        "kernels": {},
    }
    calls = contenders(section, shape, cache, blocks, batch)
    if not section.dry_run:
        calls["raw torch, dense"] = dense_contender(shape, batch, num_layers)
    times = time_calls(section, calls, num_layers, phase, row["kernels"])
    flops = 4 * size * shape.num_heads * shape.head_dim * num_new * (length - (num_new - 1) / 2)
    for name, values in times.items():
        found = {"us": spread([value / num_layers for value in values])}
        if phase == "decode":
            found["roofline"] = round(layer_bytes / found["us"]["median"] / 1e3 / copy_gb_per_s, 3)
        else:
            found["tflop_per_s"] = round(flops / found["us"]["median"] / 1e6, 1)
        row["kernels"][name] |= found
    cache.free(range(size))
    return row


def time_calls(
    section: Section, calls: dict[str, Contender], num_layers: int, phase: str,
    found: dict[str, Any],
) -> dict[str, list[float]]:  # fmt: skip
    """Compare each contender's output with the formula, then time those that work, in turns."""
    ready = {}
    for name, one in calls.items():
        try:
            out = one.call(1)
            expected = one.exact(1)
            error = relative_error(out[-expected.shape[0] :], expected)
            found[name] = {"rel_error": error if math.isfinite(error) else "not finite"}

            def walk(call: LayerCall = one.call) -> None:
                for layer_idx in range(num_layers):
                    call(layer_idx)

            is_captured = phase == "decode" and one.is_graph_safe
            found[name]["is_captured"] = is_captured
            ready[name] = capture(walk, device=section.device) if is_captured else walk
        except Exception as problem:
            if section.dry_run:
                raise
            found[name] = {"error": f"{type(problem).__name__}: {str(problem)[:300]}"}
            print(f"{name}: {problem}", flush=True)
    rounds = 2 if section.dry_run else 12 if phase == "decode" else 6
    return compare_us(ready, device=section.device, rounds=rounds, warmup=2) if ready else {}


def contenders(
    section: Section, shape: ModelShape, cache: VirtualKVCache, blocks: Blocks, batch: Batch
) -> dict[str, Contender]:
    """By name, everyone but the dense one."""
    capacity = cache.config.max_seq_len
    bucket = bucket_rows(max(batch.lengths), capacity)
    calls: dict[str, Contender] = {}
    exact: LayerCall = partial(_exact_slots, cache, batch)
    raw = {"raw torch, slots": bucket, "raw torch, slots, whole view": capacity}
    for name, rows in raw.items():
        if section.dry_run:
            check_on_meta(torch_fa2, batch, *cache.layer_views(1), rows)
            continue
        starts = slot_starts(batch, cache.layer_views(0)[0])
        calls[name] = Contender(
            lambda i, n=rows, s=starts: torch_fa2(batch, *cache.layer_views(i), n, s), exact
        )
    for kernel in SLOT_KERNELS if not section.dry_run else ("triton",):
        chosen = _choose(section, shape, kernel, has_block_table=False)
        if chosen is not None and chosen.lookahead_rows > cache.config.lookahead_tokens:
            section.skip(f"ours {kernel}, slots", f"reads {chosen.lookahead_rows} rows ahead")
        elif chosen is not None:
            view = batch.view(bucket)
            call = partial(_ours, chosen, batch, view, cache.layer_views)
            calls[f"ours {kernel}, slots"] = Contender(call, exact, chosen.is_graph_safe)
    flash_attn = None if section.dry_run else load_flash_attn()
    if flash_attn is not None:
        for name, rows in (("slots", bucket), ("slots, whole view", capacity)):
            calls[f"raw fa2, {name}"] = Contender(
                lambda i, n=rows: flash_attn_slots(flash_attn, batch, *cache.layer_views(i), n),
                exact,
            )
    calls |= _block_contenders(section, shape, blocks, batch, flash_attn)
    return calls


def _block_contenders(
    section: Section, shape: ModelShape, blocks: Blocks, batch: Batch, flash_attn: Any
) -> dict[str, Contender]:
    calls: dict[str, Contender] = {}
    for block_size in (SMALL_BLOCK, FLASH_ATTN_BLOCK):
        table = make_block_table(
            batch.lengths, block_size, blocks.num_blocks(block_size), section.device, section.seed
        )
        exact = partial(_exact_blocks, blocks, block_size, batch, table)
        view = batch.view(table.shape[1] * block_size, table)
        of_layer = partial(_layer_blocks, blocks, block_size)
        if flash_attn is not None and block_size == FLASH_ATTN_BLOCK:
            calls[f"raw fa2, blocks of {block_size}"] = Contender(
                lambda i, table=table, of_layer=of_layer: flash_attn_blocks(
                    flash_attn, batch, *of_layer(i), table
                ),
                exact,
            )
        for kernel in BLOCK_KERNELS:
            if kernel == "fa2" and block_size != FLASH_ATTN_BLOCK:
                continue
            chosen = _choose(section, shape, kernel, has_block_table=True)
            if chosen is not None and not (kernel == "fa2" and flash_attn is None):
                call = partial(_ours, chosen, batch, view, of_layer)
                name = f"ours {kernel}, blocks of {block_size}"
                calls[name] = Contender(call, exact, chosen.is_graph_safe)
    return calls


def dense_contender(shape: ModelShape, batch: Batch, num_layers: int) -> Contender:
    """torch's kernel over ordinary memory, the rows of a batch without gaps."""
    length = max(batch.lengths)
    size = (num_layers, 2, batch.size, length, shape.num_kv_heads, shape.head_dim)
    dense = torch.empty(size, dtype=shape.torch_dtype, device=batch.query.device).normal_()
    place = torch.arange(batch.size, dtype=torch.int32, device=batch.query.device)
    moved = Batch(batch.query, batch.lengths, batch.num_new, batch.lens, place, batch.cu_seqlens_q)

    starts = slot_starts(moved, dense[0, 0])

    def call(layer: int) -> Tensor:
        return torch_fa2(moved, dense[layer, 0], dense[layer, 1], length, starts)

    def exact(layer: int) -> Tensor:
        return _exact_last(batch, dense[layer, 0, -1], dense[layer, 1, -1])

    return Contender(call, exact)


def _choose(
    section: Section, shape: ModelShape, kernel: str, *, has_block_table: bool
) -> AttentionKernels | None:
    """Our dispatch held to one kernel; None where that cannot be, which is noted."""
    where = "blocks" if has_block_table else "slots"
    try:
        return select_kernels(
            shape.layers,
            device="cuda",
            has_block_table=has_block_table,
            num_heads=shape.num_heads,
            prefer=(kernel,),
        )
    except ConfigError as error:
        section.skip(f"ours {kernel}, {where}", str(error))
        return None


def _ours(
    chosen: AttentionKernels, batch: Batch, view: Any, of_layer: Any, layer_idx: int
) -> Tensor:
    return chosen.varlen_attention(
        batch.query, *of_layer(layer_idx), view, softmax_scale=batch.scale
    )


def _layer_blocks(blocks: Blocks, block_size: int, layer_idx: int) -> tuple[Tensor, Tensor]:
    return blocks.of_layer(layer_idx, block_size)


def _exact_slots(cache: VirtualKVCache, batch: Batch, layer_idx: int) -> Tensor:
    k_cache, v_cache = cache.layer_views(layer_idx)
    slot, length = int(batch.slot_idx[-1]), batch.lengths[-1]
    return _exact_last(batch, k_cache[slot, :length], v_cache[slot, :length])


def _exact_blocks(
    blocks: Blocks, block_size: int, batch: Batch, table: Tensor, layer_idx: int
) -> Tensor:
    length = batch.lengths[-1]
    used = table[-1, : -(-length // block_size)].long()
    k_rows, v_rows = (
        part[used].flatten(0, 1)[:length] for part in blocks.of_layer(layer_idx, block_size)
    )
    return _exact_last(batch, k_rows, v_rows)


def _exact_last(batch: Batch, k_rows: Tensor, v_rows: Tensor) -> Tensor:
    """What the last rows of the last sequence should give; all of a long prompt take too long."""
    return attend_exactly(batch.query[-min(CHECKED_ROWS, batch.num_new) :], k_rows, v_rows)


if __name__ == "__main__":
    run_section("attention", main)
