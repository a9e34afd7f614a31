"""The Hugging Face image processors that are reproduced, as data: one record a class.

A record has the class's name in transformers 5. transformers 4.57 calls the torchvision one
``...Fast``, transformers 5 the PIL one ``...Pil``, and both know ``...FeatureExtractor`` from
older files. Sources: ``transformers/models/*/image_processing_*.py`` of 4.57.6 and 5.23
(`vistower.preprocess.release` for those between).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from vistower.errors import ProcessorConfigError
from vistower.preprocess.release import UNIFIED, Release

Backend: TypeAlias = Literal["torchvision", "pil"]

_CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
_CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
_HALF = [0.5, 0.5, 0.5]


@dataclass(frozen=True)
class ProcessorClass:
    """What one class of image processors does where its configuration is silent, or never does.

    ``defaults`` are the class's own values; of an option in ``before`` the value was another one
    until a release. ``pil_lacks`` are options that an own PIL class (`Release`) does not read, and
    ``pil_sizes`` the keys of ``size`` that it takes. ``rescale_first``: to float first, then the
    resize. ``crop_pct``: ConvNeXt's way to resize. ``offset_and_top``: EfficientNet's
    ``rescale_offset`` and ``include_top``. ``grey``: the torchvision class normalizes one channel
    of any dtype to three in every release.
    """

    name: str
    defaults: Mapping[str, Any]
    before: Mapping[str, tuple[Release, Any]] = field(default_factory=dict)
    backends: tuple[Backend, ...] = ("torchvision", "pil")
    pil_lacks: frozenset[str] = frozenset()
    pil_sizes: tuple[str, ...] = ("height", "width")
    rescale_first: bool = False
    crop_pct: bool = False
    offset_and_top: bool = False
    grey: bool = False

    def default(self, option: str, release: Release) -> Any:
        """The value of an option that a configuration leaves out, in a release of transformers."""
        until, value = self.before.get(option, (release, None))
        return value if release < until else self.defaults.get(option)


_SQUARE_224 = {"height": 224, "width": 224}
_CLIP = {
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "crop_size": _SQUARE_224,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "resample": 3,
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
}

CLASSES: Mapping[str, ProcessorClass] = {
    record.name: record
    for record in (
        ProcessorClass("CLIPImageProcessor", _CLIP, pil_sizes=("shortest_edge", "height", "width")),
        ProcessorClass("BitImageProcessor", _CLIP, pil_sizes=("shortest_edge", "height", "width")),
        ProcessorClass(
            "SiglipImageProcessor",
            {
                "size": _SQUARE_224,
                "default_to_square": False,
                "do_convert_rgb": True,
                "resample": 3,
                "image_mean": _HALF,
                "image_std": _HALF,
            },
            before={"do_convert_rgb": (UNIFIED, False)},
            pil_lacks=frozenset({"do_center_crop"}),
        ),
        ProcessorClass(
            "ViTImageProcessor",
            {"size": _SQUARE_224, "resample": 2, "image_mean": _HALF, "image_std": _HALF},
            pil_lacks=frozenset({"do_center_crop"}),
        ),
        ProcessorClass(
            "DeiTImageProcessor",
            {
                "size": {"height": 256, "width": 256},
                "crop_size": _SQUARE_224,
                "do_center_crop": True,
                "resample": 3,
                "image_mean": _HALF,
                "image_std": _HALF,
            },
            pil_lacks=frozenset({"do_convert_rgb"}),
        ),
        ProcessorClass(
            "ConvNextImageProcessor",
            {
                "size": {"shortest_edge": 384},
                "default_to_square": False,
                "crop_pct": 224 / 256,
                "resample": 3,
                "image_mean": _HALF,
                "image_std": _HALF,
            },
            before={"resample": (Release(5, 0), 2)},
            pil_lacks=frozenset({"do_center_crop", "do_convert_rgb"}),
            pil_sizes=("shortest_edge",),
            crop_pct=True,
        ),
        ProcessorClass(
            "EfficientNetImageProcessor",
            {
                "size": {"height": 346, "width": 346},
                "crop_size": {"height": 289, "width": 289},
                "include_top": True,
                "resample": 3,
                "image_mean": _HALF,
                "image_std": _HALF,
            },
            before={"resample": (Release(5, 0), 0)},
            pil_lacks=frozenset({"do_convert_rgb"}),
            offset_and_top=True,
            grey=True,
        ),
        ProcessorClass(
            "DINOv3ViTImageProcessor",
            {
                "size": _SQUARE_224,
                "resample": 2,
                "image_mean": [0.485, 0.456, 0.406],
                "image_std": [0.229, 0.224, 0.225],
            },
            backends=("torchvision",),
            rescale_first=True,
            grey=True,
        ),
    )
}
"""The classes by name."""


def plain_name(name: str) -> str:
    """A class's name without what says its backend or its age."""
    name = name.removesuffix("Fast").removesuffix("Pil")
    return name.replace("FeatureExtractor", "ImageProcessor")


def class_and_backend(name: object, backend: str | None) -> tuple[ProcessorClass, Backend]:
    """The record of a class name in any spelling, and the backend asked for, or that of the name.

    Raises:
        ProcessorConfigError: the class is not known, or has no such backend.
    """
    spelled = str(name)
    record = CLASSES.get(plain_name(spelled))
    if record is None:
        raise ProcessorConfigError(
            f"image_processor_type={name!r} is not reproduced. Known: {', '.join(sorted(CLASSES))} "
            f"(also with Fast or Pil at the end)."
        )
    for one in record.backends:
        if one == (backend or ("pil" if spelled.endswith("Pil") else "torchvision")):
            return record, one
    raise ProcessorConfigError(
        f"{record.name} has no backend {backend or 'pil'!r}; it has {', '.join(record.backends)}."
    )
