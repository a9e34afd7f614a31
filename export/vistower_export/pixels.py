"""The gate of the processor: hard pictures through the reference's and the runtime's.

Each picture goes in as a path and, where that is something else, as a PIL image: transformers'
``load_image`` turns a file to RGB and by its EXIF orientation, an image object reaches the
processor as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from transformers.image_utils import load_image

from vistower.errors import ImageFormatError, ParityError
from vistower.preprocess.processor import Preprocessor
from vistower_export.parity import require_same_pixels

Array = npt.NDArray[np.float32]

_ORIENTATION = 0x0112
_MAY_BE_REFUSED = frozenset({"1", "I;16"})
"""Modes of which the runtime may refuse, by name, what the reference takes."""


def require_same_processor(
    processor: Any,
    preprocessor: Preprocessor,
    pictures: Sequence[Path],
    options: Mapping[str, Any] | None = None,
) -> float:
    """Compare what two processors make of picture files, and of the PIL images in them.

    A picture that the reference does not take must be refused too, and, of eight bits, no other.

    Args:
        processor: the Hugging Face one.
        preprocessor: the runtime's.
        pictures: see `vistower_export.pictures.write_hard_pictures`.
        options: to ask of the first beyond its own.

    Returns:
        The largest difference of the pixels.

    Raises:
        ParityError: they differ, or one takes a picture that the other does not.
    """
    worst = 0.0
    with warnings.catch_warnings():
        # Pillow and NumPy warn of odd modes and of values out of range.
        warnings.simplefilter("ignore")
        for path in pictures:
            for name, image, given in _ways(path):
                want = _by_reference(processor, image, options or {})
                have = _by_runtime(preprocessor, given)
                if isinstance(want, np.ndarray) and isinstance(have, np.ndarray):
                    worst = max(worst, require_same_pixels({name: want}, {name: have}))
                elif isinstance(have, np.ndarray) or (
                    isinstance(want, np.ndarray) and image.mode not in _MAY_BE_REFUSED
                ):
                    raise ParityError(
                        f"Of {name} {type(processor).__name__} makes {_said(want)}, and the NumPy "
                        f"preprocessing {_said(have)}. No bundle was written. Please report the "
                        f"checkpoint's preprocessor_config.json."
                    )
    return worst


def _ways(path: Path) -> Iterator[tuple[str, Image.Image, Path | Image.Image]]:
    """Name of a way to give a picture, what the reference gets, what the runtime gets."""
    yield path.name, load_image(str(path)), path
    with Image.open(path) as image:
        plain = image.mode == "RGB" and "transparency" not in image.info
        if not plain or _ORIENTATION in image.getexif():
            yield f"{path.name} as a PIL image of mode {image.mode}", image, image


def _by_reference(
    processor: Any, image: Image.Image, options: Mapping[str, Any]
) -> Array | Exception:
    try:
        pixel_values = processor(images=image, return_tensors="pt", **options)["pixel_values"]
        return np.asarray(pixel_values, dtype=np.float32)
    # Whatever a processor raises of a picture it does not take.
    except Exception as error:
        return error


def _by_runtime(preprocessor: Preprocessor, given: Path | Image.Image) -> Array | Exception:
    try:
        pixel_values: Array = preprocessor(given)[None]
    except ImageFormatError as error:
        return error
    return pixel_values


def _said(result: Array | Exception) -> str:
    return f"an error ({result})" if isinstance(result, Exception) else f"pixels {result.shape}"
