"""Pictures as a processor takes them: of one layout, converted to RGB, or refused in words."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistower.errors import ImageFormatError
from vistower.preprocess.arrays import Array, as_array, as_rgb, channels_last
from vistower.preprocess.classes import Backend
from vistower.preprocess.images import loaded
from vistower.preprocess.release import Release

Transparency: TypeAlias = Literal["white", "dropped"]
Grey: TypeAlias = Literal["any", "float32", "none"]

Picture: TypeAlias = "Image.Image | npt.NDArray[Any]"
"""A PIL image of mode RGB, or an array (H, W, 3 or 1)."""

_log = logging.getLogger("vistower")


@dataclass(frozen=True)
class Conversion:
    """How one processor reads PIL images, arrays and tensors.

    ``release`` is the transformers whose rules hold. ``grey`` are the dtypes of which one channel
    is normalized to three. ``any_number``: dtypes other than uint8, float32 and float64 are taken;
    ``half``: float16 too.
    """

    processor: str
    backend: Backend
    release: Release
    convert_rgb: bool
    transparency: Transparency
    grey: Grey
    any_number: bool
    half: bool

    def __call__(self, image: Any) -> Picture:
        """A PIL image, an array or a torch tensor as the processor takes it.

        Raises:
            ImageFormatError: the processor does not take it, or not one that can be reproduced.
            ImageDecodeError: the PIL image cannot be decoded.
        """
        if not isinstance(image, Image.Image):
            return self._checked(self._from_array(as_array(image)), "array")
        if not image.width or not image.height:
            raise ImageFormatError(f"A picture of {image.width} x {image.height} is empty.")
        picture = loaded(image)
        mode = f"picture of mode {picture.mode}"
        if self.convert_rgb:
            picture = self._to_rgb(picture)
        if picture.mode == "RGB" and not self._reads_rows_as_channels(picture.height):
            return picture
        return self._checked(self._from_pil(picture, mode), mode)

    def size(self, image: Any) -> tuple[int, int]:
        """(width, height) of a PIL image, or of an array or tensor with three axes."""
        if isinstance(image, Image.Image):
            return image.size
        height, width = image.shape[1:] if image.shape[0] in self._counts else image.shape[:2]
        return int(width), int(height)

    @property
    def _counts(self) -> tuple[int, ...]:
        """The numbers of channels by which an array's axis of channels is known."""
        return (1, 3, 4) if self.release.converts_arrays else (1, 3)

    def _to_rgb(self, image: Image.Image) -> Image.Image:
        has_alpha = "A" in image.getbands() or image.info.get("transparency") is not None
        try:
            if has_alpha and self.transparency == "white":
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, image)
            return image if image.mode == "RGB" else image.convert("RGB")
        except ValueError as error:
            raise ImageFormatError(
                f"Pillow has no conversion of mode {image.mode} to RGB ({error})."
            ) from error

    def _reads_rows_as_channels(self, height: int) -> bool:
        """Own PIL classes guess the axis of channels of a PIL image too, and the first one wins.

        One row they refuse for it; it is taken here.
        """
        return self.release.has_own_pil_classes and self.backend == "pil" and height == 3

    def _from_pil(self, image: Image.Image, mode: str) -> Array:
        """(H, W, C) of an image that is not plain RGB, in the reference's layout."""
        array: Array = np.asarray(image)
        if array.ndim == 2:
            if self.backend == "pil":
                raise self._refusal(mode)
            return array[:, :, None]
        if self.backend == "torchvision":
            if self.release.converts_arrays:
                return array
            # torchvision's pil_to_tensor puts the channels first, then transformers guesses.
            array = array.transpose(2, 0, 1)
        elif not self.release.has_own_pil_classes:
            return array
        try:
            return channels_last(array, (1, 3))
        except ImageFormatError:
            raise self._refusal(mode) from None

    def _from_array(self, array: Array) -> Array:
        if array.ndim != 3:
            raise ImageFormatError(
                f"An array of shape {array.shape} is no picture: transformers takes three axes, "
                f"H x W x 3 or 3 x H x W. Pass grey ones as numpy.stack([array] * 3, axis=-1), and "
                f"batches to VisionEncoder.preprocess or encode."
            )
        array = channels_last(array, self._counts)
        if not (self.release.converts_arrays and self.convert_rgb):
            return array
        if array.shape[2] == 4:
            self._check_dtype(array.dtype)
        return as_rgb(array, like_torchvision=self.backend == "torchvision")

    def _checked(self, array: Array, what: str) -> Array:
        if not array.size:
            raise ImageFormatError(f"An array of shape {array.shape} has no pixels.")
        channels = array.shape[2]
        grey = self.grey == "any" or (self.grey == "float32" and array.dtype == np.float32)
        if channels != 3 and not (channels == 1 and grey):
            raise self._refusal(f"{what} with {channels} channels")
        self._check_dtype(array.dtype)
        if array.dtype.kind == "f":
            low, high = array.min(), array.max()
            if not (np.isfinite(low) and np.isfinite(high)):
                raise ImageFormatError(f"An array of {array.dtype} has values that are not finite.")
            if low >= 0 and high <= 1:
                _warn_of_scaled()
        return array

    def _check_dtype(self, dtype: np.dtype[Any]) -> None:
        kinds = "biu" if self.any_number else ""
        floats = dtype.kind == "f" and dtype.itemsize in ((2, 4, 8) if self.half else (4, 8))
        if dtype != np.uint8 and dtype.kind not in kinds and not floats:
            raise ImageFormatError(
                f"Pictures of {dtype} are not reproduced for {self.processor} "
                f"({self.backend}): pass uint8 in 0..255, or float32 for the values that "
                f"transformers takes unscaled."
            )

    def _refusal(self, what: str) -> ImageFormatError:
        return ImageFormatError(
            f"{self.processor} ({self.backend}, transformers {self.release}) takes no {what}, "
            f"and neither does it here. Pass image.convert('RGB'), or an array H x W x 3."
        )


@lru_cache(maxsize=1)
def _warn_of_scaled() -> None:
    """Once a process, as transformers does."""
    _log.warning(
        "A picture of floats in 0..1 was passed. The processor rescales it all the same, as the "
        "Hugging Face one does: almost black. Pass uint8 in 0..255 if that is not meant."
    )
