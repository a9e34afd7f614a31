"""The two mixins. Each brings a patch-level method, a CLS method, its input size and its patch
size; nothing else.

They compute in fp32 without TF32, as the torch mixins do, unless the environment variable
``VISTOWER_PRECISION`` names another of `vistower.precision`.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from vistower.bundle import find_bundle
from vistower.encoder import VisionEncoder
from vistower.errors import BundleUnsupportedError, MissingModelPathError, OptionError
from vistower.families.clip import FAMILY as CLIP
from vistower.families.dinov3 import FAMILY as DINOV3
from vistower.families.record import Family
from vistower.mixins.feature_cache import FeatureCache
from vistower.mixins.masks import indexed
from vistower.mixins.model import TowerModel
from vistower.mixins.processor import TowerProcessor
from vistower.mixins.results import to_output
from vistower.preprocess.images import ImageInput

PRECISION_SETTING = "VISTOWER_PRECISION"
"""Environment variable with the precision of the mixins, for consumers that stay unchanged."""

PIXELS_SETTING = "VISTOWER_MAX_PIXELS"
"""Environment variable with the ``max_pixels`` of the mixins' pictures; without it, no limit."""

CLIP_DEFAULT_MODEL = "openai/clip-vit-base-patch32"

Array = npt.NDArray[np.float32]


class _Features:
    """What the two mixins have in common."""

    device: Any
    processor: TowerProcessor
    model: TowerModel
    patch_size: int
    _feature_cache: FeatureCache

    def _load(self, mixin: type[_Features], family: Family, kwargs: dict[str, Any]) -> int:
        """Open the model's bundle; returns its input size in pixels.

        The size is the bundle's own, which `EMBED_MODEL_RESOLUTION` and the fallbacks of the
        torch mixins only guess from the name.
        """
        model_path, device = kwargs.get("model_path"), kwargs.get("device")
        if model_path is None:
            raise MissingModelPathError(
                f"{mixin.__name__} needs the keyword model_path: a bundle's directory, a "
                f"checkpoint's directory or a hub id such as {_example(family)}."
            )
        bundle = find_bundle(model_path)
        if bundle.model_type != family.model_type:
            other = _MIXINS.get(bundle.model_type)
            without = "" if bundle.family.has_cls else ", which has no CLS token"
            raise BundleUnsupportedError(
                f"{mixin.__name__} was given {os.fspath(model_path)!r}, which holds "
                f"{bundle.name} of model type {bundle.model_type}{without}, not "
                f"{family.model_type}. "
                + (f"Use {other}, or give" if other else "Give")
                + f" a model such as {_example(family)}."
            )
        encoder = VisionEncoder.open(
            bundle.directory,
            device="auto" if device is None else device,
            precision=os.environ.get(PRECISION_SETTING, "fp32"),
            max_pixels=_max_pixels(),
        )
        self.model = TowerModel(encoder)
        self.processor = TowerProcessor(encoder)
        # Consumers hand it to torch, which knows no "auto".
        automatic = device is None or (isinstance(device, str) and device == "auto")
        self.device = encoder.device if automatic else device
        self._feature_cache = FeatureCache()
        self.patch_size = encoder.layout.patch_size
        return encoder.layout.image_size[0]

    def get_features(self, image: ImageInput | Iterable[ImageInput], mask: Any = None) -> Any:
        """Patch tokens: (N, D) of one picture, (B, N, D) of a list of B ≥ 2.

        N patches row-major from the top left, D the hidden size, float32; a list of one is one
        picture. With a mask, ``embeddings[mask, :]`` of that: (mask.sum(), D) for a boolean mask
        (N,). Of a list it indexes the pictures, as the torch mixins do.

        Args:
            image: as for `VisionEncoder.preprocess`.
            mask: whatever indexes a torch tensor: boolean, indexes, a slice; NumPy, torch or a
                list, see `vistower.mixins.masks`.

        Raises:
            EmptyInputError: an empty list.
            ImageDecodeError, ImageFormatError: a picture cannot be used.
            MaskError: the mask does not index the tokens; it is an ``IndexError``.
        """
        patches = _squeezed(self.model.encoder.layout.patches(self._forward(image)))
        return to_output(patches if mask is None else indexed(patches, mask))

    def get_cls_feature(self, image: ImageInput | Iterable[ImageInput]) -> Any:
        """The CLS token: (D,) of one picture, (B, D) of a list of B ≥ 2.

        Raises:
            EmptyInputError: an empty list.
            ImageDecodeError, ImageFormatError: a picture cannot be used.
        """
        return to_output(_squeezed(self.model.encoder.layout.cls(self._forward(image))))

    def _forward(self, image: ImageInput | Iterable[ImageInput]) -> Array:
        encoder = self.model.encoder
        return self._feature_cache.forward(encoder.preprocess(image), encoder.forward)


class CLIPMixin(_Features):
    """CLIP vision features: raw encoder output, not ``pooler_output``, no projection, no norm.

    Keywords read: ``model_path`` (default ``openai/clip-vit-base-patch32``) and ``device``
    (default automatic). All keywords go on to the next class of the MRO. Sets ``img_input_size``
    and ``patch_size`` in pixels, ``device`` as it was given, ``processor`` and ``model``; the
    `VisionEncoder` behind them is ``model.encoder``.
    """

    img_input_size: int

    def __init__(self, **kwargs: Any) -> None:
        """Open the model's bundle; raises what `vistower.VisionEncoder.open` raises.

        Raises:
            BundleUnsupportedError: the bundle is not of a CLIP vision tower.
            MissingModelPathError: ``model_path`` is None; it is a ``TypeError``.
        """
        _init_next(CLIPMixin, self, kwargs)
        named = {"model_path": CLIP_DEFAULT_MODEL} | kwargs
        self.img_input_size = self._load(CLIPMixin, CLIP, named)


class DINOv3Mixin(_Features):
    """DINOv3 features, after the final norm; register tokens are left out.

    Keywords read: ``model_path`` (required) and ``device`` (default automatic). All keywords go
    on to the next class of the MRO. Sets ``input_image_size`` and ``patch_size`` in pixels,
    ``device`` as it was given, ``processor`` and ``model``; the `VisionEncoder` behind them is
    ``model.encoder``.
    """

    input_image_size: int

    def __init__(self, **kwargs: Any) -> None:
        """Open the model's bundle; raises what `vistower.VisionEncoder.open` raises.

        Raises:
            BundleUnsupportedError: the bundle is not of a DINOv3 tower.
            MissingModelPathError: ``model_path`` is left out or None; it is a ``TypeError``.
        """
        _init_next(DINOv3Mixin, self, kwargs)
        self.input_image_size = self._load(DINOv3Mixin, DINOV3, kwargs)


_MIXINS = {CLIP.model_type: "CLIPMixin", DINOV3.model_type: "DINOv3Mixin"}


def _example(family: Family) -> str:
    """A model that the mixin of a family takes."""
    return family.backbones[0].hub_id


def _max_pixels() -> int | None:
    text = os.environ.get(PIXELS_SETTING)
    if text is not None and not text.isdecimal():
        raise OptionError(f"{PIXELS_SETTING}={text!r} is not a number of pixels, e.g. 50000000.")
    return None if text is None else int(text)


def _init_next(here: type[_Features], instance: _Features, kwargs: dict[str, Any]) -> None:
    """Call the next ``__init__`` of the MRO with every keyword, or with none if it takes none."""
    mro = type(instance).__mro__
    after = mro[mro.index(here) + 1 :]
    following = next(cls for cls in after if "__init__" in vars(cls))
    takes = following is not object and _takes_keywords(following)
    super(here, instance).__init__(**(kwargs if takes else {}))


def _takes_keywords(cls: type) -> bool:
    _self, *others = inspect.signature(vars(cls)["__init__"]).parameters.values()
    return any(p.kind not in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in others)


def _squeezed(tokens: Array) -> Array:
    """``tokens.squeeze(0)`` of torch: without the first dimension where it is 1."""
    return tokens[0] if len(tokens) == 1 else tokens
