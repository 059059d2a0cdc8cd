"""Which device an engine computes on.

Owns: nothing.  Thread-safety: stateless.
"""

from __future__ import annotations

import torch

from ..errors import ConfigError

DEVICE_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
"""Element types that the attention kernels of a kind of device take."""


def choose_device(name: str) -> torch.device:
    """What ``EngineConfig.device`` stands for here; ``"auto"`` is a GPU where torch can use one.

    Raises ``ConfigError`` for a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r}; torch {torch.__version__} finds no GPU to use here")
    index = torch.device(name).index
    if index is None:
        index = torch.cuda.current_device()
    count = torch.cuda.device_count()
    if index >= count:
        raise ConfigError(f"device is {name!r}; there are {count} GPUs, from cuda:0")
    return torch.device("cuda", index)


def module_device(model: torch.nn.Module, name: str) -> torch.device:
    """The device that a ready-built module is on, which must be ``name`` unless that is ``"auto"``.

    Raises ``ConfigError`` if it is elsewhere, on several devices, or where no engine computes.
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        places = ", ".join(sorted(map(str, devices)))
        raise ConfigError(f"model is spread over {places}; it must be on one device")
    (device,) = devices
    if device.type not in DEVICE_DTYPES:
        supported = " and ".join(DEVICE_DTYPES)
        raise ConfigError(f"model is on {device}; engines compute on {supported}")
    wanted = torch.device(device.type if name == "auto" else name)
    if wanted.type != device.type or wanted.index not in (None, device.index):
        raise ConfigError(
            f"device is {name!r} and the model that was passed is on {device}; move it there, or "
            "leave device='auto'"
        )
    return device


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raise ``ConfigError`` for an element type that no kernel of the device takes."""
    supported = DEVICE_DTYPES[device.type]
    if dtype not in supported:
        names = ", ".join(str(one).removeprefix("torch.") for one in supported)
        raise ConfigError(
            f"dtype is {str(dtype).removeprefix('torch.')!r}; on {device.type} it must be one of "
            f"{names}"
        )
