"""The arithmetic of DINOv3's processor: rescaled to float first, then resized."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from vistower.preprocess.convert import Picture
from vistower.preprocess.frame import Frame
from vistower.preprocess.resize import Filter, nearest, resize_float
from vistower.preprocess.scaling import Array, Scaling


@dataclass(frozen=True)
class DINOv3Arithmetic:
    """Rescales, resizes and normalizes in float32, the first and the last folded into one factor.

    One channel serves all three, as broadcasting does in torch.
    """

    resample: Filter
    scaling: Scaling

    def write(self, picture: Picture, frame: Frame, out: Array) -> None:
        """Write the pixel values (3, H, W) of a picture's frame."""
        if isinstance(picture, Image.Image):
            one_channel = len(picture.getbands()) == 1
        else:
            one_channel = picture.shape[2] < 3
        size, window = frame.size, frame.window
        scale, offset = (
            np.asarray(values, np.float32)[:, None, None]
            for values in self.scaling.scale_and_offset
        )
        inside = out
        if any(frame.padding):
            out[:] = 0
            top, left, bottom, right = frame.padding
            inside = out[:, top : out.shape[1] - bottom, left : out.shape[2] - right]
        if self.resample == "nearest":
            levels = nearest(picture, size, window)[: 1 if one_channel else 3]
            np.multiply(levels, scale, out=inside, dtype=np.float32, casting="unsafe")
        elif one_channel:
            resize_float(picture, np.ones(1, np.float32), size, window, self.resample, inside[:1])
            np.multiply(inside[:1], scale, out=inside)
        else:
            resize_float(picture, scale[:, 0, 0], size, window, self.resample, inside)
        if self.scaling.mean is not None:
            out += offset
