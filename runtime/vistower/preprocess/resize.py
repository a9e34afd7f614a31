"""Antialiased separable resampling, equal to torchvision's and Pillow's; to the bit for uint8.

Each axis is resampled with a filter widened by the scale, as a banded matrix product:

- `resize` is for uint8. The libraries round the weights to integers and the result of each axis to
  uint8. torchvision takes the weights x 2**p, the largest p for which every one fits int16, and
  the horizontal axis first (ATen, ``UpSampleKernel.cpp``); Pillow takes p = 22
  (``Resample.c``). The sums here, taken in float64 where float32 could round, are the very same
  integers.
- `resize_float` is ATen's path for float tensors to within float32's rounding, which leaves the
  order of the axes free: vertically first, rows of interleaved channels need no transposing.

Only a window of the output is computed, from the input it needs, a block of the picture at a time:
a centre crop costs its own size, and memory is bounded whatever the picture's shape. Every product
is small enough for OpenBLAS to compute in the calling thread: its own threads would fight the
model's for the cores, and concurrent callers of them wait for each other.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistower.preprocess.blocks import Blocks
from vistower.preprocess.filters import Filter, Float
from vistower.preprocess.kept import Scratch
from vistower.preprocess.weights import Axis, axis

__all__ = ["Filter", "nearest", "resize", "resize_float"]

Picture = Image.Image | npt.NDArray[Any]
Window = tuple[int, int, int, int]

_BLOCK = 32
"""Outputs per matrix product: few enough that the band is narrow, enough for BLAS."""

_BLOCK_ROWS = 6
_BLOCK_COLUMNS = 16
"""The same for `resize_float`, vertically and horizontally; measured at 1024 x 768."""

_AT_ONCE = 1 << 20
"""Numbers of one array of a block of the picture: 4 or 8 MB."""

_FEWEST = 1 << 12
_MOST = 1 << 15
"""Inputs of a long axis at once, with many rows and with one."""

_LENT_CHANNELS = 4
"""The most channels a block has: Pillow lends RGB with a fourth byte."""

_ONE_THREAD = 1 << 18
"""OpenBLAS takes more than one thread for products of more multiplications than this
(``interface/gemm.c``: ``SMP_THRESHOLD_MIN`` x ``GEMM_MULTITHREAD_THRESHOLD``)."""


def resize(
    picture: Picture,
    size: tuple[int, int],
    window: Window,
    kind: Filter,
    arithmetic: Literal["torchvision", "pillow"] = "torchvision",
    *,
    vertical_first: bool = False,
) -> Float:
    """Resize a picture of levels and return a window of the result.

    Args:
        picture: (H, W, C) uint8, or a PIL image of C channels of 8 bits.
        size: (height, width) of the whole result.
        window: top, left, bottom, right of the part wanted.
        kind: the filter.
        arithmetic: whose integers.
        vertical_first: the order of the axes, whose results are rounded.

    Returns:
        (C, bottom - top, right - left); integers in 0..255 held in floats.
    """
    blocks = Blocks(picture, turned=vertical_first)
    top, left, bottom, right = window
    if vertical_first:
        size, (top, left, bottom, right) = size[::-1], (left, top, right, bottom)
    down = axis(blocks.height, size[0], (top, bottom), kind, arithmetic, _BLOCK)
    across = axis(blocks.width, size[1], (left, right), kind, arithmetic, _BLOCK)
    if across.bands or down.bands:
        levels = _across_then_down(blocks, across, down)
    else:
        levels = blocks.read(top, bottom, left, right).transpose(2, 0, 1)[: blocks.channels]
    return levels.transpose(0, 2, 1) if vertical_first else levels


def resize_float(
    picture: Picture,
    scale: npt.NDArray[np.float32],
    size: tuple[int, int],
    window: Window,
    kind: Filter,
    out: npt.NDArray[np.float32],
) -> None:
    """Resize a picture in float32, times a factor for each channel, and write a window of it.

    Args:
        picture: (H, W, C') of any real dtype; its first C channels are used. Or a PIL image.
        scale: (C,).
        size: (height, width) of the whole result.
        window: top, left, bottom, right of the part wanted.
        kind: the filter.
        out: (C, bottom - top, right - left).
    """
    blocks = Blocks(picture)
    top, left, bottom, right = window
    across = axis(blocks.width, size[1], (left, right), kind, "float", _BLOCK_COLUMNS)
    down = axis(blocks.height, size[0], (top, bottom), kind, "float", _BLOCK_ROWS)
    if down.bands and bottom - top < down.high - down.low:
        _down_then_across(blocks, scale, down, across, out)
    else:
        planes = _across_then_down(blocks, across, down, out)
        np.multiply(planes, scale[:, None, None], out=out)


def nearest(
    picture: Picture, size: tuple[int, int], window: tuple[int, int, int, int]
) -> npt.NDArray[Any]:
    """The window of a picture (H, W, C) resized by taking the nearest pixel: (C, h, w).

    torchvision's ``NEAREST_EXACT``; arguments as for `resize`.
    """
    blocks = Blocks(picture)
    top, left, bottom, right = window
    rows = _nearest_inputs(blocks.height, size[0], top, bottom)
    columns = _nearest_inputs(blocks.width, size[1], left, right)
    return blocks.pick(rows, columns).transpose(2, 0, 1)


def _nearest_inputs(size: int, target: int, start: int, stop: int) -> npt.NDArray[np.intp]:
    """floor((index + 1/2) x scale - 1/2 + 1/2) in float32, the first subtraction fused (ATen,
    ``UpSampleKernel.cpp``, ``HelperInterpNearestExact``, in a build with FMA)."""
    centers = np.arange(start, stop).astype(np.float32) + np.float32(0.5)
    scale = np.float32(size) / np.float32(target)
    fused = (centers.astype(np.float64) * np.float64(scale) - 0.5).astype(np.float32)
    inputs: npt.NDArray[np.intp] = np.floor(fused + np.float32(0.5)).astype(np.intp)
    np.minimum(inputs, size - 1, out=inputs)
    return inputs


def _across_then_down(blocks: Blocks, across: Axis, down: Axis, out: Float | None = None) -> Float:
    """(C, h, w): both axes, a number of rows at a time, each rounded if its weights are.

    The result may lie in ``out``.
    """
    shape = (blocks.channels, down.count, across.count)
    # One input is every output.
    across, down = (
        Axis(one.low, one.high, (), None, one.dtype) if one.high - one.low == 1 else one
        for one in (across, down)
    )
    if not down.bands:
        down = replace(down, dtype=across.dtype)
    channels, width = blocks.channels, across.count
    sums = out
    if sums is None or sums.shape != (channels, down.count, width):
        sums = np.empty((channels, down.count, width), down.dtype)
    begun: set[int] = set()
    step = max(1, _AT_ONCE // (channels * max(width, across.longest(_FEWEST))))
    for top in range(down.low, down.high, step):
        bottom = min(top + step, down.high)
        with Scratch() as scratch:
            if not down.bands:
                rows = sums[:, top - down.low : bottom - down.low]
                _across(blocks, across, top, bottom, rows, scratch)
                continue
            rows = scratch.array((channels, bottom - top, width), down.dtype)
            _across(blocks, across, top, bottom, rows, scratch)
            for number in down.between(top, bottom):
                band = down.bands[number]
                total = sums[:, band.start : band.stop]
                for piece in down.pieces(band, top, bottom, _MOST):
                    part = rows[:, piece.low - top : piece.high - top]
                    _add(piece.matrix.T, part, total, begun=number in begun)
                    begun.add(number)
    return np.broadcast_to(_to_uint8_range(sums, down.precision), shape)


def _across(
    blocks: Blocks, across: Axis, top: int, bottom: int, rows: Float, scratch: Scratch
) -> None:
    """Write the horizontal axis of the rows ``top:bottom``, (C, bottom - top, w)."""
    channels, count = rows.shape[:2]
    if not across.bands:
        block = blocks.read(top, bottom, across.low, across.high)
        np.copyto(rows, block.transpose(2, 0, 1)[:channels], casting="unsafe")
        return
    longest = min(max(_FEWEST, _AT_ONCE // (channels * count)), _MOST)
    width = across.high - across.low
    whole = channels * count * width <= _AT_ONCE
    shape = (channels, count, width if whole else across.longest(longest))
    memory = scratch.array((math.prod(shape),), across.dtype)
    if whole:
        all_planes = _planes(blocks.read(top, bottom, across.low, across.high), memory, shape)
    # Rounding is faster on memory without gaps.
    direct = across.precision is None and across.dtype == rows.dtype
    products = scratch.array((0 if direct else channels * count * _BLOCK,), across.dtype)
    for band in across.bands:
        columns = slice(band.start, band.stop)
        shape = (channels, count, band.stop - band.start)
        total = rows[:, :, columns] if direct else _shaped(products, shape)
        for number, piece in enumerate(across.pieces(band, band.low, band.high, longest)):
            if whole:
                planes = all_planes[:, :, piece.low - across.low : piece.high - across.low]
            else:
                block = blocks.read(top, bottom, piece.low, piece.high)
                planes = _planes(block, memory, (channels, *block.shape[:2]))
            _add(planes, piece.matrix, total, begun=number > 0)
        if not direct:
            rows[:, :, columns] = _to_uint8_range(total, across.precision)


def _planes(block: npt.NDArray[Any], memory: Float, shape: tuple[int, ...]) -> Float:
    """(rows, W, C') → (C, rows, W) floats, in the memory."""
    planes = _shaped(memory, shape)
    np.copyto(planes, block.transpose(2, 0, 1)[: shape[0]], casting="unsafe")
    return planes


def _down_then_across(
    blocks: Blocks,
    scale: npt.NDArray[np.float32],
    down: Axis,
    across: Axis,
    out: npt.NDArray[np.float32],
) -> None:
    """Both axes in float32, times a factor for each channel, a strip of columns at a time."""
    channels, height = out.shape[:2]
    tallest = down.longest(_FEWEST)
    step = max(1, _AT_ONCE // max(channels * height, _LENT_CHANNELS * tallest))
    begun: set[int] = set()
    for left in range(across.low, across.high, step):
        right = min(left + step, across.high)
        with Scratch() as scratch:
            planes = scratch.array((channels, height, right - left))
            _down_interleaved(blocks, scale, down, left, right, planes, scratch)
            if not across.bands:
                out[:, :, left - across.low : right - across.low] = planes
            for number in across.between(left, right):
                band = across.bands[number]
                total = out[:, :, band.start : band.stop]
                for piece in across.pieces(band, left, right, _MOST):
                    part = planes[:, :, piece.low - left : piece.high - left]
                    _add(part, piece.matrix, total, begun=number in begun)
                    begun.add(number)


def _down_interleaved(
    blocks: Blocks,
    scale: npt.NDArray[np.float32],
    down: Axis,
    left: int,
    right: int,
    planes: npt.NDArray[np.float32],
    scratch: Scratch,
) -> None:
    """The vertical axis of some columns, whose pixels lie side by side in memory, then split."""
    longest = min(max(1, _AT_ONCE // ((right - left) * _LENT_CHANNELS)), _MOST)
    tallest = down.longest(longest)
    depth = 0
    for band in down.bands:
        height = band.stop - band.start
        for number, piece in enumerate(down.pieces(band, band.low, band.high, longest)):
            block = blocks.read(piece.low, piece.high, left, right)
            if block.shape[2] != depth:
                depth = block.shape[2]
                lines, pixels = _lines(tallest, right - left, depth, scratch)
                sums, sums_of_pixels = _lines(_BLOCK_ROWS, right - left, depth, scratch)
            np.copyto(pixels[: len(block)], block, casting="unsafe")
            _add(piece.matrix.T, lines[: len(block)], sums[:height], begun=number > 0)
        np.multiply(
            sums_of_pixels[:height].transpose(2, 0, 1)[: len(scale)],
            scale[:, None, None],
            out=planes[:, band.start : band.stop],
        )


def _lines(
    rows: int, width: int, channels: int, scratch: Scratch
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Memory as (rows, width * channels), and the same as (rows, width, channels)."""
    # Lines a power of two apart would share the same few places of the cache.
    lines = scratch.array((rows, width * channels + 16))[:, : width * channels]
    shape, item = (rows, width, channels), lines.itemsize
    strides = (lines.strides[0], channels * item, item)
    return lines, np.lib.stride_tricks.as_strided(lines, shape, strides)


def _shaped(memory: Float, shape: tuple[int, ...]) -> Float:
    return memory[: math.prod(shape)].reshape(shape)


def _to_uint8_range(sums: Float, precision: int | None) -> Float:
    """Integer sums → floor(sum / 2**precision + 1/2), clamped to 0..255; floats stay."""
    if precision is None:
        return sums
    sums += float(1 << (precision - 1))
    sums *= 2.0**-precision
    np.floor(sums, out=sums)
    return np.clip(sums, 0, 255, out=sums)


def _add(left: Float, right: Float, total: Float, *, begun: bool) -> None:
    """Add ``left @ right`` to the total, or begin it so."""
    if not begun:
        _times(left, right, total)
        return
    product = np.empty(total.shape, total.dtype)
    _times(left, right, product)
    total += product


def _times(left: Float, right: Float, out: Float) -> None:
    """``out = left @ right`` for (..., M, K) and (..., K, N), in the calling thread alone."""
    rows, inner = left.shape[-2:]
    columns = right.shape[-1]
    if rows == 1 or columns == 1:
        # OpenBLAS computes a product with a vector in several threads much earlier.
        np.einsum("...mk,...kn->...mn", left, right, out=out)
    elif rows * inner * columns <= _ONE_THREAD:
        np.matmul(left, right, out=out)
    elif rows >= columns:
        step = max(1, _ONE_THREAD // (inner * columns))
        for at in range(0, rows, step):
            part = slice(at, at + step)
            _times(left[..., part, :], right, out[..., part, :])
    else:
        step = max(1, _ONE_THREAD // (inner * rows))
        for at in range(0, columns, step):
            part = slice(at, at + step)
            _times(left, right[..., part], out[..., part])
