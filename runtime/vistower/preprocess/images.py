"""Pictures in: what is one, PIL images that threads share, and the memory of pixels."""

from __future__ import annotations

import ctypes
import math
import os
import threading
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistower.errors import ImageDecodeError
from vistower.forks import in_every_child
from vistower.preprocess.arrays import Tensor
from vistower.preprocess.cut import require_whole
from vistower.preprocess.encoded import Encoded, tolerating_warnings

ImageInput: TypeAlias = "Image.Image | npt.NDArray[Any] | Tensor | Encoded"
"""A PIL image, an array or torch tensor (H x W x 3 or 3 x H x W), or an encoded picture: a path, a
data URI, bytes, or a binary file object (read from its start)."""

_LOADING: list[threading.Lock] = []


def _make_locks() -> None:
    """New ones in a forked child: threads it does not have may have held the old ones."""
    _LOADING[:] = [threading.Lock() for _ in range(64)]


_make_locks()
in_every_child(_make_locks)


def _loading(image: Image.Image) -> threading.Lock:
    """What threads hold that load or seek in the image."""
    return _LOADING[id(image) // 64 % len(_LOADING)]


def loaded(image: Image.Image) -> Image.Image:
    """A PIL image whose pixels are there, decoded now if it was opened lazily.

    Pillow's loading is not safe where threads share the image; here it is.

    Raises:
        ImageDecodeError: its file is damaged, cut off or closed.
    """
    try:
        with _loading(image):
            file = getattr(image, "fp", None)
            # None where it was decoded before.
            if hasattr(file, "seek"):
                require_whole(image, file)
            tolerating_warnings(image.load)
    except Exception as error:
        name = getattr(image, "filename", "") or type(image).__name__
        raise ImageDecodeError(
            f"The PIL image {name!r} cannot be decoded ({error}). It is damaged, cut off, or was "
            f"closed too early."
        ) from error
    return image


def is_animated(image: Image.Image) -> bool:
    """Whether a PIL image has several frames, of which it is one at a time."""
    try:
        with _loading(image):
            return bool(getattr(image, "is_animated", False))
    # What is damaged after the frame it is at.
    except Exception:
        return False


def frame_held(image: Image.Image) -> Image.Image:
    """The PIL image; of one with several frames, a copy of the frame it is at.

    Raises:
        ImageDecodeError: see `loaded`.
    """
    return loaded(image).copy() if is_animated(image) else image


def cropped(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """``image.crop(box)`` of a loaded image, left, top, right, bottom inside it.

    Pillow's own method warns of parts with very many pixels, or refuses them, as if they were yet
    to be decoded.
    """
    return image._new(image.im.crop(box))


class _ArrowArray(ctypes.Structure):
    """``struct ArrowArray`` of the Arrow C data interface."""


_ArrowArray._fields_ = [
    *((name, ctypes.c_int64) for name in ("length", "null_count", "offset", "n_buffers")),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
    *((name, ctypes.c_void_p) for name in ("dictionary", "release", "private_data")),
]

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


class _Memory:
    """Another object's memory, for NumPy; it lives as long as the array made from it."""

    def __init__(self, owner: object, address: int, shape: tuple[int, ...]) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "version": 3, "shape": shape, "typestr": "|u1", "data": (address, True)
        }  # fmt: skip


def lent_pixels(image: Image.Image) -> npt.NDArray[np.uint8] | None:
    """The pixels of an RGB image, (H, W, 4) uint8, the fourth without meaning, where Pillow can
    lend its memory (Arrow's C interface, images up to 16 MB); else None.

    Packing RGB into 3 bytes costs a copy, and more than the resize in page faults.
    """
    if (
        image.mode != "RGB"
        or not hasattr(image, "__arrow_c_array__")
        or "PILLOW_ALIGNMENT" in os.environ
    ):
        return None
    try:
        _, capsule = image.__arrow_c_array__()
    except ValueError:  # More than one block of memory.
        return None
    address = _capsule_pointer(capsule, b"arrow_array")
    values = _ArrowArray.from_address(cast("int", address)).children[0].contents
    shape = (image.height, image.width, 4)
    if values.length != math.prod(shape) or values.offset:
        return None
    return np.asarray(_Memory(capsule, values.buffers[1], shape))


def pixel_view(image: Image.Image | npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The pixels of a PIL image: lent, (H, W, 4) uint8, or else as an array of the image is, with
    an axis of channels. An array is its own pixels.
    """
    if isinstance(image, np.ndarray):
        return image
    lent = lent_pixels(image)
    if lent is not None:
        return lent
    array = np.asarray(image)
    return array if array.ndim == 3 else array[:, :, None]
