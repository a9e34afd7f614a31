"""The arithmetic of the torchvision backend: uint8 levels, resized by torchvision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistower.lazy import cached_property
from vistower.preprocess import native
from vistower.preprocess.frame import Frame
from vistower.preprocess.resize import Filter, nearest, resize
from vistower.preprocess.scaling import Array, Scaling

_COPIED = 1 << 27
"""Bytes of an array that is copied into a PIL image for the library: 128 MB."""


@dataclass(frozen=True)
class TorchvisionLevels:
    """Resizes in integers, then normalizes with mean and std times 255, in float32."""

    resample: Filter
    scaling: Scaling

    def levels(self, picture: Image.Image | npt.NDArray[np.uint8], frame: Frame) -> Any:
        """The frame of a picture, (1, 3 or 4, H, W), levels 0..255 of any dtype."""
        size, window = frame.size, frame.window
        if self.resample == "nearest":
            return nearest(picture, size, window)
        if isinstance(picture, Image.Image):
            shape, fits = (picture.height, picture.width), picture.mode == "RGB"
        else:
            shape, fits = (picture.shape[0], picture.shape[1]), picture.nbytes <= _COPIED
        if fits and native.can_resize(shape, size, window):
            image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
            return native.resize(image, size, window, self.resample).transpose(2, 0, 1)
        return resize(picture, size, window, self.resample)

    def write(self, planes: npt.NDArray[Any], out: Array) -> None:
        """Rescale and normalize levels (3, H, W)."""
        if self.scaling.mean is None:
            factor = np.float32(self.scaling.factor)
            np.multiply(planes, factor, out=out, dtype=np.float32, casting="unsafe")
            return
        mean, std = self._scaled_mean_and_std
        np.subtract(planes, mean[:, None, None], out=out, dtype=np.float32, casting="unsafe")
        np.divide(out, std[:, None, None], out=out)

    @cached_property
    def _scaled_mean_and_std(self) -> tuple[Array, Array]:
        """torchvision subtracts mean/factor from levels and divides by std/factor, in float32."""
        inverse = np.float32(1.0 / self.scaling.factor)
        mean: Array = np.asarray(self.scaling.mean, np.float32) * inverse
        std: Array = np.asarray(self.scaling.std, np.float32) * inverse
        return mean, std
