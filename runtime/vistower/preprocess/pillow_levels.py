"""The arithmetic of the PIL backend: uint8 levels, resized by Pillow itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistower.lazy import cached_property
from vistower.preprocess.frame import Frame
from vistower.preprocess.images import pixel_view
from vistower.preprocess.resize import Filter
from vistower.preprocess.scaling import Array, Scaling


@dataclass(frozen=True)
class PillowLevels:
    """Resizes with Pillow, then multiplies in float64 and normalizes in float32."""

    resample: Filter
    scaling: Scaling

    def levels(self, picture: Image.Image | npt.NDArray[np.uint8], frame: Frame) -> Any:
        """The frame of a picture, (1, 3 or 4, H, W), levels 0..255."""
        if not isinstance(picture, Image.Image):
            picture = Image.fromarray(picture)
        height, width = frame.size
        top, left, bottom, right = frame.window
        # Pillow itself: which axis it resamples first has changed between its releases.
        resized = picture.resize((width, height), Image.Resampling[self.resample.upper()])
        return pixel_view(resized.crop((left, top, right, bottom))).transpose(2, 0, 1)

    def write(self, planes: npt.NDArray[Any], out: Array) -> None:
        """Rescale and normalize levels (3, H, W)."""
        for channel in range(3):
            np.take(self._table[channel], planes[channel].astype(np.intp), out=out[channel])

    @cached_property
    def _table(self) -> Array:
        """(3, 256): the value of each level of each channel."""
        norm = self.scaling
        scaled = (np.arange(256, dtype=np.float64) * norm.factor).astype(np.float32)
        if norm.mean is None or norm.std is None:
            return np.broadcast_to(scaled, (3, 256)).copy()
        mean = np.asarray(norm.mean, np.float32)[:, None]
        std = np.asarray(norm.std, np.float32)[:, None]
        table: Array = (scaled - mean) / std
        return table
