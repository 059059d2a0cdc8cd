"""Attention on a GPU over slots: checks a call, picks a kernel by its shape, and remembers.

Owns: one object per kernel library, and which kernel takes which case.
Thread-safety: none; one engine thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import torch

from ...errors import ConfigError
from ..attention_call import AttentionCall, on_device
from ..gpu_checks import check_attention, triton_absence
from .append import append_kv
from .case import AttentionCase, case_of, expected_case
from .flash_attn_2 import FlashAttn2
from .flash_attn_3 import FlashAttn3
from .flash_infer import FlashInfer
from .kernel import SlotKernel
from .sdpa import SdpaPerSequence
from .torch_flash import TorchFlash
from .triton_slots import TritonSlots

if TYPE_CHECKING:
    from torch import Tensor

    from ...backend import KVBatchView
    from ...config import LayerKVSpec

KERNELS: Final[dict[str, Callable[[], SlotKernel]]] = {
    "fa2": FlashAttn2,
    "fa3": FlashAttn3,
    "fa3-tma": lambda: FlashAttn3(use_tma=True),
    "torch": TorchFlash,
    "flashinfer": FlashInfer,
    "triton": TritonSlots,
    "sdpa": SdpaPerSequence,
}

DECODE_ORDER: Final = ("fa2", "fa3", "torch", "triton", "flashinfer", "sdpa")
"""Those that a graph may capture come first."""

PREFILL_ORDER: Final = ("fa3", "torch", "flashinfer", "triton", "sdpa")


class ContiguousKernels:
    """``select.AttentionKernels`` over slots.

    Args:
        layers: what the cache stores.
        device: where its tensors live.
        num_heads: query heads; None: as many as KV heads.
        prefer: names out of ``KERNELS`` to use instead of the default orders.

    Raises:
        ConfigError: a name in ``prefer`` is unknown, or that kernel is not on this machine.
    """

    name: Final = "cuda-slots"

    def __init__(
        self,
        layers: Sequence[LayerKVSpec],
        device: torch.device | str,
        *,
        num_heads: int | None = None,
        prefer: Sequence[str] = (),
    ) -> None:
        for name in prefer:
            if name not in KERNELS:
                raise ConfigError(f"kernel {name!r} is unknown; over slots: {', '.join(KERNELS)}")
        self._prefer = tuple(prefer)
        self._kernels: dict[str, SlotKernel] = {}
        self._absences: dict[str, str] = {}
        for name in prefer or dict.fromkeys(DECODE_ORDER + PREFILL_ORDER):
            kernel = KERNELS[name]()
            absence = kernel.absence()
            if absence is None:
                self._kernels[name] = kernel
            elif prefer:
                raise ConfigError(f"kernel {name!r} cannot be used: {absence}")
        self._chosen: dict[AttentionCase, SlotKernel] = {}
        self._typical = expected_case(layers[0], num_heads, torch.device(device))

    @property
    def lookahead_rows(self) -> int:
        return max(kernel.lookahead_rows for kernel in self._kernels.values())

    @property
    def is_graph_safe(self) -> bool:
        if triton_absence() is not None and not self._prefer:
            return False  # calls that only Triton takes would fall to SDPA
        return all(self._kernels[name].is_graph_safe for name in self._prefer)

    def append_kv(
        self, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, view: KVBatchView
    ) -> None:
        append_kv(key, value, k_cache, v_cache, view)

    def varlen_attention(
        self,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        view: KVBatchView,
        *,
        softmax_scale: float,
        window_left: int = -1,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Attend each packed query to its sequence's cached rows up to its own position.

        Args:
            query: ``[total_q, num_heads, k_head_dim]``, head_dim contiguous; rows past
                ``view.cu_seqlens_q[-1]`` are padding and give 0.
            k_cache, v_cache: ``[num_slots, rows, num_kv_heads, head_dim]``, one layer's views.
            view: where the batch lies.
            softmax_scale, window_left, softcap, sinks, out: as ``paged_gpu.varlen_attention`` says.

        Raises:
            ConfigError: a shape, dtype, device or setting does not fit, or no kernel takes it;
                ``out`` was not written.
        """
        call = AttentionCall(
            query,
            k_cache,
            v_cache,
            view,
            float(softmax_scale),  # an int would compile another Triton kernel
            window_left,
            float(softcap),
            sinks,
            out,
        )
        check_attention(call)
        if view.block_table is not None:
            raise ConfigError("the batch has a block table; these kernels work on slots")
        if call.is_empty:
            return call.zeroed_out()
        kernel = self._kernel_for(case_of(call))
        with on_device(query.device):
            attended = kernel.attend(call)
        return attended if out is None or attended is out else out.copy_(attended)

    def kernel_name(self, view: KVBatchView) -> str:
        """Which kernel attends such a batch, for caches like those of the last call.

        Before the first call: in the first layer, without soft-cap or sinks. ``"triton-decode"``,
        ``"torch-prefill"`` and so on.
        """
        is_decode = view.max_seqlen_q <= 1
        kernel = self._kernel_for(replace(self._typical, is_decode=is_decode))
        return f"{kernel.name}-{'decode' if is_decode else 'prefill'}"

    def _kernel_for(self, case: AttentionCase) -> SlotKernel:
        kernel = self._chosen.get(case)
        if kernel is None:
            kernel = self._chosen[case] = self._choose(case)
        self._typical = case
        return kernel

    def _choose(self, case: AttentionCase) -> SlotKernel:
        refusals = []
        for name in self._prefer or (DECODE_ORDER if case.is_decode else PREFILL_ORDER):
            kernel = self._kernels.get(name)
            if kernel is None:
                continue
            refusal = kernel.refusal(case)
            if refusal is None:
                return kernel
            refusals.append(f"{name}: {refusal}")
        raise ConfigError(f"no attention kernel takes this call ({'; '.join(refusals)})")
