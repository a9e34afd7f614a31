"""A parsed ``preprocessor_config.json``, read: every option that changes pixels, or an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vistower.errors import ProcessorConfigError
from vistower.preprocess.classes import Backend, ProcessorClass, class_and_backend
from vistower.preprocess.convert import Grey, Transparency
from vistower.preprocess.frame import CenterCrop, Edges, Size
from vistower.preprocess.release import Release
from vistower.preprocess.resize import Filter
from vistower.preprocess.scaling import Scaling, Triple
from vistower.schema import Either, Flag, ListOf, Maybe, Real, Record, SchemaError, Text, Whole

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

_SIDE = Whole(1, 1 << 14)
_EDGES = ("height", "width", "shortest_edge", "longest_edge")
_PICTURE_SIZE = Maybe(
    Either(
        _SIDE,
        Either(ListOf(_SIDE, 2, 2), Record(dict.fromkeys(_EDGES, Maybe(_SIDE)), open=True)),
    )
)
_FLAGS = (
    *("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"),
    *("default_to_square", "rescale_offset", "include_top"),
)


def _by_channel(number: Real) -> Maybe:
    return Maybe(Either(number, ListOf(number, 3, 3)))


RULE = Record(
    {
        "image_processor_type": Maybe(Text(longest=64)),
        "feature_extractor_type": Maybe(Text(longest=64)),
        "size": _PICTURE_SIZE,
        "crop_size": _PICTURE_SIZE,
        "crop_pct": Maybe(Real(1e-2, 1e2)),
        "resample": Maybe(Whole(0, 99)),
        "rescale_factor": Maybe(Real(1e-6, 1e6)),
        "image_mean": _by_channel(Real(-1e6, 1e6)),
        "image_std": _by_channel(Real(1e-6, 1e6)),
        **dict.fromkeys(_FLAGS, Maybe(Flag())),
    },
    open=True,
)
"""Types and ranges of what is read; the file holds more. Sides are bounded so that no file asks
for gigabytes a picture, the divisor away from zero so that no pixel becomes infinite."""

_REFUSED_IF_SET = (
    "do_pad",
    "pad_size",
    "size_divisor",
    "use_square_size",
    "do_flip_channel_order",
    "input_data_format",
)

_SQUASHES_FROM = 384
"""ConvNeXt's shortest edge from which a picture is resized to a square, and not cropped."""


@dataclass(frozen=True)
class Options:
    """What an image processor does to a picture.

    ``size`` is (height, width), or the edges of a resize that keeps the aspect ratio, or None
    without a resize. ``transparency`` says what becomes of an alpha channel before the RGB
    conversion: blended onto white (transformers from 5.21 on) or dropped. ``release`` is the
    transformers whose rules hold. ``rescale_first`` is DINOv3's order, ``grey`` the dtypes of
    which one channel serves all three.
    """

    processor: str
    backend: Backend
    release: Release
    size: Size | Edges | None
    resample: Filter
    crop: CenterCrop | None
    convert_rgb: bool
    transparency: Transparency
    rescale_first: bool
    grey: Grey
    scaling: Scaling


class _Config:
    """The options of a configuration, with what the class assumes where it is silent."""

    def __init__(
        self, config: Mapping[str, Any], record: ProcessorClass, backend: Backend, release: Release
    ) -> None:
        self._config, self._record, self._release = config, record, release
        self.is_own_pil = backend == "pil" and release.has_own_pil_classes

    def get(self, name: str) -> Any:
        if self.is_own_pil and name in self._record.pil_lacks:
            return None
        value = self._config.get(name)
        if value is None and not (name.startswith("do_") and self._means_null(name)):
            value = self._record.default(name, self._release)
        return value

    def on(self, name: str) -> bool:
        """An option that is on unless it says otherwise."""
        value = self._config.get(name)
        return not self._means_null(name) if value is None else bool(value)

    def _means_null(self, name: str) -> bool:
        """Whether a null is no silence: every class takes it for what it says, which is off."""
        return name in self._config


def read_options(
    config: Mapping[str, Any], backend: str | None, transparency: Transparency, release: Release
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
    record, chosen = class_and_backend(name, backend)
    for key in _REFUSED_IF_SET:
        if config.get(key):
            raise ProcessorConfigError(f"{key}={config[key]!r} is not reproduced.")
    if config.get("data_format") not in (None, "channels_first"):
        raise ProcessorConfigError(f"data_format={config['data_format']!r} is not reproduced.")
    options = _Config(config, record, chosen, release)
    size, crop = _geometry(options, record, chosen, release)
    scaling = _scaling(options, record)
    return Options(
        processor=str(name),
        backend=chosen,
        release=release,
        size=size,
        resample=_resample(options.get("resample"), chosen),
        crop=crop,
        convert_rgb=bool(options.get("do_convert_rgb")),
        transparency=transparency,
        rescale_first=record.rescale_first,
        grey=_grey(record, chosen, release) if scaling.mean is not None else "none",
        scaling=scaling,
    )


def _grey(record: ProcessorClass, backend: Backend, release: Release) -> Grey:
    if backend == "pil":
        return "none"
    if record.grey or not release.normalizes_in_place:
        return "any"
    # What is no float32 is copied, normalized in place, and cannot grow to three channels.
    return "float32"


def _resample(value: Any, backend: Backend) -> Filter:
    resample = RESAMPLE.get(value)
    if resample is None or (resample in _PIL_ONLY and backend != "pil"):
        raise ProcessorConfigError(
            f"resample={value!r} is not reproduced. The torchvision processors have 0 (nearest), "
            f"1 (lanczos), 2 (bilinear) and 3 (bicubic), the PIL ones 4 (box) and 5 (hamming) too."
        )
    return resample


def _geometry(
    options: _Config, record: ProcessorClass, backend: Backend, release: Release
) -> tuple[Size | Edges | None, CenterCrop | None]:
    """The resize, and the centre crop after it."""
    pads_ahead = backend == "pil"
    crop = None
    if options.get("do_center_crop"):
        crop = CenterCrop(_crop_size(options.get("crop_size")), pads_ahead=pads_ahead)
    if not options.on("do_resize"):
        return None, crop
    given = options.get("size")
    size = _size(given, options.get("default_to_square") is not False)
    keys = ("shortest_edge",) if isinstance(size, Edges) else ("height", "width")
    if options.is_own_pil:
        if not set(keys) <= set(record.pil_sizes):
            raise ProcessorConfigError(
                f"size={given!r}: the PIL {record.name} of transformers {release} takes "
                f"{', '.join(record.pil_sizes)}."
            )
        # It does not look at a longest edge.
        size = Edges(size.shortest) if isinstance(size, Edges) else size
    if not record.crop_pct:
        return size, crop
    if not isinstance(size, Edges) or size.longest is not None or crop is not None:
        raise ProcessorConfigError(
            f"size={given!r}: {record.name} is reproduced with a shortest_edge alone and without "
            f"do_center_crop."
        )
    edge, part = size.shortest, options.get("crop_pct")
    if edge >= _SQUASHES_FROM:
        # A crop of all of it: like one, it leaves the class no other size to be asked for.
        return (edge, edge), CenterCrop((edge, edge))
    # Its torchvision class of 4.57 crops with torchvision's own function.
    own = backend == "torchvision" and release.major < 5
    return Edges(int(edge / part)), CenterCrop((edge, edge), own, pads_ahead)


def _scaling(options: _Config, record: ProcessorClass) -> Scaling:
    rescale, normalize = options.on("do_rescale"), options.on("do_normalize")
    if not rescale and (record.rescale_first or not normalize):
        raise ProcessorConfigError(
            "do_rescale=false is not reproduced without do_normalize, nor for DINOv3's class: the "
            "pixels would be levels, not floats."
        )
    factor = options.get("rescale_factor")
    mean, std = _triple(options.get("image_mean")), _triple(options.get("image_std"))
    shifted = record.offset_and_top and rescale and options.get("rescale_offset")
    return Scaling(
        factor=(1 / 255 if factor is None else factor) if rescale else 1.0,
        mean=mean if normalize else None,
        std=std if normalize else None,
        offset=-1.0 if shifted else 0.0,
        top=std if record.offset_and_top and options.get("include_top") else None,
    )


def _crop_size(value: Any) -> Size:
    size = _size(value, True, "crop_size")
    if isinstance(size, Edges):
        raise ProcessorConfigError(f"crop_size={value!r} is not reproduced; height and width are.")
    return size


def _size(value: Any, default_to_square: bool, name: str = "size") -> Size | Edges:
    if isinstance(value, int):
        return (value, value) if default_to_square else Edges(value)
    if isinstance(value, list):
        return value[0], value[1]
    given = {key: number for key, number in (value or {}).items() if number is not None}
    if given.keys() == {"height", "width"}:
        return given["height"], given["width"]
    if given.keys() in ({"shortest_edge"}, {"shortest_edge", "longest_edge"}):
        return Edges(given["shortest_edge"], given.get("longest_edge"))
    raise ProcessorConfigError(
        f"{name}={value!r} is not reproduced; height and width, shortest_edge, or shortest_edge "
        f"and longest_edge are, in whole pixels."
    )


def _triple(value: Any) -> Triple:
    if isinstance(value, list):
        return float(value[0]), float(value[1]), float(value[2])
    return float(value), float(value), float(value)
