"""Antialiased separable resampling, equal to torchvision's; to the bit for uint8.

Each axis is resampled with a filter widened by the scale, as a banded matrix product:

- `resize` is for uint8. torchvision rounds the weights x 2**p to integers, the largest p for
  which every weight fits int16, and the result of each axis to uint8, horizontally first (ATen,
  ``UpSampleKernel.cpp``, ``compute_index_ranges_int16_weights``). The sums here, taken in float64
  where float32 could round, are the very same integers.
- `resize_float` is ATen's path for float tensors to within float32's rounding, which leaves the
  order of the axes free: vertically first, rows of interleaved channels need no transposing.

Only a window of the output is computed, from the input it needs: a centre crop costs its own size.
Every product is small enough for OpenBLAS to compute in the calling thread: its own threads would
fight the model's for the cores, and concurrent callers of them wait for each other.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Arithmetic = Literal["torchvision", "float"]
Filter = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
Float = npt.NDArray[np.floating[Any]]

_ATEN_MAX_PRECISION = 22
_BLOCK = 32
"""Outputs per matrix product: few enough that the band is narrow, enough for BLAS."""

_BLOCK_ROWS = 6
_BLOCK_COLUMNS = 16
"""The same for `resize_float`, vertically and horizontally; measured at 1024 x 768."""

_ONE_THREAD = 1 << 18
"""OpenBLAS takes more than one thread for products of more multiplications than this
(``interface/gemm.c``: ``SMP_THRESHOLD_MIN`` x ``GEMM_MULTITHREAD_THRESHOLD``)."""

_KEPT_SCRATCH = 1 << 23
"""Floats a thread keeps for the next picture: fresh memory costs page faults. 32 MB."""

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


def _lanczos(x: Float) -> Float:
    """The sinc function, windowed by its own central lobe stretched to three."""
    value: Float = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return value


_FILTERS: dict[Filter, tuple[Callable[[Float], Float], float]] = {
    "lanczos": (_lanczos, 3.0),
    "bilinear": (_bilinear, 1.0),
    "bicubic": (_bicubic, 2.0),
}
"""Filter and its radius at scale 1. torchvision has no antialiased box and hamming."""


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
    size: int,
    target: int,
    window: tuple[int, int],
    kind: Filter,
    arithmetic: Arithmetic,
    block: int = _BLOCK,
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
    for start in range(0, len(lows), block):
        stop = min(start + block, len(lows))
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


def _times(left: Float, right: Float, out: Float) -> None:
    """``out = left @ right`` for (..., M, K) and (..., K, N), in the calling thread alone."""
    rows, inner = left.shape[-2:]
    columns = right.shape[-1]
    if rows * inner * columns <= _ONE_THREAD:
        np.matmul(left, right, out=out)
    elif rows >= columns:
        step = max(1, _ONE_THREAD // (inner * columns))
        for at in range(0, rows, step):
            part = slice(at, at + step)
            np.matmul(left[..., part, :], right, out=out[..., part, :])
    else:
        step = max(1, _ONE_THREAD // (inner * rows))
        for at in range(0, columns, step):
            part = slice(at, at + step)
            np.matmul(left, right[..., part], out=out[..., part])


def resize(
    image: npt.NDArray[np.uint8],
    size: tuple[int, int],
    window: tuple[int, int, int, int],
    kind: Filter,
) -> Float:
    """Resize a uint8 image in torchvision's arithmetic and return a window of the result.

    Args:
        image: (H, W, C).
        size: (height, width) of the whole result.
        window: top, left, bottom, right of the part wanted.
        kind: the filter.

    Returns:
        (C, bottom - top, right - left); integers in 0..255 held in floats.
    """
    height, width, channels = image.shape
    top, left, bottom, right = window
    across = _axis(width, size[1], (left, right), kind, "torchvision")
    down = _axis(height, size[0], (top, bottom), kind, "torchvision")
    image = image[down.low : down.high]
    if width == size[1]:
        rows: Float = np.ascontiguousarray(image[:, left:right].transpose(2, 0, 1)).astype(
            down.dtype
        )
    else:
        rows = np.empty((channels, len(image), right - left), dtype=down.dtype)
        for band in across.bands:
            planes = image[:, band.low : band.high].transpose(2, 0, 1)
            product = np.empty((channels, len(image), band.stop - band.start), across.dtype)
            _times(planes.astype(across.dtype, order="C"), band.matrix, product)
            rows[:, :, band.start : band.stop] = _to_uint8_range(product, across.precision)
    if height == size[0]:
        return rows[:, top - down.low : bottom - down.low]
    out = np.empty((channels, bottom - top, right - left), dtype=down.dtype)
    for band in down.bands:
        part = rows[:, band.low - down.low : band.high - down.low]
        product = np.empty((channels, band.stop - band.start, right - left), down.dtype)
        _times(band.matrix.T, part, product)
        out[:, band.start : band.stop] = _to_uint8_range(product, down.precision)
    return out


def nearest(
    image: npt.NDArray[Any], size: tuple[int, int], window: tuple[int, int, int, int]
) -> npt.NDArray[Any]:
    """The window of an image (H, W, C) resized by taking the nearest pixel: (C, h, w).

    torchvision's ``NEAREST_EXACT``, floor((index + 1/2) x scale) in float32 (ATen, ``UpSample.h``,
    ``nearest_neighbor_exact_compute_source_index``); arguments as for `resize`.
    """
    top, left, bottom, right = window
    rows = _nearest_inputs(image.shape[0], size[0], top, bottom)
    columns = _nearest_inputs(image.shape[1], size[1], left, right)
    return image[rows[:, None], columns].transpose(2, 0, 1)


def _nearest_inputs(size: int, target: int, start: int, stop: int) -> npt.NDArray[np.intp]:
    centers = np.arange(start, stop, dtype=np.float32) + np.float32(0.5)
    positions = centers * (np.float32(size) / np.float32(target))
    inputs: npt.NDArray[np.intp] = np.minimum(np.floor(positions).astype(np.intp), size - 1)
    return inputs


def resize_float(
    image: npt.NDArray[Any],
    scale: npt.NDArray[np.float32],
    size: tuple[int, int],
    window: tuple[int, int, int, int],
    kind: Filter,
    out: npt.NDArray[np.float32],
) -> None:
    """Resize an image in float32, times a factor for each channel, and write a window of it.

    Args:
        image: (H, W, C') of any real dtype; its first C channels are used.
        scale: (C,).
        size: (height, width) of the whole result.
        window: top, left, bottom, right of the part wanted.
        kind: the filter.
        out: (C, bottom - top, right - left).
    """
    height, width = image.shape[:2]
    top, left, bottom, right = window
    across = _axis(width, size[1], (left, right), kind, "float", _BLOCK_COLUMNS)
    down = _axis(height, size[0], (top, bottom), kind, "float", _BLOCK_ROWS)
    # An axis that keeps its size is cut, not resampled.
    keeps_height, keeps_width = height == size[0], width == size[1]
    lines = slice(top, bottom) if keeps_height else slice(down.low, down.high)
    columns = slice(left, right) if keeps_width else slice(across.low, across.high)
    image = image[lines, columns]
    channels = len(scale)
    interleaved = image.strides[1:] == (image.itemsize * image.shape[2], image.itemsize)
    down_first = bottom - top < len(image) and interleaved and not keeps_height
    height_now = bottom - top if down_first else len(image)
    planes = _scratch.array("planes", (channels, height_now, image.shape[1]))
    if down_first:
        _down_interleaved(image, scale, down, planes)
    else:
        _split(image, scale, planes)
    down_done = down_first or keeps_height
    if keeps_width:
        rows = planes
    else:
        rows = out if down_done else _scratch.array("rows", (channels, height_now, right - left))
        for band in across.bands:
            part = planes[:, :, band.low - across.low : band.high - across.low]
            _times(part, band.matrix, rows[:, :, band.start : band.stop])
    if not down_done:
        for band in down.bands:
            part = rows[:, band.low - down.low : band.high - down.low]
            _times(band.matrix.T, part, out[:, band.start : band.stop])
    elif rows is not out:
        out[:] = rows


def _split(
    image: npt.NDArray[Any], scale: npt.NDArray[np.float32], planes: npt.NDArray[np.float32]
) -> None:
    """(H, W, C') → (C, H, W) of its first C channels, times a factor for each."""
    np.multiply(
        image.transpose(2, 0, 1)[: len(scale)],
        scale[:, None, None],
        out=planes,
        dtype=np.float32,
        casting="unsafe",
    )


def _down_interleaved(
    image: npt.NDArray[Any],
    scale: npt.NDArray[np.float32],
    down: _Axis,
    planes: npt.NDArray[np.float32],
) -> None:
    """The vertical axis of (H, W, C'), whose pixels lie side by side in memory, then `_split`."""
    height, width, channels = image.shape
    lines = np.lib.stride_tricks.as_strided(
        image, (height, width * channels), (image.strides[0], image.itemsize)
    )
    tallest = max(band.high - band.low for band in down.bands)
    # Lines a power of two apart would share the same few places of the cache.
    pitch = width * channels + 16
    buffer = _scratch.array("lines", (tallest, pitch))[:, : width * channels]
    products = _scratch.array("products", (_BLOCK_ROWS, pitch))[:, : width * channels]
    for band in down.bands:
        part, product = buffer[: band.high - band.low], products[: band.stop - band.start]
        np.copyto(part, lines[band.low - down.low : band.high - down.low], casting="unsafe")
        _times(band.matrix.T, part, product)
        _split(_pixels(product, channels), scale, planes[:, band.start : band.stop])


def _pixels(lines: npt.NDArray[np.float32], channels: int) -> npt.NDArray[np.float32]:
    """(rows, W * C) → (rows, W, C), a view whatever the distance of the rows."""
    shape = (len(lines), lines.shape[1] // channels, channels)
    item = lines.itemsize
    return np.lib.stride_tricks.as_strided(lines, shape, (lines.strides[0], channels * item, item))


class _Scratch(threading.local):
    """Memory that a thread uses again for its next picture."""

    def __init__(self) -> None:
        self._kept: dict[str, npt.NDArray[np.float32]] = {}

    def array(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        count = math.prod(shape)
        kept = self._kept.get(name)
        if kept is None or kept.size < count:
            kept = np.empty(count, np.float32)
            if count <= _KEPT_SCRATCH:
                self._kept[name] = kept
        return kept[:count].reshape(shape)


_scratch = _Scratch()
