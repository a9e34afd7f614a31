"""One Hugging Face image processor, reproduced in NumPy from its ``preprocessor_config.json``.

Every option that changes pixels is honoured or refused by name. Three references are known:
CLIP's torchvision backend (uint8 resize by torchvision), CLIP's PIL backend (uint8 resize by
Pillow), and DINOv3 (rescaled to float first, then a float resize).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from vistower.errors import ImageFormatError, OptionError, ProcessorConfigError
from vistower.preprocess import native
from vistower.preprocess.images import (
    ImageInput,
    checked_array,
    is_encoded,
    loaded,
    open_image,
    pixel_view,
)
from vistower.preprocess.resize import Filter, nearest, resize, resize_float

Backend = Literal["torchvision", "pil"]
Transparency = Literal["white", "dropped"]
Pixels = Literal["float32", "uint8"]
Decode = Literal["exact", "draft"]
Array = npt.NDArray[np.float32]

RESAMPLE: Mapping[int, Filter] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}
"""``resample`` of a config (PIL's numbers) → the filter."""

_PIL_ONLY: frozenset[Filter] = frozenset({"box", "hamming"})
"""Filters torchvision does not have for tensors: its processors fail on them."""

_CLIP_NAMES = frozenset(
    {
        "CLIPImageProcessor",
        "CLIPImageProcessorFast",
        "CLIPFeatureExtractor",
        "CLIPImageProcessorPil",
    }
)
_DINOV3_NAMES = frozenset({"DINOv3ViTImageProcessor", "DINOv3ViTImageProcessorFast"})

_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "clip": {
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "dinov3": {
        "size": {"height": 224, "width": 224},
        "do_center_crop": False,
        "do_convert_rgb": False,
        "resample": 2,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
}
"""What the Hugging Face classes assume where a config is silent or says null."""

_DEEP_MODES = frozenset({"I", "F", "I;16", "I;16L", "I;16B", "I;16N"})
"""Modes of PIL images with more than eight bits a channel."""

_REFUSED_IF_SET = ("do_pad", "pad_size", "size_divisor", "use_square_size", "do_flip_channel_order")


@dataclass(frozen=True)
class Preprocessor:
    """An image processor: a picture → ``pixel_values``. Thread-safe and picklable.

    ``size`` is (height, width), or one number for the shortest edge, in pixels. ``transparency``
    says what becomes of an alpha channel before the RGB conversion: blended onto white
    (transformers 5) or dropped (4.57). ``rescale_first`` is DINOv3's order. ``pixels`` is the
    type of what comes out, see `as_levels`.
    ``decode="draft"`` decodes a JPEG (a file, bytes) at 1/2, 1/4 or 1/8 of its size where that
    is no smaller than the resized picture: faster, and no longer exactly the processor's pixels;
    docs/streaming.md has the measured deviation.
    """

    processor: str
    backend: Backend
    size: int | tuple[int, int]
    resample: Filter
    crop: tuple[int, int] | None
    convert_rgb: bool
    transparency: Transparency
    rescale_first: bool
    rescale_factor: float
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
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
        name = config.get("image_processor_type") or config.get("feature_extractor_type")
        if name in _CLIP_NAMES:
            family = "clip"
        elif name in _DINOV3_NAMES:
            family = "dinov3"
        else:
            raise ProcessorConfigError(
                f"image_processor_type={name!r} is not known. Known: "
                f"{', '.join(sorted(_CLIP_NAMES | _DINOV3_NAMES))}."
            )
        if backend not in (None, "torchvision", "pil") or (backend == "pil" and family != "clip"):
            raise ProcessorConfigError(f"{name} has no backend {backend!r}.")
        for key in _REFUSED_IF_SET:
            if config.get(key):
                raise ProcessorConfigError(f"{key}={config[key]!r} is not reproduced.")
        for key in ("do_resize", "do_rescale"):
            if config.get(key) is False:
                raise ProcessorConfigError(f"{key}=false is not reproduced: remove it.")

        def option(key: str) -> Any:
            value = config.get(key)
            return _DEFAULTS[family].get(key) if value is None else value

        resample = RESAMPLE.get(option("resample"))
        if resample is None or (resample in _PIL_ONLY and backend != "pil"):
            raise ProcessorConfigError(
                f"resample={option('resample')!r} is not reproduced. The torchvision processors "
                f"have 0 (nearest), 1 (lanczos), 2 (bilinear) and 3 (bicubic), CLIP's PIL backend "
                f"4 (box) and 5 (hamming) too."
            )
        size = _size(option("size"), default_to_square=family != "clip")
        crop = _pair(option("crop_size"), "crop_size") if option("do_center_crop") else None
        smallest = (size, size) if isinstance(size, int) else size
        if crop is not None and (crop[0] > smallest[0] or crop[1] > smallest[1]):
            raise ProcessorConfigError(
                f"crop_size={crop} is larger than size={size}: padding is not reproduced."
            )
        normalize = config.get("do_normalize") is not False
        return cls(
            processor=str(name),
            backend="pil" if backend == "pil" else "torchvision",
            size=size,
            resample=resample,
            crop=crop,
            convert_rgb=bool(option("do_convert_rgb")),
            transparency=transparency,
            rescale_first=family == "dinov3",
            rescale_factor=float(config.get("rescale_factor") or 1 / 255),
            mean=_triple(option("image_mean"), "image_mean") if normalize else None,
            std=_triple(option("image_std"), "image_std") if normalize else None,
        )

    def resized(self, size: tuple[int, int]) -> Preprocessor:
        """The same processor for another (height, width) in pixels, without a centre crop."""
        return replace(self, size=size, crop=None)

    @property
    def output_size(self) -> tuple[int, int]:
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
                `vistower.preprocess.images.open_image` opens: a path, bytes, a binary file object.
            out: (3, H, W) float32; uint8 of a processor that gives levels.

        Raises:
            ImageDecodeError, ImageFormatError: the picture cannot be used.
        """
        picture = self._picture(image)
        if isinstance(picture, Image.Image):
            size = self._resized(picture.height, picture.width)
        else:
            size = self._resized(*picture.shape[:2])
        height, width = self.output_size
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        window = (top, left, top + height, left + width)
        if out is None:
            out = np.empty((3, height, width), dtype=self.pixels)
        if self.rescale_first:
            self._write_floats(picture, size, window, out)
            return out
        levels = self._levels(picture, size, window)
        if self.pixels == "uint8":
            out[:] = levels[:3]
        else:
            self._write_levels(levels, out)
        return out

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Scale and offset by channel that make pixel values of uint8 levels.

        None for DINOv3, which rescales before it resizes: its pixels are of no levels.
        """
        if self.rescale_first:
            return None
        mean, std = self.mean or (0.0, 0.0, 0.0), self.std or (1.0, 1.0, 1.0)
        scale = tuple(self.rescale_factor / s for s in std)
        return scale, tuple(-m / s for m, s in zip(mean, std, strict=True))

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

    def _levels(
        self,
        picture: Image.Image | npt.NDArray[np.uint8],
        size: tuple[int, int],
        window: tuple[int, int, int, int],
    ) -> npt.NDArray[Any]:
        """The window of the resized picture, (1, 3 or 4, H, W), levels 0..255."""
        if self.backend != "pil" and self.resample == "nearest":
            array = pixel_view(picture) if isinstance(picture, Image.Image) else picture
            return nearest(array, size, window)
        if not isinstance(picture, Image.Image):
            if self.backend != "pil" and not native.can_resize(picture.shape, size, window):
                return resize(picture, size, window, self.resample)
            picture = Image.fromarray(picture)
        if self.backend == "pil":
            # Pillow itself: which axis it resamples first has changed between its releases.
            top, left, bottom, right = window
            resized = picture.resize((size[1], size[0]), Image.Resampling[self.resample.upper()])
            return pixel_view(resized.crop((left, top, right, bottom))).transpose(2, 0, 1)
        if picture.mode == "RGB" and native.can_resize(
            (picture.height, picture.width), size, window
        ):
            resized = native.resize(picture, size, window, self.resample)
            return pixel_view(resized).transpose(2, 0, 1)
        pixels = pixel_view(picture)[:, :, :3]
        return resize(pixels.astype(np.uint8, copy=False), size, window, self.resample)

    def _to_rgb(self, image: Image.Image) -> Image.Image:
        has_alpha = "A" in image.getbands() or image.info.get("transparency") is not None
        if has_alpha and self.transparency == "white":
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image if image.mode == "RGB" else image.convert("RGB")

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Size after the resize; the long side is cut to an integer, as the processor does."""
        if not isinstance(self.size, int):
            return self.size
        if height <= width:
            return self.size, int(self.size * width / height)
        return int(self.size * height / width), self.size

    def _write_floats(
        self,
        picture: Image.Image | npt.NDArray[np.uint8],
        size: tuple[int, int],
        window: tuple[int, int, int, int],
        out: Array,
    ) -> None:
        """Rescale, resize and normalize, the first and the last folded into one factor.

        One channel serves all three, as broadcasting does in torch.
        """
        pixels = pixel_view(picture) if isinstance(picture, Image.Image) else picture
        mean = np.zeros(3) if self.mean is None else np.asarray(self.mean)
        std = np.ones(3) if self.std is None else np.asarray(self.std)
        scale = (self.rescale_factor / std).astype(np.float32)
        if self.resample == "nearest":
            levels = nearest(pixels, size, window)[: 3 if pixels.shape[2] >= 3 else 1]
            np.multiply(levels, scale[:, None, None], out=out, dtype=np.float32, casting="unsafe")
        elif pixels.shape[2] == 1:
            resize_float(pixels, np.ones(1, np.float32), size, window, self.resample, out[:1])
            np.multiply(out[:1], scale[:, None, None], out=out)
        else:
            resize_float(pixels, scale, size, window, self.resample, out)
        if self.mean is not None:
            out -= (mean / std).astype(np.float32)[:, None, None]

    def _write_levels(self, levels: npt.NDArray[Any], out: Array) -> None:
        """Rescale and normalize levels, in the arithmetic of `_table`."""
        planes = levels[:3] if len(levels) >= 3 else np.broadcast_to(levels, out.shape)
        if self.backend == "torchvision" and self.mean is not None and self.std is not None:
            mean, std = self._scaled_mean_and_std
            np.subtract(planes, mean[:, None, None], out=out, dtype=np.float32, casting="unsafe")
            np.divide(out, std[:, None, None], out=out)
            return
        for channel in range(3):
            np.take(self._table[channel], planes[channel].astype(np.intp), out=out[channel])

    @cached_property
    def _scaled_mean_and_std(self) -> tuple[Array, Array]:
        """torchvision subtracts mean/factor from levels and divides by std/factor, in float32."""
        inverse = np.float32(1.0 / self.rescale_factor)
        mean: Array = np.asarray(self.mean, np.float32) * inverse
        std: Array = np.asarray(self.std, np.float32) * inverse
        return mean, std

    @cached_property
    def _table(self) -> Array:
        """(3, 256): the value of each level of each channel, in the backend's own arithmetic.

        The PIL backend multiplies in float64 and normalizes in float32; torchvision comes here
        only without normalization.
        """
        scaled = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        if self.mean is None or self.std is None:
            return np.broadcast_to(scaled, (3, 256)).copy()
        mean = np.asarray(self.mean, np.float32)[:, None]
        std = np.asarray(self.std, np.float32)[:, None]
        table: Array = (scaled - mean) / std
        return table


def _pair(value: Any, name: str) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, Mapping) and value.get("height") and value.get("width"):
        return int(value["height"]), int(value["width"])
    raise ProcessorConfigError(f"{name}={value!r} is not reproduced; height and width are.")


def _size(value: Any, *, default_to_square: bool) -> int | tuple[int, int]:
    if isinstance(value, int):
        return (value, value) if default_to_square else value
    if isinstance(value, Mapping):
        given = {key: number for key, number in value.items() if number}
        if given.keys() == {"shortest_edge"}:
            return int(given["shortest_edge"])
        if given.keys() == {"height", "width"}:
            return int(given["height"]), int(given["width"])
    raise ProcessorConfigError(
        f"size={value!r} is not reproduced; shortest_edge alone, or height and width, are."
    )


def _triple(value: Any, name: str) -> tuple[float, float, float]:
    if (
        isinstance(value, Sequence)
        and len(value) == 3
        and all(isinstance(number, (int, float)) and math.isfinite(number) for number in value)
    ):
        return float(value[0]), float(value[1]), float(value[2])
    raise ProcessorConfigError(f"{name}={value!r} is not reproduced; three numbers are.")
