"""The arithmetic of DINOv3's processor: rescaled to float first, then resized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistower.preprocess.frame import Frame
from vistower.preprocess.resize import Filter, nearest, resize_float
from vistower.preprocess.scaling import Array, Scaling


@dataclass(frozen=True)
class RescaledFloats:
    """Rescales, resizes and normalizes in float32, the first and the last folded into one factor.

    One channel serves all three, as broadcasting does in torch.
    """

    resample: Filter
    scaling: Scaling

    def write(self, picture: Image.Image | npt.NDArray[Any], frame: Frame, out: Array) -> None:
        """Write the pixel values (3, H, W) of a picture's frame."""
        one_channel = isinstance(picture, Image.Image) and len(picture.getbands()) == 1
        size, window = frame.size, frame.window
        scale, offset = (
            np.asarray(values, np.float32)[:, None, None]
            for values in self.scaling.scale_and_offset
        )
        if self.resample == "nearest":
            levels = nearest(picture, size, window)[: 1 if one_channel else 3]
            np.multiply(levels, scale, out=out, dtype=np.float32, casting="unsafe")
        elif one_channel:
            resize_float(picture, np.ones(1, np.float32), size, window, self.resample, out[:1])
            np.multiply(out[:1], scale, out=out)
        else:
            resize_float(picture, scale[:, 0, 0], size, window, self.resample, out)
        if self.scaling.mean is not None:
            out += offset
