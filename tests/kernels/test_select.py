"""Which kernels an engine gets: by device, by layout, by what is installed, by name.

Owns: nothing.  Thread-safety: single-threaded tests.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.test_flash_slots import Fa2, Fa3, FlashInferModule, torch_operator
from vmalloc.backend import KVBatchView
from vmalloc.config import LayerKVSpec
from vmalloc.errors import ConfigError
from vmalloc.kernels.contiguous import dispatch
from vmalloc.kernels.contiguous.flash_attn_2 import FlashAttn2
from vmalloc.kernels.contiguous.flash_attn_3 import FlashAttn3, load_flash_attn_3
from vmalloc.kernels.contiguous.flash_infer import FlashInfer, load_flashinfer
from vmalloc.kernels.contiguous.torch_flash import TorchFlash, operator_absence
from vmalloc.kernels.flash_paged import load_flash_attn
from vmalloc.kernels.gpu_checks import triton_absence
from vmalloc.kernels.select import select_kernels

LAYERS = (LayerKVSpec(num_kv_heads=8, k_head_dim=128, v_head_dim=128, dtype="bfloat16"),)


def view(max_seqlen_q: int, block_table: torch.Tensor | None = None) -> KVBatchView:
    none = torch.zeros(0, dtype=torch.int32)
    return KVBatchView(none, none, none, max_seqlen_q, 1, block_table)


def test_a_cpu_gets_the_cpu_kernels() -> None:
    kernels = select_kernels(LAYERS, device="cpu", has_block_table=False)
    assert (kernels.name, kernels.lookahead_rows, kernels.is_graph_safe) == ("cpu", 0, False)
    assert kernels.kernel_name(view(1)).startswith("cpu_contiguous_")


def test_a_gpu_with_block_tables_gets_the_paged_kernels() -> None:
    kernels = select_kernels(LAYERS, device="cuda", has_block_table=True)
    assert (kernels.name, kernels.lookahead_rows, kernels.is_graph_safe) == ("cuda-blocks", 0, True)
    assert kernels.kernel_name(view(1)) == "triton-decode"
    assert kernels.kernel_name(view(3)) == "triton-prefill"


@pytest.mark.parametrize(
    ("device", "has_block_table", "prefer", "message"),
    [
        ("cpu", False, ["triton"], r"prefer is \['triton'\]; the CPU kernels leave no choice"),
        ("meta", False, [], "device is 'meta'"),
        ("cuda", False, ["nonsense"], "kernel 'nonsense' is unknown; over slots: fa2, fa3"),
        ("cuda", True, ["torch"], "kernel 'torch' is unknown; over block tables: fa2, triton"),
    ],
)
def test_what_cannot_be_is_named(
    device: str, has_block_table: bool, prefer: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        select_kernels(LAYERS, device=device, has_block_table=has_block_table, prefer=prefer)


@pytest.mark.parametrize("name", dispatch.KERNELS)
def test_a_kernel_that_is_not_there_cannot_be_forced(name: str) -> None:
    absence = dispatch.KERNELS[name]().absence()
    if absence is None:
        kernels = select_kernels(LAYERS, device="cuda", has_block_table=False, prefer=[name])
        assert kernels.name == "cuda-slots"
    else:
        with pytest.raises(ConfigError, match=f"kernel '{name}' cannot be used: "):
            select_kernels(LAYERS, device="cuda", has_block_table=False, prefer=[name])


@pytest.fixture
def all_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hopper GPU with every library, as far as choosing goes."""
    stand_ins: dict[str, Any] = {
        "fa2": lambda: FlashAttn2(Fa2()),
        "fa3": lambda: FlashAttn3(module=Fa3()),
        "fa3-tma": lambda: FlashAttn3(use_tma=True, module=Fa3()),
        "torch": lambda: TorchFlash(torch_operator),
        "flashinfer": lambda: FlashInfer(FlashInferModule()),
    }
    for name, make in stand_ins.items():
        monkeypatch.setitem(dispatch.KERNELS, name, make)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


@pytest.mark.usefixtures("all_installed")
@pytest.mark.parametrize(
    ("layer", "decode", "prefill"),
    [
        ({}, "fa2-decode", "fa3-prefill"),
        ({"window": 100}, "fa2-decode", "fa3-prefill"),
        ({"dtype": "float32"}, "triton-decode", "triton-prefill"),
        ({"k_head_dim": 100, "v_head_dim": 100}, "triton-decode", "triton-prefill"),
        ({"v_head_dim": 64}, "triton-decode", "triton-prefill"),
    ],
)
def test_the_first_that_takes_a_call_is_chosen(
    layer: dict[str, Any], decode: str, prefill: str
) -> None:
    if triton_absence() is not None:
        decode, prefill = (name.replace("triton", "sdpa") for name in (decode, prefill))
    kernels = select_kernels(
        (replace(LAYERS[0], **layer),), device="cuda", has_block_table=False, num_heads=32
    )
    assert kernels.kernel_name(view(1)) == decode
    assert kernels.kernel_name(view(9)) == prefill
    assert kernels.lookahead_rows == 0


@pytest.mark.usefixtures("all_installed")
@pytest.mark.parametrize(
    ("prefer", "decode", "prefill", "lookahead"),
    [
        (["torch"], "torch-decode", "torch-prefill", 0),
        (["fa2", "torch"], "fa2-decode", "torch-prefill", 0),
        (["fa3-tma"], "fa3-tma-decode", "fa3-tma-prefill", 255),
        (["flashinfer"], "flashinfer-decode", "flashinfer-prefill", 0),
        (["sdpa", "torch"], "sdpa-decode", "sdpa-prefill", 0),
    ],
)
def test_preferred_kernels_alone_are_used(
    prefer: list[str], decode: str, prefill: str, lookahead: int
) -> None:
    kernels = select_kernels(LAYERS, device="cuda", has_block_table=False, prefer=prefer)
    assert kernels.kernel_name(view(1)) == decode
    assert kernels.kernel_name(view(9)) == prefill
    assert kernels.lookahead_rows == lookahead
    assert kernels.is_graph_safe == (not {"flashinfer", "sdpa"} & set(prefer))


@pytest.mark.usefixtures("all_installed")
def test_a_call_that_no_preferred_kernel_takes_says_why() -> None:
    kernels = select_kernels(LAYERS, device="cuda", has_block_table=False, prefer=["fa2"])
    with pytest.raises(ConfigError, match=r"takes this call \(fa2: it takes one new row"):
        kernels.kernel_name(view(9))


def test_decodes_try_what_a_graph_may_capture_first() -> None:
    is_safe = [dispatch.KERNELS[name]().is_graph_safe for name in dispatch.DECODE_ORDER]
    assert is_safe == sorted(is_safe, reverse=True)


# ---- signatures, where the libraries are installed; the stand-ins are held to the same


def parameters_of(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self"}


def test_the_operator_of_this_torch_will_do() -> None:
    assert operator_absence() is None


@pytest.mark.skipif(load_flash_attn() is None, reason="flash_attn is not installed")
def test_flash_attn_takes_what_its_stand_in_takes() -> None:
    taken = parameters_of(load_flash_attn().flash_attn_with_kvcache)  # type: ignore[union-attr]
    assert parameters_of(Fa2.flash_attn_with_kvcache) <= taken


@pytest.mark.skipif(load_flash_attn_3() is None, reason="flash_attn_interface is not installed")
def test_flash_attn_3_takes_what_its_stand_in_takes() -> None:
    taken = parameters_of(load_flash_attn_3().flash_attn_with_kvcache)  # type: ignore[union-attr]
    assert parameters_of(Fa3.flash_attn_with_kvcache) <= taken


@pytest.mark.skipif(load_flashinfer() is None, reason="flashinfer is not installed")
def test_flashinfer_takes_what_its_stand_in_takes() -> None:
    wrapper = load_flashinfer().BatchPrefillWithPagedKVCacheWrapper  # type: ignore[union-attr]
    assert {"kv_layout", "backend"} <= parameters_of(wrapper.__init__)
    assert {"q", "paged_kv_cache"} <= parameters_of(wrapper.run)
    planned = (
        "qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads"
        " num_kv_heads head_dim_qk page_size causal sm_scale window_left logits_soft_cap"
        " q_data_type kv_data_type"
    )
    assert set(planned.split()) <= parameters_of(wrapper.plan)
