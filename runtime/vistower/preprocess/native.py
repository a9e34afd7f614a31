"""torchvision's uint8 resize through the ``cykooz_resizer`` wheel, where that is installed.

The library (fast_image_resize, after Pillow-SIMD as ATen's kernel is) computes an axis with the
very integers of `vistower.preprocess.resize`: weights x 2**p rounded to int16, sums in int32, a
shift that rounds, a clamp to 0..255. Only its order differs, so each axis is a call of its own,
horizontally first. It reads Pillow's images in place, releases the GIL, and needs AVX2, SSE4.1 or
NEON to be fast. tests/test_preprocess.py proves the equality; without it NumPy does the same.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistower.foreign import foreign_code
from vistower.forks import in_every_child, never_free, uncut
from vistower.preprocess.images import cropped, pixel_view
from vistower.preprocess.kept import Pool
from vistower.preprocess.resize import Filter

if TYPE_CHECKING:
    from types import ModuleType

_PILLOW_MAJORS = range(11, 14)
"""The library knows the memory layout of Pillow's images in these versions."""

_MAX_SCALE = 64
"""Up to here every weight is large enough that ATen's limit on the precision does not act."""

_MAX_WASTE = 4
"""Pixels computed for one that is kept; beyond, computing the window alone costs less."""

_MAX_BETWEEN = 1 << 20
"""Pixels of the picture between the two axes where it is larger than the picture itself."""

_results: Pool[Image.Image] = Pool(1 << 25)
"""Fresh memory costs page faults: about as much as the resize. 32 MB are kept."""


@lru_cache(maxsize=1)
@uncut
def library() -> ModuleType | None:
    """The library, or None where it is missing or does not know this Pillow."""
    try:
        if int(version("pillow").split(".")[0]) not in _PILLOW_MAJORS:
            return None
        return import_module("cykooz_resizer")
    except (ImportError, PackageNotFoundError, ValueError):
        return None


def can_resize(
    shape: tuple[int, ...], size: tuple[int, int], window: tuple[int, int, int, int]
) -> bool:
    """Whether `resize` equals NumPy's for an RGB image, and is worth calling.

    ``shape`` is its (height, width), ``size`` that of the whole result, ``window`` top, left,
    bottom, right of the part wanted.
    """
    if library() is None:
        return False
    top, left, bottom, right = window
    return (
        shape[0] <= _MAX_SCALE * size[0]
        and shape[1] <= _MAX_SCALE * size[1]
        and size[0] <= _MAX_WASTE * (bottom - top)
        and size[1] <= _MAX_WASTE * (right - left)
        and size[1] * shape[0] <= max(_MAX_BETWEEN, shape[0] * shape[1])
    )


def resize(
    image: Image.Image,
    size: tuple[int, int],
    window: tuple[int, int, int, int],
    kind: Filter,
) -> npt.NDArray[np.uint8]:
    """The window of a resized RGB image, (h, w, 3 or 4), of which three channels have a meaning."""
    tools = _tools()
    top, left, bottom, right = window
    taken: list[Image.Image] = []

    def pass_(image: Image.Image, size: tuple[int, int]) -> Image.Image:
        taken.append(_results.take(size) or Image.new("RGB", size))
        return tools.pass_(image, taken[-1], kind)

    if image.width != size[1]:
        image = pass_(image, (size[1], image.height))
    if (left, right) != (0, image.width):
        image = cropped(image, (left, 0, right, image.height))
    if image.height != size[0]:
        image = pass_(image, (image.width, size[0]))
    if (top, bottom) != (0, image.height):
        image = cropped(image, (0, top, image.width, bottom))
    levels = pixel_view(image)
    if taken and image is taken[-1]:
        levels = levels.copy()
    for result in taken:
        _results.give(result.size, result, 4 * result.width * result.height)
    return levels


class _Tools:
    """A resizer has a lock and the library a pool of threads: each of our threads has its own."""

    def __init__(self) -> None:
        module: Any = library()
        filters = {
            "bilinear": module.FilterType.bilinear,
            "bicubic": module.FilterType.catmull_rom,
            "lanczos": module.FilterType.lanczos3,
        }
        # A pool of one: the picture is computed by one thread, whatever RAYON_NUM_THREADS says.
        pool = module.ResizerThreadPool(1)
        self._options = {
            kind: module.ResizeOptions(
                resize_alg=module.ResizeAlg.convolution(filter_), use_alpha=False, thread_pool=pool
            )
            for kind, filter_ in filters.items()
        }
        self._resizer = module.Resizer()

    def pass_(self, image: Image.Image, result: Image.Image, kind: Filter) -> Image.Image:
        with foreign_code:
            self._resizer.resize_pil(image, result, self._options[kind])
        return result


class _Lease:
    """The tools of one thread, free for another one when it has ended."""

    def __init__(self, idle: list[_Tools]) -> None:
        try:
            self.tools = idle.pop()
        except IndexError:
            self.tools = _Tools()
            _all.append(self.tools)
        self._idle = idle

    def __del__(self) -> None:
        self._idle.append(self.tools)


_all: list[_Tools] = []
"""What a forked child must neither use nor free: it has not the threads, and a lock of them may
have been held. Python drops what is local to the other threads before the child runs."""

_idle: list[_Tools] = []
_of_thread = threading.local()


def _tools() -> _Tools:
    try:
        lease: _Lease = _of_thread.lease
    except AttributeError:
        lease = _of_thread.lease = _Lease(_idle)
    return lease.tools


def _begin_child() -> None:
    global _all, _idle, _of_thread
    never_free(_all)
    _all, _idle, _of_thread = [], [], threading.local()


in_every_child(_begin_child)
