"""Which attention kernels there are on this machine, and how far each may read.

Owns: nothing.  Thread-safety: reads what is installed only.
"""

from __future__ import annotations

from typing import Any

from . import _core
from .kernels import cpu, flash_paged, paged, paged_gpu
from .kernels.contiguous.dispatch import KERNELS
from .kernels.gpu_checks import triton_absence


def kernel_facts() -> list[dict[str, Any]]:
    """One entry per kernel, present or not, as plain JSON values.

    ``layout`` is what it reads: ``"slots"`` of the virtual backend, ``"blocks"`` of the paged one,
    or ``"slots, blocks"``. ``absent`` is why it cannot be used, None if it can; what a kernel needs
    of the shapes and of the device is asked when it is chosen.
    """
    facts = [
        {
            **_entry("cpu", "slots, blocks", "vmalloc", cpu.LOOKAHEAD_ROWS, None),
            "isa": _core.attention_isa(),
            "dtypes": sorted(str(dtype).removeprefix("torch.") for dtype in cpu.SUPPORTED_DTYPES),
            "max_head_dim": cpu.MAX_HEAD_DIM,
        }
    ]
    for name, make in KERNELS.items():
        kernel = make()
        facts.append(_entry("cuda", "slots", name, kernel.lookahead_rows, kernel.absence()))
    for name in paged.NAMES:
        absence = _flash_attn_absence() if name == "fa2" else triton_absence()
        facts.append(_entry("cuda", "blocks", name, paged_gpu.LOOKAHEAD_ROWS, absence))
    return facts


def _entry(
    device: str, layout: str, name: str, lookahead_rows: int, absence: str | None
) -> dict[str, Any]:
    return {
        "device": device,
        "layout": layout,
        "name": name,
        "lookahead_rows": lookahead_rows,
        "absent": absence,
    }


def _flash_attn_absence() -> str | None:
    if flash_paged.load_flash_attn() is None:
        return "flash-attn is not installed or does not load"
    return None
