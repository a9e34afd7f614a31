"""The filters of a resize, as ATen and Pillow compute them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Filter = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
Float: TypeAlias = npt.NDArray[np.floating[Any]]


def _box(x: Float) -> Float:
    value: Float = ((x > -0.5) & (x <= 0.5)).astype(x.dtype)
    return value


def _hamming(x: Float) -> Float:
    """The sinc function in a Hamming window, whose constants Pillow writes in float32."""
    window = np.float64(np.float32(0.54)) + np.float64(np.float32(0.46)) * np.cos(x * np.pi)
    value: Float = np.where(np.abs(x) < 1, np.sinc(x) * window, 0)
    return np.where(x == 0, 1, value)


def _bilinear(x: Float) -> Float:
    np.abs(x, out=x)
    np.subtract(1, x, out=x)
    return np.maximum(x, 0, out=x)


def _bicubic(x: Float) -> Float:
    """Keys' cubic with a = -0.5, as ATen's antialiasing and Pillow use it."""
    np.abs(x, out=x)
    inner = 1.5 * x
    inner -= 2.5
    inner *= x
    inner *= x
    inner += 1
    outer = x - 5
    outer *= x
    outer += 8
    outer *= x
    outer -= 4
    outer *= -0.5
    np.copyto(outer, inner, where=x < 1)
    np.copyto(outer, 0, where=x >= 2)
    return outer


def _lanczos(x: Float) -> Float:
    """The sinc function, windowed by its own central lobe stretched to three."""
    value: Float = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return value


FILTERS: Mapping[Filter, tuple[Callable[[Float], Float], float]] = {
    "box": (_box, 0.5),
    "hamming": (_hamming, 1.0),
    "lanczos": (_lanczos, 3.0),
    "bilinear": (_bilinear, 1.0),
    "bicubic": (_bicubic, 2.0),
}
"""Filter, which may overwrite its argument, and its radius at scale 1. torchvision has no
antialiased box and hamming."""
