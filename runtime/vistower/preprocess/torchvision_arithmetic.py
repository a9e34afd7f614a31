"""The arithmetic of the torchvision backend: uint8 levels, resized by torchvision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistower.preprocess import native
from vistower.preprocess.convert import Picture
from vistower.preprocess.frame import Frame
from vistower.preprocess.resize import Filter, nearest, resize, resize_float
from vistower.preprocess.scaling import Array, Scaling

_COPIED = 1 << 27
"""Bytes of an array that is copied into a PIL image for the library: 128 MB."""


@dataclass(frozen=True)
class TorchvisionArithmetic:
    """Resizes in integers, then normalizes with mean and std times 255, in float32.

    Pictures of floats are resized in float32 and then normalized in the same way.
    """

    resample: Filter
    scaling: Scaling

    def write(self, picture: Picture, frame: Frame, out: Array) -> None:
        """Write the pixel values (3, H, W) of a picture's frame."""
        if isinstance(picture, np.ndarray) and picture.dtype != np.uint8:
            planes = self._floats(picture, frame)
        else:
            planes = self.levels(picture, frame)
        self.scaling.write_as_torchvision(padded(planes, frame), out)

    def levels(self, picture: Picture, frame: Frame) -> npt.NDArray[Any]:
        """The window of a uint8 picture, (3 or 1, h, w), levels 0..255 of any real dtype."""
        size, window = frame.size, frame.window
        if self.resample == "nearest":
            return nearest(picture, size, window)[:3]
        if isinstance(picture, Image.Image):
            shape, fits = (picture.height, picture.width), picture.mode == "RGB"
        else:
            shape = picture.shape[0], picture.shape[1]
            fits = picture.shape[2] == 3 and picture.nbytes <= _COPIED
        if fits and native.can_resize(shape, size, window):
            image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
            return native.resize(image, size, window, self.resample).transpose(2, 0, 1)[:3]
        return resize(picture, size, window, self.resample)[:3]

    def _floats(self, picture: npt.NDArray[Any], frame: Frame) -> npt.NDArray[Any]:
        top, left, bottom, right = frame.window
        if self.resample == "nearest":
            return nearest(picture, frame.size, frame.window)
        planes = np.empty((picture.shape[2], bottom - top, right - left), np.float32)
        ones = np.ones(len(planes), np.float32)
        resize_float(picture, ones, frame.size, frame.window, self.resample, planes)
        return planes


def padded(planes: npt.NDArray[Any], frame: Frame) -> npt.NDArray[Any]:
    """Planes (C, h, w) with the frame's zeros around them."""
    if not any(frame.padding):
        return planes
    top, left, bottom, right = frame.padding
    return np.pad(planes, ((0, 0), (top, bottom), (left, right)))
