"""Compiles every Triton kernel variant to an sm_90 cubin, without a GPU; run as a script.

The real launchers run with ``JITFunction.run`` replaced, so what is compiled is what they launch:
same element types, constants, alignments and options. Prints a line per variant, with the time it
took, the shared memory and the registers; fails where no cubin comes out or the memory is too much.

Owns: nothing.  Thread-safety: a process of its own.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from vmalloc.backend import KVBatchView
from vmalloc.kernels.attention_call import AttentionCall
from vmalloc.kernels.contiguous.triton_rows import launch_decode_rows
from vmalloc.kernels.triton_append import launch_append
from vmalloc.kernels.triton_copy import launch_copy
from vmalloc.kernels.triton_decode import launch_decode
from vmalloc.kernels.triton_prefill import launch_prefill

TARGET = GPUTarget("cuda", 90, 32)
MAX_SHARED_BYTES = 227 * 1024  # of one block on sm_90
POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
POINTER |= {torch.int64: "*i64", torch.int32: "*i32", torch.int16: "*i16", torch.uint8: "*u8"}

launches: dict[str, tuple[ASTSource, dict[str, Any]]] = {}


def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Stands for ``JITFunction.run``: notes what would be compiled for these arguments."""
    names = [parameter.name for parameter in kernel.params]
    values = dict(zip(names, args, strict=False))
    options = {name: value for name, value in kwargs.items() if name not in names}
    values |= {name: value for name, value in kwargs.items() if name in names}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(index,)] = "constexpr", value
            continue
        address = value.data_ptr() if isinstance(value, Tensor) else value
        if isinstance(value, Tensor):
            signature[parameter.name] = POINTER[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
            continue
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[(index,)] = "constexpr", 1
            continue
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
        if address % 16 == 0 and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    launches[f"{kernel.__name__}-{source.hash()}"] = (source, options)


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def launch_attention(
    dtype: torch.dtype, dim: int, group: int, block_size: int, all_features: bool
) -> None:
    """Append, decode and prefill as a model of this shape launches them.

    ``block_size`` 0: over slots, so far apart that their stride exceeds 32 bits.
    """
    num_kv_heads = 2
    rows = torch.zeros(4, 2 * num_kv_heads * dim, dtype=dtype).unflatten(1, (2, num_kv_heads, dim))
    # Two layers' K and V; on meta, where a tensor has strides and no memory.
    block_rows = block_size or -(-(2**32) // (4 * num_kv_heads * dim)) // 16 * 16
    caches = torch.empty(2, block_rows, 4, num_kv_heads, dim, dtype=dtype, device="meta")
    k_cache, v_cache = caches[:, :, 2], caches[:, :, 3]
    query = torch.zeros(4, num_kv_heads * group, dim, dtype=dtype)
    table = torch.zeros(1, 64, dtype=torch.int32) if block_size else None
    settings: tuple[float, int, float, Tensor | None] = (0.1, -1, 0.0, None)
    if all_features:
        settings = (0.1, 300, 30.0, torch.zeros(query.shape[1]))
    for num_new in (1, 4):
        view = KVBatchView(int32([0]), int32([0, num_new]), int32([9]), num_new, 1024, table)
        launch_append(rows[:, 0], rows[:, 1], k_cache, v_cache, view)
        launch = launch_decode if num_new == 1 else launch_prefill
        launch(AttentionCall(query, k_cache, v_cache, view, *settings, None), query.clone())


def launch_rows() -> None:
    view = KVBatchView(int32([0]), int32([0, 1]), int32([9]), 1, 1024)
    launch_decode_rows(int32([0] * 8).view(4, 2), view, 2048)


def launch_copies() -> None:
    pairs = int32([0, 1]).unflatten(0, (1, 2))
    for row_elements in (64, 40, 6, 3):  # copied as words of 8, 8, 4 and 2 bytes
        blocks = torch.zeros(2, 2, 16, row_elements, dtype=torch.bfloat16)
        for num_rows in (None, int32([3])):
            launch_copy(blocks, pairs, num_rows)


def registers(cubin: bytes) -> str:
    """What cuobjdump says of registers and of memory that registers spilled to."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return " ".join(re.findall(r"\b(?:REG|STACK|LOCAL):\d+", text))


def variants() -> Iterator[tuple[torch.dtype, int, int, int, bool]]:
    """Dtype, head_dim, query heads per KV head, block size or 0, whether all features are on."""
    yield torch.bfloat16, 128, 4, 16, False
    yield torch.bfloat16, 80, 7, 16, True
    yield torch.float16, 64, 1, 32, True
    yield torch.float32, 128, 4, 16, False
    yield torch.float32, 40, 1, 5, True
    yield torch.bfloat16, 256, 8, 16, False
    yield torch.float32, 256, 1, 16, True
    yield torch.bfloat16, 128, 4, 0, False
    yield torch.float16, 80, 7, 0, True
    yield torch.float32, 40, 1, 0, True
    yield torch.bfloat16, 256, 8, 0, False


def main() -> None:
    JITFunction.run = record
    for variant in itertools.islice(variants(), int(os.environ.get("VARIANTS", "99"))):
        launch_attention(*variant)
    launch_copies()
    launch_rows()
    for source, options in launches.values():
        start = time.perf_counter()
        kernel = triton.compile(source, target=TARGET, options=options)
        seconds = time.perf_counter() - start
        cubin, shared = kernel.asm["cubin"], kernel.metadata.shared
        assert cubin[:4] == b"\x7fELF", f"{source.name}: no cubin"
        assert kernel.metadata.target.arch == TARGET.arch
        assert shared <= MAX_SHARED_BYTES, f"{source.name}: {shared} bytes of shared memory"
        dtype = source.signature.get("query", source.signature.get("key", ""))
        print(f"{source.name} {dtype} {seconds:.1f}s shared={shared} {registers(cubin)}")
        sys.stdout.flush()
    print(f"compiled {len(launches)} variants")


if __name__ == "__main__":
    main()
