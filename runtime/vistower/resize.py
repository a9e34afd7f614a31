"""Antialiased separable resampling, equal to torchvision's; to the bit for uint8.

It resamples each axis with a filter widened by the scale, horizontally first. For uint8 it rounds
the weights to integers and the result of each pass to uint8, so the sums here, taken in float64
where float32 could round, are the very same integers:

- ``torchvision``: weights x 2**p, the largest p for which every weight fits int16 (ATen,
  ``UpSampleKernel.cpp``, ``compute_index_ranges_int16_weights``);
- ``float``: float32 throughout (ATen's path for float tensors).

Only a window of the output is computed, from the input it needs: a centre crop costs its own size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Arithmetic = Literal["torchvision", "float"]
Filter = Literal["bilinear", "bicubic"]
Float = npt.NDArray[np.floating[Any]]

_ATEN_MAX_PRECISION = 22
_BLOCK = 32
"""Output columns per matrix product: few enough that the band is narrow, enough for BLAS."""

_EXACT_FLOAT32 = float(1 << 24)
"""Integers up to here are exact in float32, whatever the order of the additions."""


def _bilinear(x: Float) -> Float:
    value: Float = np.maximum(1 - np.abs(x), 0)
    return value


def _bicubic(x: Float) -> Float:
    """Keys' cubic with a = -0.5, as ATen's antialiasing and Pillow use it."""
    x = np.abs(x)
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * -0.5
    value: Float = np.where(x < 1, inner, np.where(x < 2, outer, 0))
    return value


_FILTERS: dict[Filter, tuple[Callable[[Float], Float], float]] = {
    "bilinear": (_bilinear, 1.0),
    "bicubic": (_bicubic, 2.0),
}
"""Filter and its radius at scale 1."""


@dataclass(frozen=True)
class _Band:
    """Outputs ``start:stop`` of an axis are inputs ``low:high`` times ``matrix`` (high-low, n)."""

    start: int
    stop: int
    low: int
    high: int
    matrix: Float


@dataclass(frozen=True)
class _Axis:
    """One axis of a resize: its bands, and the bits by which integer sums are shifted back."""

    low: int
    high: int
    bands: tuple[_Band, ...]
    precision: int | None
    dtype: np.dtype[Any]


@lru_cache(maxsize=256)
def _axis(
    size: int, target: int, window: tuple[int, int], kind: Filter, arithmetic: Arithmetic
) -> _Axis:
    """Weights of the outputs in ``window`` when ``size`` inputs become ``target`` outputs."""
    real: Any = np.float32 if arithmetic == "float" else np.float64
    function, radius = _FILTERS[kind]
    scale = real(size) / real(target)
    support = real(radius) * max(scale, real(1))
    inverse = real(1) / max(scale, real(1))
    # ATen picks the precision from the largest weight of the whole axis, not of the window.
    outputs = np.arange(target) if arithmetic == "torchvision" else np.arange(*window)
    centers = (scale * (outputs.astype(real) + real(0.5))).astype(real)
    lows = np.maximum((centers - support + real(0.5)).astype(np.int64), 0)
    highs = np.minimum((centers + support + real(0.5)).astype(np.int64), size)
    taps = np.arange(int((highs - lows).max()))
    positions = (taps + lows[:, None]).astype(real)
    weights: Any = function((positions - centers[:, None] + real(0.5)) * inverse).astype(real)
    weights[taps[None] >= (highs - lows)[:, None]] = 0
    weights /= weights.sum(axis=1, keepdims=True, dtype=real)
    precision = None
    if arithmetic != "float":
        precision = _aten_precision(float(weights.max()))
        weights = np.trunc(weights * (1 << precision) + np.copysign(0.5, weights))
    if arithmetic == "torchvision":
        chosen = slice(*window)
        weights, lows, highs = weights[chosen], lows[chosen], highs[chosen]
    dtype: np.dtype[Any] = np.dtype(np.float32)
    if precision is not None:
        largest = 255 * np.abs(weights).sum(axis=1).max() + (1 << (precision - 1))
        dtype = np.dtype(np.float32 if largest < _EXACT_FLOAT32 else np.float64)
    bands = []
    for start in range(0, len(lows), _BLOCK):
        stop = min(start + _BLOCK, len(lows))
        low, high = int(lows[start:stop].min()), int(highs[start:stop].max())
        matrix = np.zeros((high - low, stop - start), dtype=dtype)
        for column in range(start, stop):
            count = highs[column] - lows[column]
            at = lows[column] - low
            matrix[at : at + count, column - start] = weights[column, :count]
        bands.append(_Band(start, stop, low, high, matrix))
    return _Axis(bands[0].low, max(band.high for band in bands), tuple(bands), precision, dtype)


def _aten_precision(largest: float) -> int:
    precision = 0
    while precision < _ATEN_MAX_PRECISION and int(0.5 + largest * (1 << (precision + 1))) < (
        1 << 15
    ):
        precision += 1
    return precision


def _to_uint8_range(sums: Float, precision: int | None) -> Float:
    """Integer sums → floor(sum / 2**precision + 1/2), clamped to 0..255; floats stay."""
    if precision is None:
        return sums
    sums += float(1 << (precision - 1))
    sums *= 2.0**-precision
    np.floor(sums, out=sums)
    return np.clip(sums, 0, 255, out=sums)


def resize(
    image: npt.NDArray[Any],
    size: tuple[int, int],
    window: tuple[int, int, int, int],
    kind: Filter,
    arithmetic: Arithmetic,
) -> Float:
    """Resize an image and return a window of the result.

    Args:
        image: (H, W, C); uint8 for the integer arithmetics, any real dtype for ``float``.
        size: (height, width) of the whole result.
        window: top, left, bottom, right of the part wanted.
        kind: the filter.
        arithmetic: whose rounding to follow.

    Returns:
        (C, bottom - top, right - left); integers in 0..255 held in floats, or float32.
    """
    height, width, channels = image.shape
    top, left, bottom, right = window
    across = _axis(width, size[1], (left, right), kind, arithmetic)
    down = _axis(height, size[0], (top, bottom), kind, arithmetic)
    image = image[down.low : down.high]
    if width == size[1]:
        rows: Float = np.ascontiguousarray(image[:, left:right].transpose(2, 0, 1)).astype(
            down.dtype
        )
    else:
        rows = np.empty((channels, len(image), right - left), dtype=down.dtype)
        for band in across.bands:
            planes = image[:, band.low : band.high].transpose(2, 0, 1)
            product = planes.astype(across.dtype, order="C") @ band.matrix
            rows[:, :, band.start : band.stop] = _to_uint8_range(product, across.precision)
    if height == size[0]:
        return rows[:, top - down.low : bottom - down.low]
    out = np.empty((channels, bottom - top, right - left), dtype=down.dtype)
    for band in down.bands:
        part = rows[:, band.low - down.low : band.high - down.low]
        out[:, band.start : band.stop] = _to_uint8_range(band.matrix.T @ part, down.precision)
    return out
