"""One Hugging Face image processor, reproduced in NumPy from its ``preprocessor_config.json``.

Every option that changes pixels is honoured or refused by name (`vistower.preprocess.config`). The
pixels are computed in the arithmetic of one of three references:
`vistower.preprocess.torchvision_levels`, `vistower.preprocess.pillow_levels` and
`vistower.preprocess.rescaled_floats`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistower.errors import ImageFormatError, OptionError, ProcessorConfigError
from vistower.lazy import cached_property
from vistower.preprocess.config import Backend, Options, Transparency, read_options
from vistower.preprocess.encoded import is_encoded, open_image
from vistower.preprocess.frame import Frame, Size, center, shortest_edge
from vistower.preprocess.images import ImageInput, checked_array, loaded
from vistower.preprocess.pillow_levels import PillowLevels
from vistower.preprocess.rescaled_floats import RescaledFloats
from vistower.preprocess.torchvision_levels import TorchvisionLevels

__all__ = ["Backend", "Decode", "Pixels", "Preprocessor", "Transparency"]

Pixels = Literal["float32", "uint8"]
Decode = Literal["exact", "draft"]

_DEEP_MODES = frozenset({"I", "F", "I;16", "I;16L", "I;16B", "I;16N"})
"""Modes of PIL images with more than eight bits a channel."""


@dataclass(frozen=True)
class Preprocessor(Options):
    """An image processor: a picture → ``pixel_values``. Thread-safe and picklable.

    ``pixels`` is the type of what comes out, see `as_levels`.
    ``decode="draft"`` decodes a JPEG (a file, bytes) at 1/2, 1/4 or 1/8 of its size where that
    is no smaller than the resized picture: faster, and no longer exactly the processor's pixels;
    docs/streaming.md has the measured deviation.
    """

    pixels: Pixels = "float32"
    decode: Decode = "exact"

    def __post_init__(self) -> None:
        """Refuse an unknown way to decode.

        Raises:
            OptionError: see there.
        """
        if self.decode not in get_args(Decode):
            raise OptionError(f"decode={self.decode!r} is not known. Use exact or draft.")

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        backend: str | None = None,
        transparency: Transparency = "white",
    ) -> Preprocessor:
        """Read a parsed ``preprocessor_config.json``.

        Args:
            config: as transformers 4.57 or 5 saves it.
            backend: ``torchvision`` or ``pil``. None takes what transformers 5 would take:
                torchvision. (A plain ``CLIPImageProcessor`` of transformers 4 was the PIL one;
                the file does not tell them apart, a bundle's manifest does.)
            transparency: see the class.

        Raises:
            ProcessorConfigError: naming the option that is not reproduced.
        """
        options = read_options(config, backend, transparency)
        return cls(**{field.name: getattr(options, field.name) for field in fields(options)})

    def resized(self, size: Size) -> Preprocessor:
        """The same processor for another (height, width) in pixels, without a centre crop."""
        return replace(self, size=size, crop=None)

    @property
    def output_size(self) -> Size:
        """(height, width) of ``pixel_values``.

        Raises:
            ProcessorConfigError: it depends on the picture.
        """
        if self.crop is not None:
            return self.crop
        if isinstance(self.size, int):
            raise ProcessorConfigError(
                f"size={{'shortest_edge': {self.size}}} without a centre crop gives every picture "
                f"another size, and a graph has one: set do_center_crop or a height and a width."
            )
        return self.size

    def __call__(self, image: ImageInput, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """One picture → ``pixel_values`` (3, H, W) float32, written to ``out`` if given.

        Args:
            image: a PIL image of any mode the processor takes (its EXIF orientation is not
                applied: the processor does not either), an array H x W x 3 of uint8, or what
                `vistower.preprocess.encoded.open_image` opens: a path, bytes, a binary file object.
            out: (3, H, W) float32; uint8 of a processor that gives levels.

        Raises:
            ImageDecodeError, ImageFormatError: the picture cannot be used.
        """
        picture = self._picture(image)
        if isinstance(picture, Image.Image):
            frame = self._frame(picture.height, picture.width)
        else:
            frame = self._frame(*picture.shape[:2])
        if out is None:
            out = np.empty((3, *self.output_size), dtype=self.pixels)
        if isinstance(self._arithmetic, RescaledFloats):
            self._arithmetic.write(picture, frame, out)
            return out
        levels = self._arithmetic.levels(picture, frame)
        # One channel serves all three, as broadcasting does in torch.
        planes = levels[:3] if len(levels) >= 3 else np.broadcast_to(levels, out.shape)
        if self.pixels == "uint8":
            out[:] = planes
        else:
            self._arithmetic.write(planes, out)
        return out

    @cached_property
    def _arithmetic(self) -> TorchvisionLevels | PillowLevels | RescaledFloats:
        if self.rescale_first:
            return RescaledFloats(self.resample, self.scaling)
        if self.backend == "pil":
            return PillowLevels(self.resample, self.scaling)
        return TorchvisionLevels(self.resample, self.scaling)

    def _frame(self, height: int, width: int) -> Frame:
        """Where the pixels of a picture of that size lie."""
        size = self.size
        resized = shortest_edge(height, width, size) if isinstance(size, int) else size
        return center(resized, self.output_size)

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Scale and offset by channel that make pixel values of uint8 levels.

        None for DINOv3, which rescales before it resizes: its pixels are of no levels.
        """
        if self.rescale_first:
            return None
        return self.scaling.scale_and_offset

    def as_levels(self) -> Preprocessor:
        """The same processor, giving the uint8 levels its pixel values are made of.

        For graphs that rescale and normalize themselves.

        Raises:
            ProcessorConfigError: this processor's pixels are of no levels (DINOv3).
        """
        if self.rescale_first:
            raise ProcessorConfigError(
                f"{self.processor} rescales before it resizes, so its pixels are no uint8 levels."
            )
        return replace(self, pixels="uint8")

    @property
    def _draft_size(self) -> int:
        """Pixels that both sides of a draft keep at least."""
        return self.size if isinstance(self.size, int) else max(self.size)

    def _picture(self, image: ImageInput) -> Image.Image | npt.NDArray[np.uint8]:
        """The picture, decoded and of a mode the processor takes."""
        if is_encoded(image):
            image = open_image(image, self._draft_size if self.decode == "draft" else None)
        if isinstance(image, np.ndarray):
            return checked_array(image)
        if not isinstance(image, Image.Image):
            raise ImageFormatError(
                f"{type(image).__name__} is no picture. Pass a PIL image, an array H x W x 3 of "
                f"uint8, a path, an encoded picture's bytes or a binary file object."
            )
        if not image.width or not image.height:
            raise ImageFormatError(f"A picture of {image.width} x {image.height} is empty.")
        image = loaded(image)
        if self.convert_rgb:
            return self._to_rgb(image)
        bands, levels = len(image.getbands()), image.mode not in _DEEP_MODES
        if bands not in (1, 3) or not (levels or self.rescale_first):
            raise ImageFormatError(
                f"{self.processor} takes no picture of mode {image.mode} (its config does not "
                f"convert to RGB). Pass image.convert('RGB')."
            )
        return image

    def _to_rgb(self, image: Image.Image) -> Image.Image:
        has_alpha = "A" in image.getbands() or image.info.get("transparency") is not None
        if has_alpha and self.transparency == "white":
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image if image.mode == "RGB" else image.convert("RGB")
