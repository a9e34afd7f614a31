"""Where the pixels of a prepared picture lie in the resized one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

Size: TypeAlias = tuple[int, int]
"""(height, width) in pixels."""

Window: TypeAlias = tuple[int, int, int, int]
"""Top, left, bottom, right."""


@dataclass(frozen=True)
class Frame:
    """A resized picture's size, and the window of it that is kept."""

    size: Size
    window: Window


def shortest_edge(height: int, width: int, edge: int) -> Size:
    """The size whose shorter side is ``edge``; the longer one is cut to an integer, as there."""
    if height <= width:
        return edge, int(edge * width / height)
    return int(edge * height / width), edge


def center(size: Size, crop: Size) -> Frame:
    """The frame that keeps the middle of a resized picture."""
    top, left = (size[0] - crop[0]) // 2, (size[1] - crop[1]) // 2
    return Frame(size, (top, left, top + crop[0], left + crop[1]))
