"""Rescaling and normalization, as the numbers of a configuration say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vistower.lazy import cached_property

Array: TypeAlias = npt.NDArray[np.float32]
Triple: TypeAlias = tuple[float, float, float]


@dataclass(frozen=True)
class Scaling:
    """``((level * factor + offset) - mean) / std / top`` by channel.

    ``mean`` and ``std`` are None without normalization; ``offset`` and ``top`` are EfficientNet's
    ``rescale_offset`` and ``include_top``.
    """

    factor: float
    mean: Triple | None
    std: Triple | None
    offset: float = 0.0
    top: Triple | None = None

    @property
    def scale_and_offset(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The same as ``level * scale + offset``, by channel."""
        none, one = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        divisors = [a * b for a, b in zip(self.std or one, self.top or one, strict=True)]
        scale = tuple(self.factor / divisor for divisor in divisors)
        return scale, tuple(
            (self.offset - mean) / divisor
            for mean, divisor in zip(self.mean or none, divisors, strict=True)
        )

    def write_as_torchvision(self, values: npt.NDArray[Any], out: Array) -> None:
        """Write what the torchvision backend makes of values (3 or 1, H, W), in its own order.

        It subtracts mean/factor from levels and divides by std/factor, in float32.
        """
        if self.offset or self.mean is None or self.std is None:
            factor = np.float32(self.factor)
            np.multiply(values, factor, out=out, dtype=np.float32, casting="unsafe")
            out += np.float32(self.offset)
            if self.mean is not None and self.std is not None:
                out -= _column(self.mean)
                out /= _column(self.std)
        else:
            mean, std = self._fused
            np.subtract(values, mean, out=out, dtype=np.float32, casting="unsafe")
            np.divide(out, std, out=out)
        if self.top is not None:
            out /= _column(self.top)

    def write_as_pillow(self, values: npt.NDArray[Any], out: Array) -> None:
        """Write what the PIL backend makes of values (3, H, W): rescaled in float64, then float32.

        uint8 levels are looked up.
        """
        if values.dtype == np.uint8:
            for channel in range(3):
                np.take(self._table[channel], values[channel].astype(np.intp), out=out[channel])
        else:
            out[:] = self._rescaled_and_normalized(values)

    @cached_property
    def _fused(self) -> tuple[Array, Array]:
        inverse = np.float32(1.0 / self.factor)
        return _column(self.mean) * inverse, _column(self.std) * inverse

    @cached_property
    def _table(self) -> Array:
        """(3, 256): the value of each level of each channel."""
        levels = np.arange(256, dtype=np.uint8)
        return self._rescaled_and_normalized(np.broadcast_to(levels, (3, 1, 256)))[:, 0]

    def _rescaled_and_normalized(self, values: npt.NDArray[Any]) -> Array:
        result: Array = (values.astype(np.float64) * self.factor).astype(np.float32)
        if self.offset:
            result = result + np.float32(self.offset)
        if self.mean is not None and self.std is not None:
            result = (result - _column(self.mean)) / _column(self.std)
        return result if self.top is None else result / _column(self.top)


def _column(values: Triple | None) -> Array:
    return np.asarray(values, np.float32)[:, None, None]
