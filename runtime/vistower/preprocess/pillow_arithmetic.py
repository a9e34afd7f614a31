"""The arithmetic of the PIL backend: uint8 levels, resized by Pillow itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistower.errors import ImageFormatError
from vistower.preprocess.convert import Picture
from vistower.preprocess.frame import Frame
from vistower.preprocess.images import pixel_view
from vistower.preprocess.resize import Filter
from vistower.preprocess.scaling import Array, Scaling
from vistower.preprocess.torchvision_arithmetic import padded


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
        if not isinstance(picture, Image.Image):
            picture = Image.fromarray(picture)
        top, left, bottom, right = frame.window
        if frame.resizes:
            height, width = frame.size
            # Pillow itself: which axis it resamples first has changed between its releases.
            picture = picture.resize((width, height), Image.Resampling[self.resample.upper()])
        return pixel_view(picture.crop((left, top, right, bottom))).transpose(2, 0, 1)[:3]


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
