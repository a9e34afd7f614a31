"""`DeviceArray`: tokens left where they were computed, for other libraries to take by DLPack."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt


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
