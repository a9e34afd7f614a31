"""Devices and dtypes as code written for torch passes them to ``to``."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from vistower.errors import DeviceError, TorchOnlyError
from vistower.execution.device import Device, parse_device


def is_dtype(value: Any) -> bool:
    """Whether it is a dtype, of torch or NumPy."""
    torch_dtype = getattr(sys.modules.get("torch"), "dtype", None)
    return isinstance(value, (np.dtype, type)) or (
        torch_dtype is not None and isinstance(value, torch_dtype)
    )


def dtype_name(value: Any) -> str:
    """Its name without the library's, e.g. ``float32``."""
    # torch's prints as "torch.float32".
    return value.__name__ if isinstance(value, type) else str(value).rpartition(".")[2]


def numpy_dtype(value: Any) -> np.dtype[Any]:
    """NumPy's dtype of a dtype.

    Raises:
        TorchOnlyError: NumPy has none of that name (bfloat16).
    """
    try:
        return np.dtype(dtype_name(value))
    except TypeError as error:
        raise TorchOnlyError(f"NumPy has no dtype {value}.") from error


def parsed(value: Any) -> Device | None:
    """A device as it was given; None for ``auto`` and what is no device known here."""
    try:
        return parse_device(value)
    except DeviceError:
        return None


def in_host_memory(value: Any) -> bool:
    """Whether a device as it was given computes in host memory."""
    device = parsed(value)
    return device is not None and not device.on_gpu


def torch_name(device: Device) -> str:
    """What torch calls the memory of a device: ``cpu`` or ``cuda:N``."""
    return f"cuda:{device.index}" if device.on_gpu else "cpu"
