"""What the mixins return: torch tensors to a consumer that has torch, NumPy arrays to others.

The one setting is the environment variable ``VISTOWER_OUTPUT``, read at each call:

- ``auto`` (default): torch tensors if torch is already imported in this process, else NumPy;
- ``torch``: torch tensors; an error if torch is not imported, because vistower never imports it;
- ``numpy``: NumPy arrays.

Tensors share memory with the array they come from. NumPy results are a `FeatureArray`, on which
an unchanged ``features.cpu().numpy()`` works.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from vistower.errors import OutputTypeError

SETTING = "VISTOWER_OUTPUT"


class FeatureArray(np.ndarray[Any, np.dtype[np.float32]]):
    """An array that answers the two calls with which torch code turns a tensor into an array."""

    def cpu(self) -> FeatureArray:
        """Itself: it is in host memory."""
        return self

    def numpy(self) -> npt.NDArray[np.float32]:
        """The same memory as a plain array."""
        return self.view(np.ndarray)


class DeviceArray:
    """A tensor that ONNX Runtime computed, in the memory it was computed in; shared by DLPack.

    ``torch.from_dlpack(array)``, ``cupy.from_dlpack(array)`` and, for host memory,
    ``numpy.from_dlpack(array)`` take it without a copy and keep it alive.
    """

    def __init__(self, value: Any) -> None:
        """Wrap an ``OrtValue`` that nobody else writes to and whose computation is finished."""
        self._value = value

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, {self._value.data_type()}, on {self.device})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, e.g. (B, T, D)."""
        return tuple(self._value.shape())

    @property
    def device(self) -> str:
        """Where it lies: ``cpu`` or ``cuda``."""
        return str(self._value.device_name()).lower()

    def numpy(self) -> npt.NDArray[Any]:
        """A copy in host memory."""
        # From a device this is a copy already; of host memory it may be the memory itself.
        array: npt.NDArray[Any] = self._value.numpy()
        return array.copy() if self.device == "cpu" else array

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """Hand the memory to another library, as the DLPack protocol of the array API says.

        Raises:
            BufferError: a copy or another device is asked for.
        """
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError(
                f"A tensor on {self.device} is shared as it is, not copied or moved: take it "
                f"there first, then copy."
            )
        return self._value.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        """DLPack's (device type, device index)."""
        kind, index = self._value.__dlpack_device__()
        return int(kind), int(index)


def to_output(features: npt.NDArray[np.float32]) -> Any:
    """Wrap float32 features as the setting says, without a copy.

    Raises:
        OutputTypeError: the setting is ``torch`` and torch is not imported, or it is unknown.
    """
    setting = os.environ.get(SETTING, "auto")
    torch = sys.modules.get("torch")
    if setting == "numpy" or (setting == "auto" and torch is None):
        return features.view(FeatureArray)
    if setting not in ("auto", "torch"):
        raise OutputTypeError(f"{SETTING}={setting!r} is not known. Use auto, torch or numpy.")
    if torch is None:
        raise OutputTypeError(
            f"{SETTING}=torch, but this process has not imported torch and vistower never does. "
            f"Import torch before asking for features, or set {SETTING}=numpy."
        )
    return torch.from_numpy(features)
