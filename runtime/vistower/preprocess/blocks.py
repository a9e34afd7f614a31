"""The pixels of a picture, read in blocks: a PIL image is never copied whole into an array."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistower.preprocess.images import cropped, lent_pixels, pixel_view

_WHOLE = 1 << 24
"""Bytes of a picture that is copied whole, where Pillow does not lend it: 16 MB."""

_SPAN = 1 << 18
"""Pixels of a line read at once to pick some of them."""


class Blocks:
    """A picture (height, width, channels): an array, or a PIL image of 1 or 3 channels.

    ``turned``: with its axes exchanged.
    """

    def __init__(self, picture: Image.Image | npt.NDArray[Any], *, turned: bool = False) -> None:
        """Take the picture; it must stay as it is."""
        self._turned = turned
        self._pixels = picture
        if isinstance(picture, Image.Image):
            width, height = picture.size
            self.channels = len(picture.getbands())
            lent = lent_pixels(picture)
            if lent is not None:
                self._pixels = lent
            elif width * height * self.channels <= _WHOLE:
                self._pixels = pixel_view(picture)
        else:
            height, width, self.channels = picture.shape
        self.height, self.width = (width, height) if turned else (height, width)

    def read(self, top: int, bottom: int, left: int, right: int) -> npt.NDArray[Any]:
        """(bottom - top, right - left, C'), of which the first ``channels`` have a meaning."""
        if self._turned:
            return self._read(left, right, top, bottom).transpose(1, 0, 2)
        return self._read(top, bottom, left, right)

    def _read(self, top: int, bottom: int, left: int, right: int) -> npt.NDArray[Any]:
        if isinstance(self._pixels, Image.Image):
            return pixel_view(cropped(self._pixels, (left, top, right, bottom)))
        return self._pixels[top:bottom, left:right]

    def pick(self, rows: npt.NDArray[np.intp], columns: npt.NDArray[np.intp]) -> npt.NDArray[Any]:
        """(len(rows), len(columns), C'): the pixels at the crossings; both ascend."""
        if not isinstance(self._pixels, Image.Image):
            return self._pixels[rows[:, None], columns]
        spans = (columns - columns[0]) // _SPAN
        cuts = [0, *(np.flatnonzero(np.diff(spans)) + 1).tolist(), len(columns)]
        lines: list[npt.NDArray[Any]] = []
        for row, before in zip(rows.tolist(), [-1, *rows.tolist()], strict=False):
            if row == before:
                lines.append(lines[-1])
                continue
            parts = []
            for start, stop in itertools.pairwise(cuts):
                here = columns[start:stop]
                block = self.read(row, row + 1, int(here[0]), int(here[-1]) + 1)
                parts.append(block[0, here - here[0]])
            lines.append(np.concatenate(parts))
        return np.stack(lines)
