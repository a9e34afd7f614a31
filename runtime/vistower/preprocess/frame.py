"""Where the pixels of a prepared picture lie in the resized one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

Size: TypeAlias = tuple[int, int]
"""(height, width) in pixels."""

Window: TypeAlias = tuple[int, int, int, int]
"""Top, left, bottom, right."""


@dataclass(frozen=True)
class Frame:
    """A resized picture's size, and the window of it that is kept.

    ``padding`` are the rows and columns of zeros around the window (top, left, bottom, right),
    where a centre crop is larger than the picture. ``resizes`` is False where the picture is left
    as it is, which is not the same as resizing it to its own size.
    """

    size: Size
    window: Window
    padding: Window = (0, 0, 0, 0)
    resizes: bool = True


@dataclass(frozen=True)
class Edges:
    """A resize that keeps the aspect ratio: to a shortest edge, up to a longest one, in pixels."""

    shortest: int
    longest: int | None = None

    def size(self, height: int, width: int) -> Size:
        """The size that a picture gets; the long side is cut to an integer, as there.

        ``get_size_with_aspect_ratio`` and ``get_resize_output_image_size`` of
        ``transformers/image_transforms.py``.
        """
        short: float = self.shortest
        if self.longest is not None:
            low, high = float(min(height, width)), float(max(height, width))
            if high / low * self.shortest > self.longest:
                short = self.longest * low / high
        edge = round(short)
        # An edge that fits already stops the other one from being computed from the unrounded.
        if self.longest is not None and min(height, width) == edge:
            return height, width
        if height <= width:
            return edge, int(short * width / height)
        return int(short * height / width), edge


@dataclass(frozen=True)
class CenterCrop:
    """A centre crop to ``size``, padded with zeros where the picture is smaller.

    ``to_even``: half a pixel too much is rounded to the even position (torchvision's own
    ``center_crop``), not down. ``pads_ahead``: the odd row of padding comes first (the PIL
    backend), not last.
    """

    size: Size
    to_even: bool = False
    pads_ahead: bool = False

    def frame(self, size: Size, *, resizes: bool) -> Frame:
        """The frame of a picture resized to ``size``."""
        (top, bottom, above, below) = self._axis(size[0], self.size[0])
        (left, right, before, after) = self._axis(size[1], self.size[1])
        return Frame(size, (top, left, bottom, right), (above, before, below, after), resizes)

    def _axis(self, have: int, want: int) -> Window:
        """Start and stop of what is kept, and the padding on both sides."""
        missing = want - have
        if missing > 0:
            first = math.ceil(missing / 2) if self.pads_ahead else missing // 2
            return 0, have, first, missing - first
        start = round(-missing / 2) if self.to_even else -missing // 2
        return start, start + want, 0, 0
