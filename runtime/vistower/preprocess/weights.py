"""The weights of one axis of a resize, as ATen and Pillow compute them.

An axis is a banded matrix; the outputs wanted are a window of all, and the cost is theirs alone.
Where even their band would be large (an axis scaled down by thousands), it is not stored, and
computed in pieces each time.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from vistower.preprocess.filters import FILTERS, Filter, Float
from vistower.preprocess.kept import Cache

Arithmetic = Literal["torchvision", "pillow", "float"]

_KEPT_AXES = 1 << 25
"""Bytes of weights kept for the next picture of the same size: 32 MB."""

_STORED = 1 << 20
"""Weights of an axis that is stored; a longer one has narrower bands, or none."""

_EVALUATED = 1 << 14
"""Weights computed at once, in the processor's cache."""

_ATEN_MAX_PRECISION = 22
_ATEN_UPSCALING_PRECISION = 14
_PILLOW_PRECISION = 22
"""``PRECISION_BITS`` of Pillow's ``Resample.c``: 32 - 8 - 2."""

_EDGES_DECIDE = 64
"""From this scale on, the largest weight is one of an output at the picture's edge: its filter is
cut, so its sum is at least 4 % smaller (lanczos; bicubic 8 %, bilinear 12 %), and between inner
outputs, whose sums differ with the phase, weights vary by less than 1 %."""

_EXACT_FLOAT32 = float(1 << 24)
"""Integers up to here are exact in float32, whatever the order of the additions."""


class Piece(NamedTuple):
    """Inputs ``low:high`` times ``matrix`` (high-low, n) are a part of the sums of a band."""

    low: int
    high: int
    matrix: Float


@dataclass(frozen=True)
class Band:
    """Outputs ``start:stop`` of an axis see inputs ``low:high``; ``piece`` is all their weights,
    where they are stored."""

    start: int
    stop: int
    low: int
    high: int
    piece: Piece | None = None


@dataclass(frozen=True)
class Axis:
    """One axis of a resize: inputs ``low:high`` make the outputs of its bands.

    ``precision`` is the bits by which integer sums are shifted back. An axis without bands keeps
    its size: its outputs are the inputs ``low:high``.
    """

    low: int
    high: int
    bands: tuple[Band, ...]
    precision: int | None
    dtype: np.dtype[Any]
    _outputs: _Outputs | None = None

    @property
    def count(self) -> int:
        """Its outputs."""
        return self.bands[-1].stop if self.bands else self.high - self.low

    def longest(self, limit: int) -> int:
        """Inputs of its longest piece where pieces are computed for at most ``limit``."""
        widest = max((band.high - band.low for band in self.bands), default=1)
        return widest if self._outputs is None else min(widest, limit)

    def between(self, first: int, last: int) -> range:
        """The bands, by number, that see any of the inputs ``first:last``."""
        start = bisect_right(self.bands, first, key=lambda band: band.high)
        return range(start, bisect_left(self.bands, last, start, key=lambda band: band.low))

    def pieces(self, band: Band, first: int, last: int, longest: int) -> Iterable[Piece]:
        """The weights of a band for its inputs among ``first:last``, at most ``longest`` at once
        where they are computed now."""
        low, high = band.low, band.high
        if first <= low and last >= high and band.piece is not None:
            return (band.piece,)
        first, last = max(first, low), min(last, high)
        if band.piece is not None:
            return (Piece(first, last, band.piece.matrix[first - low : last - low]),)
        outputs = cast("_Outputs", self._outputs)
        starts = range(first, last, longest)
        parts = ((low, min(low + longest, last)) for low in starts)
        return (Piece(low, high, outputs.column(band.start, low, high)) for low, high in parts)


_axes: Cache[Axis] = Cache(_KEPT_AXES)


def axis(
    size: int,
    target: int,
    window: tuple[int, int],
    kind: Filter,
    arithmetic: Arithmetic,
    block: int,
) -> Axis:
    """Weights of the outputs in ``window`` when ``size`` inputs become ``target`` outputs.

    ``block`` is the number of outputs of a band, fewer where the bands would be large.
    """
    key = (size, target, window, kind, arithmetic, block)
    return _axes.get(key, lambda: _axis(*key), _nbytes)


def _nbytes(axis: Axis) -> int:
    stored = sum(band.piece.matrix.nbytes for band in axis.bands if band.piece is not None)
    outputs = axis._outputs
    return stored + 300 * len(axis.bands) + (0 if outputs is None else outputs.nbytes)


def _axis(
    size: int,
    target: int,
    window: tuple[int, int],
    kind: Filter,
    arithmetic: Arithmetic,
    block: int,
) -> Axis:
    if size == target:
        return Axis(*window, (), None, np.dtype(np.float32))
    precision = {
        "float": None,
        "pillow": _PILLOW_PRECISION,
        "torchvision": aten_precision(size, target, kind) if arithmetic == "torchvision" else None,
    }[arithmetic]
    outputs = _Outputs(_Sampling(size, target, kind, arithmetic), window, precision)
    count, taps = len(outputs.centers), outputs.taps
    if count * taps > _STORED:
        return _long_axis(outputs, precision)
    while block > 1 and count * (taps + (block - 1) * size / target) > _STORED:
        block = (block + 1) // 2
    return _stored_axis(outputs, precision, block)


def _long_axis(outputs: _Outputs, precision: int | None) -> Axis:
    """An axis whose weights are computed again for every picture; sums may need float64."""
    outputs.totals = outputs.sums_and_peaks()[0]
    bands = tuple(
        Band(at, at + 1, int(low), int(high))
        for at, (low, high) in enumerate(zip(outputs.lows, outputs.highs, strict=True))
    )
    dtype = np.dtype(np.float32 if precision is None else np.float64)
    low, high = min(band.low for band in bands), max(band.high for band in bands)
    return Axis(low, high, bands, precision, dtype, outputs)


def _stored_axis(outputs: _Outputs, precision: int | None, block: int) -> Axis:
    lows, highs = outputs.lows, outputs.highs
    rows = max(1, _EVALUATED // outputs.taps)
    weights = np.concatenate(
        [outputs.weights(at, min(at + rows, len(lows))) for at in range(0, len(lows), rows)]
    )
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
        bands.append(Band(start, stop, low, high, Piece(low, high, matrix)))
    return Axis(bands[0].low, max(band.high for band in bands), tuple(bands), precision, dtype)


class _Sampling:
    """Where the outputs of an axis lie among its inputs, and what they see of them."""

    def __init__(self, size: int, target: int, kind: Filter, arithmetic: Arithmetic) -> None:
        self.size = size
        self.target = target
        self.function, radius = FILTERS[kind]
        self.real: Any = np.float32 if arithmetic == "float" else np.float64
        # Pillow hands the size to its resize in a box of float32.
        length = np.float32(size) if arithmetic == "pillow" else size
        self.scale = self.real(length) / self.real(target)
        stretch = max(self.scale, self.real(1))
        self.support = self.real(radius) * stretch
        self.inverse = self.real(1) / stretch


class _Outputs:
    """Some outputs of an axis: their centres, and the inputs ``lows:highs`` each one sees."""

    def __init__(
        self, sampling: _Sampling, window: tuple[int, int], precision: int | None = None
    ) -> None:
        self._sampling = sampling
        self._precision = precision
        real, support = sampling.real, sampling.support
        halves = np.arange(*window) + 0.5
        self.centers: Float = (sampling.scale.astype(np.float64) * halves).astype(real)
        first, last = (self.centers - support, self.centers + support)
        self.lows = np.maximum((first.astype(np.float64) + 0.5).astype(np.int64), 0)
        self.highs = np.minimum((last.astype(np.float64) + 0.5).astype(np.int64), sampling.size)
        self.taps = int((self.highs - self.lows).max())
        self.totals: Float | None = None

    @property
    def nbytes(self) -> int:
        """Of the arrays that describe the outputs."""
        return 4 * self.lows.nbytes

    def _filtered(self, outputs: slice, start: int, stop: int) -> Float:
        """The filter's values at the taps ``start:stop`` of some outputs, zero past their last."""
        sampling = self._sampling
        lows, counts = self.lows[outputs], self.highs[outputs] - self.lows[outputs]
        offsets = np.arange(start, stop, dtype=np.float64) + lows[:, None]
        offsets = offsets.astype(sampling.real, copy=False)
        offsets -= self.centers[outputs, None]
        offsets += sampling.real(0.5)
        offsets *= sampling.inverse
        values: Float = sampling.function(offsets).astype(sampling.real, copy=False)
        if stop > counts.min():
            values[np.arange(start, stop) >= counts[:, None]] = 0
        return values

    def weights(self, start: int, stop: int) -> Float:
        """(stop - start, taps): the weights of the outputs ``start:stop``."""
        values = self._filtered(slice(start, stop), 0, self.taps)
        # One after the other, as ATen and Pillow add them.
        values /= np.add.accumulate(values, axis=1)[:, -1:]
        return self._rounded(values)

    def column(self, output: int, low: int, high: int) -> Float:
        """(high - low, 1): the weights of one output for some inputs."""
        at = self.lows[output]
        values = self._filtered(slice(output, output + 1), low - at, high - at)
        values /= cast("Float", self.totals)[output]
        return self._rounded(values).T

    def _rounded(self, weights: Float) -> Float:
        if self._precision is None:
            return weights
        halves = np.copysign(0.5, weights)
        weights *= 1 << self._precision
        weights += halves
        return np.trunc(weights, out=weights)

    def sums_and_peaks(self) -> tuple[Float, Float]:
        """The sum and the largest of each output's filter values, a bounded number at once."""
        count = len(self.lows)
        sums, peaks = np.zeros((2, count), self._sampling.real)
        rows = max(1, _EVALUATED // self.taps)
        for first in range(0, count, rows):
            outputs = slice(first, first + rows)
            for start in range(0, self.taps, _EVALUATED):
                values = self._filtered(outputs, start, min(start + _EVALUATED, self.taps))
                peaks[outputs] = np.maximum(peaks[outputs], values.max(axis=1))
                values[:, 0] += sums[outputs]
                sums[outputs] = np.add.accumulate(values, axis=1)[:, -1]
        return sums, peaks


@lru_cache(maxsize=4096)
def aten_precision(size: int, target: int, kind: Filter) -> int:
    """Bits of ATen's integer weights, which its largest weight of the whole axis decides.

    The largest precision for which all weights x 2**p fit int16, at most 22 (ATen,
    ``UpSampleKernel.cpp``, ``compute_index_ranges_int16_weights``). An axis that is not scaled up
    has as many weights as inputs, times twice the filter's radius: they are looked through. One
    that is scaled up has any number of them, and the answer is always the same: the first output
    lies less than half an input from the edge, where the inputs beside the first one add nothing
    to its sum, or take from it, so the first one's weight is 1 or more; and none reaches 2.
    """
    if target > size:
        return _ATEN_UPSCALING_PRECISION
    sampling = _Sampling(size, target, kind, "torchvision")
    windows = [(at, min(at + _EVALUATED, target)) for at in range(0, target, _EVALUATED)]
    edge = int(FILTERS[kind][1]) + 1
    if sampling.scale >= _EDGES_DECIDE and target > 2 * edge:
        windows = [(0, edge), (target - edge, target)]
    largest = 0.0
    for window in windows:
        sums, peaks = _Outputs(sampling, window).sums_and_peaks()
        largest = max(largest, float((peaks / sums).max()))
    precision = 0
    while precision < _ATEN_MAX_PRECISION and int(0.5 + largest * (1 << (precision + 1))) < (
        1 << 15
    ):
        precision += 1
    return precision
