"""Pictures in: files to RGB as ``transformers.image_utils.load_image`` reads them, and arrays."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from vistower.errors import ImageDecodeError, ImageFormatError

ImageInput: TypeAlias = "Image.Image | npt.NDArray[Any] | str | os.PathLike[str]"
"""A PIL image, an array H x W x 3 of uint8, or a path."""


def open_image(source: str | os.PathLike[str]) -> Image.Image:
    """Read a picture file: fully decoded, EXIF orientation applied, converted to RGB.

    Transparency is dropped, as ``load_image`` does; pass a PIL image to have it handled by the
    processor.

    Raises:
        ImageDecodeError: no such file, or no picture Pillow can read to its end.
    """
    path = Path(source)
    if not path.is_file():
        what = "a directory" if path.is_dir() else "missing"
        raise ImageDecodeError(f"{path} is {what}. Give the path of a picture file.") from (
            None if path.is_dir() else FileNotFoundError(str(path))
        )
    if path.stat().st_size == 0:
        raise ImageDecodeError(f"{path} is empty (0 bytes). Copy the picture again.")
    try:
        # Pillow warns of large pictures and odd metadata; what it cannot read it raises.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError as error:
        raise ImageDecodeError(
            f"{path} has more pixels than Pillow takes ({error}). Scale it down, or raise "
            f"PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        ) from error
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more.
    except Exception as error:
        raise ImageDecodeError(
            f"{path} cannot be read as a picture ({error}). It is damaged, cut off, or no picture."
        ) from error


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
