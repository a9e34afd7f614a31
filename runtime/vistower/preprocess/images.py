"""Pictures in: files to RGB as ``transformers.image_utils.load_image`` reads them, and arrays."""

from __future__ import annotations

import ctypes
import io
import math
import os
import threading
import warnings
from pathlib import Path
from typing import IO, Any, TypeAlias, TypeGuard, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from vistower.errors import ImageDecodeError, ImageFormatError
from vistower.forks import in_every_child

Bytes: TypeAlias = bytes | bytearray | memoryview

ImageInput: TypeAlias = (
    "Image.Image | npt.NDArray[Any] | str | os.PathLike[str] | Bytes | IO[bytes]"
)
"""A PIL image, an array H x W x 3 of uint8, a path, an encoded picture's bytes, or a binary file
object (read from its start)."""


def is_encoded(source: object) -> TypeGuard[str | os.PathLike[str] | Bytes | IO[bytes]]:
    """Whether it is something `open_image` decodes: a path, bytes, or a file object."""
    return isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)) or callable(
        getattr(source, "read", None)
    )


def detached(image: ImageInput) -> ImageInput:
    """The picture, with a file object replaced by its bytes.

    So its owner may close the file, or read on, before the picture is decoded.

    Raises:
        ImageDecodeError: the file object cannot be read.
    """
    return image if not callable(getattr(image, "read", None)) else _read(cast("IO[bytes]", image))


def open_image(
    source: str | os.PathLike[str] | Bytes | IO[bytes], draft: int | None = None
) -> Image.Image:
    """Read an encoded picture: fully decoded, EXIF orientation applied, converted to RGB.

    Transparency is dropped, as ``load_image`` does; pass a PIL image to have it handled by the
    processor.

    Args:
        source: a path, the bytes of a picture, or a binary file object, read from its start.
        draft: decode a JPEG at 1/2, 1/4 or 1/8 of its size where both sides keep this many
            pixels. Its levels then differ from those of the whole picture, scaled down.

    Raises:
        ImageDecodeError: no such file, or no picture Pillow can read to its end.
    """
    file: Path | io.BytesIO
    if isinstance(source, (str, os.PathLike)):
        name, file = _checked_path(Path(source))
    else:
        data = source if isinstance(source, Bytes) else _read(source)
        name = f"The picture in memory ({len(data)} bytes)"
        file = io.BytesIO(data)
        if not len(data):
            raise ImageDecodeError(f"{name} is empty.")
    try:
        # Pillow warns of large pictures and odd metadata; what it cannot read it raises.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                if draft is not None:
                    image.draft(None, (draft, draft))
                ImageOps.exif_transpose(image, in_place=True)
                image.load()
                return image if image.mode == "RGB" else image.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ImageDecodeError(
            f"{name} has more pixels than Pillow takes ({error}). Scale it down, or raise "
            f"PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        ) from error
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more.
    except Exception as error:
        raise ImageDecodeError(
            f"{name} cannot be read as a picture ({error}). It is damaged, cut off, or no picture."
        ) from error


_LOADING: list[threading.Lock] = []


def _make_locks() -> None:
    """New ones in a forked child: threads it does not have may have held the old ones."""
    _LOADING[:] = [threading.Lock() for _ in range(64)]


_make_locks()
in_every_child(_make_locks)


def loaded(image: Image.Image) -> Image.Image:
    """A PIL image whose pixels are there, decoded now if it was opened lazily.

    Pillow's loading is not safe where threads share the image; here it is.

    Raises:
        ImageDecodeError: its file is damaged, cut off or closed.
    """
    try:
        with _LOADING[id(image) // 64 % len(_LOADING)]:
            image.load()
    except Exception as error:
        name = getattr(image, "filename", "") or type(image).__name__
        raise ImageDecodeError(
            f"The PIL image {name!r} cannot be decoded ({error}). It is damaged, cut off, or was "
            f"closed too early."
        ) from error
    return image


def _checked_path(path: Path) -> tuple[str, Path]:
    if not path.is_file():
        what = "a directory" if path.is_dir() else "missing"
        raise ImageDecodeError(f"{path} is {what}. Give the path of a picture file.") from (
            None if path.is_dir() else FileNotFoundError(str(path))
        )
    if path.stat().st_size == 0:
        raise ImageDecodeError(f"{path} is empty (0 bytes). Copy the picture again.")
    return str(path), path


def _read(file: IO[bytes]) -> bytes:
    name = getattr(file, "name", None) or type(file).__name__
    try:
        if file.seekable():
            file.seek(0)
        data = file.read()
    # A closed file raises ValueError, an OS or archive reader its own exceptions.
    except Exception as error:
        raise ImageDecodeError(f"The file object {name!r} cannot be read ({error}).") from error
    if not isinstance(data, bytes):
        raise ImageDecodeError(
            f"The file object {name!r} gives {type(data).__name__}, not bytes: open it with 'rb'."
        )
    return data


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


def pixel_view(image: Image.Image) -> npt.NDArray[Any]:
    """The pixels of a PIL image: (H, W, 4) uint8 for RGB, the fourth without meaning, where
    Pillow can lend its memory (Arrow's C interface, images up to 16 MB); else as an array of the
    image is, with an axis of channels.

    Packing RGB into 3 bytes costs a copy, and more than the resize in page faults.
    """
    if (
        image.mode == "RGB"
        and hasattr(image, "__arrow_c_array__")
        and "PILLOW_ALIGNMENT" not in os.environ
    ):
        try:
            _, capsule = image.__arrow_c_array__()
        except ValueError:  # More than one block of memory.
            pass
        else:
            address = _capsule_pointer(capsule, b"arrow_array")
            values = _ArrowArray.from_address(cast("int", address)).children[0].contents
            shape = (image.height, image.width, 4)
            if values.length == math.prod(shape) and values.offset == 0:
                return np.asarray(_Memory(capsule, values.buffers[1], shape))
    array = np.asarray(image)
    return array if array.ndim == 3 else array[:, :, None]


def checked_array(image: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Require an array H x W x 3 of uint8 with at least one pixel.

    Raises:
        ImageFormatError: another shape or dtype.
    """
    if image.ndim != 3 or image.shape[2] != 3:
        raise ImageFormatError(
            f"An array of shape {image.shape} is no picture here: pass H x W x 3 (RGB, channels "
            f"last), e.g. numpy.asarray(image.convert('RGB'))."
        )
    if image.dtype != np.uint8:
        raise ImageFormatError(
            f"A picture of {image.dtype} was passed: pass uint8 in 0..255, e.g. "
            f"(array * 255).round().astype(numpy.uint8) for floats in 0..1."
        )
    if not image.size:
        raise ImageFormatError(f"An array of shape {image.shape} has no pixels.")
    return image
