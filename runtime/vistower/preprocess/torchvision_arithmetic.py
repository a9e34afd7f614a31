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
from vistower.preprocess.images import pixel_view
from vistower.preprocess.resize import Filter, nearest, resize, resize_float
from vistower.preprocess.scaling import Array, Scaling


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
            return nearest(pixel_view(picture), size, window)[:3]
        if isinstance(picture, np.ndarray) and picture.shape[2] == 3:
            if not native.can_resize(picture.shape, size, window):
                return resize(picture, size, window, self.resample)
            picture = Image.fromarray(picture)
        if isinstance(picture, Image.Image) and native.can_resize(
            (picture.height, picture.width), size, window
        ):
            resized = native.resize(picture, size, window, self.resample)
            return pixel_view(resized).transpose(2, 0, 1)[:3]
        return resize(pixel_view(picture)[:, :, :3], size, window, self.resample)

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
