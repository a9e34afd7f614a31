"""A parsed ``preprocessor_config.json``, read: every option that changes pixels, or an error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vistower.errors import ProcessorConfigError
from vistower.preprocess.frame import Size
from vistower.preprocess.resize import Filter
from vistower.preprocess.scaling import Scaling, Triple
from vistower.schema import Either, Flag, ListOf, Maybe, Real, Record, SchemaError, Text, Whole

Backend = Literal["torchvision", "pil"]
Transparency = Literal["white", "dropped"]

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

_SIDE = Whole(1, 1 << 14)
_PICTURE_SIZE = Maybe(
    Either(
        _SIDE,
        Record(
            dict.fromkeys(("height", "width", "shortest_edge", "longest_edge"), Maybe(_SIDE)),
            open=True,
        ),
    )
)
_FLAGS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")

RULE = Record(
    {
        "image_processor_type": Maybe(Text(longest=64)),
        "feature_extractor_type": Maybe(Text(longest=64)),
        "size": _PICTURE_SIZE,
        "crop_size": _PICTURE_SIZE,
        "resample": Maybe(Whole(0, 99)),
        "rescale_factor": Maybe(Real(1e-6, 1e6)),
        "image_mean": Maybe(ListOf(Real(-1e6, 1e6), 3, 3)),
        "image_std": Maybe(ListOf(Real(1e-6, 1e6), 3, 3)),
        **dict.fromkeys(_FLAGS, Maybe(Flag())),
    },
    open=True,
)
"""Types and ranges of what is read; the file holds more. Sides are bounded so that no file asks
for gigabytes a picture, the divisor away from zero so that no pixel becomes infinite."""

_REFUSED_IF_SET = ("do_pad", "pad_size", "size_divisor", "use_square_size", "do_flip_channel_order")


@dataclass(frozen=True)
class Options:
    """What an image processor does to a picture.

    ``size`` is (height, width), or one number for the shortest edge, in pixels. ``transparency``
    says what becomes of an alpha channel before the RGB conversion: blended onto white
    (transformers 5) or dropped (4.57). ``rescale_first`` is DINOv3's order.
    """

    processor: str
    backend: Backend
    size: int | Size
    resample: Filter
    crop: Size | None
    convert_rgb: bool
    transparency: Transparency
    rescale_first: bool
    scaling: Scaling


def read_options(
    config: Mapping[str, Any], backend: str | None, transparency: Transparency
) -> Options:
    """Read a parsed ``preprocessor_config.json``; see `Preprocessor.from_config`.

    Raises:
        ProcessorConfigError: naming the option that is not reproduced.
    """
    try:
        RULE.check(config, "")
    except SchemaError as error:
        raise ProcessorConfigError(f"preprocessor_config.json: {error}.") from error
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
    return Options(
        processor=str(name),
        backend="pil" if backend == "pil" else "torchvision",
        size=size,
        resample=resample,
        crop=crop,
        convert_rgb=bool(option("do_convert_rgb")),
        transparency=transparency,
        rescale_first=family == "dinov3",
        scaling=Scaling(
            factor=float(config.get("rescale_factor") or 1 / 255),
            mean=_triple(option("image_mean"), "image_mean") if normalize else None,
            std=_triple(option("image_std"), "image_std") if normalize else None,
        ),
    )


def _pair(value: Any, name: str) -> Size:
    if isinstance(value, int):
        return value, value
    if isinstance(value, Mapping) and value.get("height") and value.get("width"):
        return int(value["height"]), int(value["width"])
    raise ProcessorConfigError(f"{name}={value!r} is not reproduced; height and width are.")


def _size(value: Any, *, default_to_square: bool) -> int | Size:
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


def _triple(value: Any, name: str) -> Triple:
    if (
        isinstance(value, Sequence)
        and len(value) == 3
        and all(isinstance(number, (int, float)) and math.isfinite(number) for number in value)
    ):
        return float(value[0]), float(value[1]), float(value[2])
    raise ProcessorConfigError(f"{name}={value!r} is not reproduced; three numbers are.")
