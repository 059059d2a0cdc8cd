"""Values on their way between the host and the device that computes: few copies, as late as can be.

Owns: nothing.  Thread-safety: any thread; a copy goes in the order of the caller's current stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Indices = Sequence[int] | NDArray[np.int64]


def to_device(values: NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """``values`` as a tensor on ``device``: themselves on the CPU, else a copy that nobody awaits.

    It leaves from pinned memory, which torch keeps until the stream is past the copy.
    """
    host = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type == "cpu" or host.device.type != "cpu":
        return host
    return pinned(host).to(device, non_blocking=True)


def copy_into(target: Tensor, values: NDArray[Any]) -> None:
    """Overwrite a tensor on any device, without waiting."""
    host = torch.from_numpy(values)
    target.copy_(host if target.device.type == "cpu" else pinned(host), non_blocking=True)


def pinned(host: Tensor) -> Tensor:
    """A copy of a host tensor that the GPU can read by itself. Not yet run on a GPU."""
    return host.pin_memory()


def take_rows(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """``tensor[rows]``, the tensor itself where these are all of them in order."""
    if len(rows) == len(tensor) and all(idx == row for idx, row in enumerate(rows)):
        return tensor
    return tensor.index_select(0, to_device(np.array(rows, dtype=np.int64), tensor.device))


def flat_places(rows: Indices, columns: Indices, matrix: Tensor) -> Tensor:
    """Where the entries ``[rows[i], columns[i]]`` of a contiguous matrix are in its flat view."""
    places = np.asarray(rows, dtype=np.int64) * matrix.shape[1] + np.asarray(columns)
    return to_device(places, matrix.device)


def to_host(*tensors: Tensor) -> list[NDArray[np.float64]]:
    """All of them in one copy, waiting for whatever computes them.

    As float64, which holds token ids, float32 values and truth values exactly.
    """
    flat = torch.cat([tensor.reshape(-1).double() for tensor in tensors]).cpu().numpy()
    ends = np.cumsum([tensor.numel() for tensor in tensors])[:-1]
    parts = np.split(flat, ends)
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
