"""Names of devices and of drivers: what is allowed, and what they stand for.

Owns: nothing.  Thread-safety: pure functions.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, get_args

from .errors import ConfigError

if TYPE_CHECKING:
    import torch

DriverName = Literal["auto", "host", "cuda", "null"]


def check_device(device: str, driver: str = "auto") -> None:
    """Refuse a device or driver that there is not, and pairs that cannot work.

    Raises:
        ConfigError: naming the value and what is supported.
    """
    if not isinstance(device, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigError(f"device is {device!r}; supported: cpu, cuda, cuda:N")
    if driver not in get_args(DriverName):
        raise ConfigError(f"driver is {driver!r}; supported: {', '.join(get_args(DriverName))}")
    if driver == "host" and device != "cpu":
        raise ConfigError(
            f"driver is 'host' and device {device!r}; the host driver's memory is on 'cpu', a CUDA "
            "device takes driver 'cuda'"
        )


def resolve_driver(device: str, driver: str) -> str:
    """The driver that ``"auto"`` stands for on ``device``."""
    if driver != "auto":
        return driver
    return "host" if device == "cpu" else "cuda"


def device_index(device: str) -> int:
    """``"cuda:1"`` -> 1; 0 where no number is given."""
    return int(device.partition(":")[2] or 0)


def tensor_device(device: str) -> torch.device:
    """Where tensors for ``device`` live; ``"cuda"`` is device 0, whichever is current.

    Raises:
        ConfigError: torch has no such device.
    """
    import torch

    if device == "cpu":
        return torch.device("cpu")
    num_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device_index(device)
    if index >= num_devices:
        raise ConfigError(
            f"device is {device!r}; torch {torch.__version__} sees {num_devices} CUDA devices"
        )
    return torch.device("cuda", index)


def current_stream(device: torch.device) -> int:
    """Pointer of torch's current stream on ``device``; 0 on the CPU, which has none."""
    import torch

    if device.type == "cpu":
        return 0
    return torch.cuda.current_stream(device).cuda_stream
