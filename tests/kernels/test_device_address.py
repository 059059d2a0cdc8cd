"""Caches reach Triton as addresses that its launcher asks nobody about."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vmalloc.backend import KVBatchView
from vmalloc.kernels.attention_call import AttentionCall
from vmalloc.kernels.device_address import DeviceAddress, pointer_of

triton = pytest.importorskip("triton")


def address(value: int, dtype: torch.dtype) -> DeviceAddress:
    made = DeviceAddress(value)
    made.dtype = dtype
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("offset", [0, 8])
def test_triton_takes_an_address_for_a_pointer(dtype: torch.dtype, offset: int) -> None:
    """Same type and alignment as of a tensor there, so the same compiled kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import jit

    specialize = jit.native_specialize_impl  # in Triton 3.6 and 3.7
    backend = type(make_backend(GPUTarget("cuda", 90, 32)))
    tensor = torch.zeros(64, dtype=dtype)[offset // dtype.itemsize :]
    assert tensor.data_ptr() % 16 == offset
    as_tensor, as_address = (
        specialize(backend, argument, False, True, True)
        for argument in (tensor, address(tensor.data_ptr(), dtype))
    )
    assert as_tensor == as_address
    assert as_tensor[0].startswith("*")


def test_a_tensor_of_the_host_is_left_to_the_interpreter() -> None:
    tensor = torch.zeros(1)
    assert pointer_of(tensor) is tensor


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("num_new", [1, 4])
def test_launches_hand_over_addresses_of_caches(
    num_new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher takes an ``int`` unasked: ``getPointer`` of Triton's ``driver``."""
    from triton.runtime.jit import JITFunction

    from vmalloc.kernels.triton_append import launch_append
    from vmalloc.kernels.triton_decode import launch_decode
    from vmalloc.kernels.triton_prefill import launch_prefill

    seen: list[dict[str, Any]] = []

    def run(kernel: Any, *args: Any, **_: Any) -> None:
        seen.append(dict(zip([one.name for one in kernel.params], args, strict=False)))

    monkeypatch.setattr(JITFunction, "run", run)
    with FakeTensorMode():
        caches = torch.empty(2, 512, 2, 2, 64, dtype=torch.bfloat16, device="cuda:0")
        k_cache, v_cache = caches.unbind(2)
        rows = torch.empty(num_new, 2, 64, dtype=torch.bfloat16, device="cuda:0")
        ints = [torch.zeros(n, dtype=torch.int32, device="cuda:0") for n in (1, 2, 1)]
        view = KVBatchView(*ints, num_new, 512)
        launch_append(rows, rows, k_cache, v_cache, view)
        call = AttentionCall(rows, k_cache, v_cache, view, 0.1, -1, 0.0, None, None)
        (launch_decode if num_new == 1 else launch_prefill)(call, torch.empty_like(rows))
    with_caches = [one for one in seen if "k_cache" in one]
    assert len(with_caches) == 2
    for one in with_caches:
        assert isinstance(one["k_cache"], DeviceAddress)
        assert isinstance(one["v_cache"], DeviceAddress)
        assert one["k_cache"].dtype == torch.bfloat16
