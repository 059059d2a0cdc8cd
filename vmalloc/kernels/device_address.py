"""Addresses that Triton launches with as they are, mapped or not.

Owns: nothing.  Thread-safety: immutable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class DeviceAddress(int):
    """What a kernel needs of a tensor: where it begins, and its element type.

    Triton's launcher asks the driver about the first address of every tensor
    (``cuPointerGetAttribute``) and refuses what is no memory. A view over slots begins in slot 0,
    which is not mapped while nobody uses it, though no program reads there. An integer is launched
    with unasked, and ``dtype`` and ``data_ptr`` make it a pointer argument: so Triton 3.6 and 3.7.
    """

    dtype: torch.dtype

    def data_ptr(self) -> int:
        return int(self)


def pointer_of(tensor: Tensor) -> Tensor | DeviceAddress:
    """The argument for a tensor that may begin where nothing is mapped. Not yet run on a GPU."""
    if not tensor.is_cuda:  # the interpreter wants the tensor
        return tensor
    address = DeviceAddress(tensor.data_ptr())
    address.dtype = tensor.dtype
    return address
