"""The arithmetic of the PIL backend: uint8 levels, resized by Pillow itself.

Pillow resizes a picture whole. Where that would cost far more than the picture and the window
kept of it (an extreme aspect ratio), the same integers are computed for the window alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL import __version__ as pillow_version

from vistower.errors import ImageFormatError
from vistower.preprocess.blocks import Blocks
from vistower.preprocess.convert import Picture
from vistower.preprocess.frame import Frame, Size, Window
from vistower.preprocess.images import cropped, pixel_view
from vistower.preprocess.resize import Filter, resize
from vistower.preprocess.scaling import Array, Scaling
from vistower.preprocess.torchvision_arithmetic import padded

_SMALL = 1 << 22
"""Pixels that Pillow may always compute: 16 MB."""

_COEFFICIENTS = 12
"""Pixels that the weights of one input take as much memory as, at most: 6 of 8 bytes."""

_PLAIN_MODES = frozenset({"RGB", "L", "YCbCr", "HSV", "P", "1"})
"""Modes whose levels an array of the image holds as Pillow computes with them: not LAB."""

_RELEASE = tuple(int(part) for part in pillow_version.split(".")[:2])


@dataclass(frozen=True)
class PillowArithmetic:
    """Resizes with Pillow, then multiplies in float64 and normalizes in float32.

    Pillow resizes only levels: arrays of other dtypes are made levels before, and those of 0..1
    divided by 255 after it (``resize`` of ``transformers/image_transforms.py``).
    """

    resample: Filter
    scaling: Scaling

    def write(self, picture: Picture, frame: Frame, out: Array) -> None:
        """Write the pixel values (3, H, W) of a picture's frame."""
        if isinstance(picture, Image.Image) or picture.dtype == np.uint8:
            planes = self.levels(picture, frame)
        elif not frame.resizes:
            top, left, bottom, right = frame.window
            planes = picture[top:bottom, left:right].transpose(2, 0, 1)
        else:
            levels, scaled = _as_levels(picture)
            planes = self.levels(levels, frame)
            if scaled:
                planes = (planes.astype(np.float64) * (1 / 255)).astype(np.float32)
        self.scaling.write_as_pillow(padded(planes, frame), out)

    def levels(self, picture: Picture, frame: Frame) -> npt.NDArray[np.uint8]:
        """The window of a uint8 picture, (3, h, w), levels 0..255."""
        if isinstance(picture, Image.Image):
            shape, mode = (picture.height, picture.width), picture.mode
        else:
            shape, mode = (picture.shape[0], picture.shape[1]), "RGB"
        vertical_first = _is_vertical_first(shape, frame.size)
        if frame.resizes and not _is_cheap(shape, frame.size, vertical_first):
            return self._window(picture, mode, frame, vertical_first=vertical_first)
        if not isinstance(picture, Image.Image):
            picture = Image.fromarray(picture)
        top, left, bottom, right = frame.window
        if frame.resizes:
            height, width = frame.size
            picture = picture.resize((width, height), Image.Resampling[self.resample.upper()])
        return pixel_view(cropped(picture, (left, top, right, bottom))).transpose(2, 0, 1)[:3]

    def _window(
        self, picture: Picture, mode: str, frame: Frame, *, vertical_first: bool
    ) -> npt.NDArray[np.uint8]:
        """The window alone, in Pillow's arithmetic."""
        if mode not in _PLAIN_MODES:
            raise ImageFormatError(
                f"A {mode} picture would be resized to {frame.size[1]} x {frame.size[0]}. Pass "
                f"image.convert('RGB')."
            )
        resample = "nearest" if mode in ("1", "P") else self.resample
        if resample == "nearest":
            return _nearest(picture, frame.size, frame.window)[:3].astype(np.uint8)
        levels = resize(
            picture, frame.size, frame.window, resample, "pillow", vertical_first=vertical_first
        )
        return levels[:3].astype(np.uint8)


def _as_levels(array: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint8], bool]:
    """An array as uint8 levels, and whether it was taken for values in 0..1.

    Raises:
        ImageFormatError: transformers refuses its range too.
    """
    low, high = array.min(), array.max()
    whole = np.allclose(array, array.astype(int))
    if low < 0 or high > (255 if whole else 1):
        raise ImageFormatError(
            f"The PIL backend makes uint8 levels of an array of {array.dtype} first, and takes "
            f"whole numbers in 0..255 or fractions in 0..1; this one has {low} to {high}. Pass "
            f"uint8."
        )
    if whole:
        return array.astype(np.uint8), False
    return (array.astype(np.float64) * 255).astype(np.float32).astype(np.uint8), True


def _is_vertical_first(shape: Size, size: Size) -> bool:
    """Which axis Pillow resamples first, and rounds, has changed between its releases.

    13: ``Resample.c``, ``ImagingResampleInner``. 12.2: ``Image.resize``. Before: horizontally.
    """
    if _RELEASE >= (13, 0):
        return shape[0] - size[0] > max(0, 2 * (shape[1] - size[1]))
    return _RELEASE >= (12, 2) and shape[0] > 100 * shape[1] and size[0] < shape[0]


def _is_cheap(shape: Size, size: Size, vertical_first: bool) -> bool:
    """Whether Pillow's own resize takes memory in proportion to the picture."""
    between = size[0] * shape[1] if vertical_first else shape[0] * size[1]
    weights = _COEFFICIENTS * (max(shape[0], size[0]) + max(shape[1], size[1]))
    return size[0] * size[1] + between + weights <= max(_SMALL, 2 * shape[0] * shape[1])


def _nearest(picture: Picture, size: Size, window: Window) -> npt.NDArray[Any]:
    """The window of a picture resized by Pillow's nearest pixel, (C, h, w)."""
    blocks = Blocks(picture)
    top, left, bottom, right = window
    rows = _nearest_inputs(blocks.height, size[0], top, bottom)
    columns = _nearest_inputs(blocks.width, size[1], left, right)
    levels = blocks.pick(
        np.minimum(rows, blocks.height - 1), np.minimum(columns, blocks.width - 1)
    ).copy()
    # What rounding has moved past the end stays black.
    levels[rows >= blocks.height] = 0
    levels[:, columns >= blocks.width] = 0
    return levels.transpose(2, 0, 1)


def _nearest_inputs(size: int, target: int, start: int, stop: int) -> npt.NDArray[np.intp]:
    """The input of the outputs ``start:stop``: Pillow adds the scale up from one output to the next
    (``Geometry.c``, ``ImagingScaleAffine``), and so its roundings."""
    scale = float(np.float32(size)) / target
    position = _added_up(scale, start)
    steps = np.full(stop - start, scale)
    steps[0] = position
    inputs: npt.NDArray[np.intp] = np.add.accumulate(steps).astype(np.intp)
    return inputs


def _added_up(scale: float, count: int) -> float:
    """``scale / 2`` with ``scale`` added ``count`` times, each sum rounded to float64.

    Between two powers of two every addition rounds alike, so they are taken together: a sum
    rounded there from within has an even last bit if the scale lies half between two floats.
    """
    position = scale * 0.5
    while count > 0:
        before, position, count = position, position + scale, count - 1
        exponent = math.frexp(position)[1]
        if math.frexp(before)[1] != exponent:
            continue
        step = (position + scale) - position
        steps = min(count, int((math.ldexp(1.0, exponent) - position) / step) - 1)
        if steps > 0:
            position, count = position + steps * step, count - steps
    return position
