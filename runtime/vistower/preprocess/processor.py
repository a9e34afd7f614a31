"""One Hugging Face image processor, reproduced in NumPy from its ``preprocessor_config.json``.

Every option that changes pixels is honoured or refused by name (`vistower.preprocess.config`). The
pixels are computed in the arithmetic of one of three references:
`vistower.preprocess.torchvision_arithmetic`, `vistower.preprocess.pillow_arithmetic` and
`vistower.preprocess.dinov3_arithmetic`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistower.arguments import whole_number
from vistower.errors import ImageFormatError, OptionError, ProcessorConfigError
from vistower.lazy import cached_property
from vistower.preprocess.arrays import is_array
from vistower.preprocess.classes import CLASSES, Backend, plain_name
from vistower.preprocess.config import Options, read_options
from vistower.preprocess.convert import Conversion, Picture, Transparency
from vistower.preprocess.dinov3_arithmetic import DINOv3Arithmetic
from vistower.preprocess.encoded import is_encoded, open_image, require_few_pixels
from vistower.preprocess.frame import CenterCrop, Edges, Frame, Size
from vistower.preprocess.images import ImageInput
from vistower.preprocess.pillow_arithmetic import PillowArithmetic
from vistower.preprocess.release import NEWEST, Release
from vistower.preprocess.several import no_picture, plain
from vistower.preprocess.torchvision_arithmetic import TorchvisionArithmetic, padded

__all__ = ["Backend", "Decode", "Pixels", "Preprocessor", "Transparency"]

Pixels = Literal["float32", "uint8"]
Decode = Literal["exact", "draft"]


@dataclass(frozen=True)
class Preprocessor(Options):
    """An image processor: a picture → ``pixel_values``. Thread-safe and picklable.

    ``pixels`` is the type of what comes out, see `as_levels`.
    ``decode="draft"`` decodes a JPEG (a file, bytes) at 1/2, 1/4 or 1/8 of its size where that
    is no smaller than the resized picture: faster, and no longer exactly the processor's pixels;
    docs/preprocessing.md has the measured deviation.
    ``max_pixels`` is the most width x height a picture may have, of whatever kind; a file's is
    read in its header, before it is decoded. None: only Pillow's own limit holds, see
    docs/limits.md.
    """

    pixels: Pixels = "float32"
    decode: Decode = "exact"
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown way to decode, and a limit that is none.

        Raises:
            OptionError: see there.
        """
        if self.decode not in get_args(Decode):
            raise OptionError(f"decode={self.decode!r} is not known. Use exact or draft.")
        if self.max_pixels is not None:
            most = whole_number("max_pixels", self.max_pixels, 1)
            object.__setattr__(self, "max_pixels", most)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        backend: str | None = None,
        transparency: Transparency = "white",
        transformers: str = str(NEWEST),
    ) -> Preprocessor:
        """Read a parsed ``preprocessor_config.json``.

        Args:
            config: as transformers 4.57 or 5 saves it.
            backend: ``torchvision`` or ``pil``. None takes the class's name for it, as transformers
                5 would. (A plain ``CLIPImageProcessor`` of transformers 4 was the PIL one; the file
                does not tell them apart, a bundle's manifest does.)
            transparency: see `vistower.preprocess.config.Options`.
            transformers: version of transformers whose rules hold; a bundle's manifest says it.

        Raises:
            ProcessorConfigError: naming the option that is not reproduced.
        """
        options = read_options(config, backend, transparency, Release.of(transformers))
        return cls(**{field.name: getattr(options, field.name) for field in fields(options)})

    def resized(self, size: Size) -> Preprocessor:
        """The same processor for another (height, width) in pixels.

        One that crops resizes to more than it keeps: that edge grows with the crop, rounded to the
        nearest pixel, and both stay squares.

        Raises:
            ProcessorConfigError: it crops, and one of the sizes is no square, or it resizes in
                a way of its own.
        """
        if self.crop is None:
            return replace(self, size=size)
        old, own = self.crop.size, plain_name(self.processor)
        edges = self.size
        if (
            old[0] != old[1]
            or size[0] != size[1]
            or not isinstance(edges, Edges)
            or edges.longest is not None
            or CLASSES[own].crop_pct
        ):
            raise ProcessorConfigError(
                f"{size[0]}x{size[1]} pixels were asked for, but {self.processor} cuts the middle "
                f"{old[0]}x{old[1]} out of every picture: a square out of a picture resized by its "
                f"shortest edge can be made larger or smaller, nothing else. Leave --resolution "
                f"out, or give the checkpoint a processor without a centre crop."
            )
        shortest = round(edges.shortest * size[0] / old[0])
        return replace(self, size=Edges(shortest), crop=replace(self.crop, size=size))

    @property
    def output_size(self) -> Size:
        """(height, width) of ``pixel_values``.

        Raises:
            ProcessorConfigError: it depends on the picture.
        """
        if self.crop is not None:
            return self.crop.size
        if isinstance(self.size, tuple):
            return self.size
        raise ProcessorConfigError(
            f"size={self.size!r} without a centre crop gives every picture another size, and a "
            f"graph has one: set do_center_crop, or do_resize with a height and a width."
        )

    def __call__(self, image: ImageInput, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """One picture → ``pixel_values`` (3, H, W) float32, written to ``out`` if given.

        Args:
            image: a PIL image of any mode the processor takes (its EXIF orientation is not
                applied: the processor does not either), an array or a torch tensor H x W x C or
                C x H x W, or what `vistower.preprocess.encoded.open_image` opens: a path, bytes, a
                binary file object. docs/preprocessing.md has the modes and dtypes.
            out: (3, H, W) float32; uint8 of a processor that gives levels.

        Raises:
            ImageDecodeError, ImageFormatError: the picture cannot be used.
        """
        picture = self._picture(image)
        frame = self._frame(picture)
        if out is None:
            out = np.empty((3, *self.output_size), dtype=self.pixels)
        arithmetic = self._arithmetic
        if self.pixels == "float32":
            arithmetic.write(picture, frame, out)
        elif isinstance(arithmetic, DINOv3Arithmetic) or (
            isinstance(picture, np.ndarray) and picture.dtype != np.uint8
        ):
            raise ImageFormatError(
                "A graph that takes uint8 levels takes pictures of uint8 only: pass uint8, or "
                "open the bundle with pixels='float32'."
            )
        else:
            out[:] = padded(arithmetic.levels(picture, frame), frame)
        return out

    @cached_property
    def _arithmetic(self) -> TorchvisionArithmetic | PillowArithmetic | DINOv3Arithmetic:
        if self.rescale_first:
            return DINOv3Arithmetic(self.resample, self.scaling)
        if self.backend == "pil":
            return PillowArithmetic(self.resample, self.scaling)
        return TorchvisionArithmetic(self.resample, self.scaling)

    @cached_property
    def _conversion(self) -> Conversion:
        return Conversion(
            processor=self.processor,
            backend=self.backend,
            release=self.release,
            convert_rgb=self.convert_rgb,
            transparency=self.transparency,
            grey=self.grey,
            any_number=self.rescale_first or self.backend == "pil",
            half=self.backend == "pil" and self.size is not None,
        )

    def _frame(self, picture: Picture) -> Frame:
        """Where the pixels of a picture lie."""
        if isinstance(picture, Image.Image):
            have = picture.height, picture.width
        else:
            have = picture.shape[0], picture.shape[1]
        size = self.size or have
        if isinstance(size, Edges):
            size = size.size(*have)
        if 0 in size:
            raise ImageFormatError(
                f"A picture of {have[0]} x {have[1]} pixels would be resized to {size}: its sides "
                f"are too different for this processor."
            )
        crop = self.crop or CenterCrop(size)
        return crop.frame(size, resizes=self.size is not None)

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

    def _picture(self, image: ImageInput) -> Picture:
        """The picture, decoded and as the processor takes it."""
        image = plain(image)
        if is_encoded(image):
            draft = self._draft_size if self.decode == "draft" else None
            image = open_image(image, draft, self.max_pixels)
        elif not isinstance(image, Image.Image) and not is_array(image):
            raise no_picture(image)
        elif self.max_pixels is not None and (isinstance(image, Image.Image) or image.ndim == 3):
            name = f"The picture ({type(image).__name__})"
            require_few_pixels(name, self._conversion.size(image), self.max_pixels)
        return self._conversion(image)

    @property
    def _draft_size(self) -> int | None:
        """Pixels that both sides of a draft keep at least; None where every pixel counts."""
        if isinstance(self.size, Edges):
            return self.size.shortest
        return None if self.size is None else max(self.size)
