"""`CLIPMixin` and `DINOv3Mixin`: drop-in replacements of the torch mixins of the same names.

Each brings a patch-level method, a CLS method, its input size and its patch size; nothing else.
Results are torch tensors or NumPy arrays, see `vistower.output`. They compute in fp32 without TF32,
as the torch mixins do, unless the environment variable ``VISTOWER_PRECISION`` names another of
`vistower.precision`. Both features of one picture cost one forward pass, see `vistower.cache`.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from vistower.cache import FeatureCache
from vistower.encoder import VisionEncoder
from vistower.errors import MaskError, MissingModelPathError
from vistower.output import to_output
from vistower.preprocess.images import ImageInput
from vistower.preprocess.processor import Preprocessor

PRECISION_SETTING = "VISTOWER_PRECISION"
"""Environment variable with the precision of the mixins, for consumers that stay unchanged."""

CLIP_DEFAULT_MODEL = "openai/clip-vit-base-patch32"


class _Features:
    """What the two mixins have in common."""

    device: str
    processor: Preprocessor
    model: VisionEncoder
    patch_size: int
    _feature_cache: FeatureCache

    def _load(self, model_path: str | os.PathLike[str], kwargs: dict[str, Any]) -> int:
        """Open the model's bundle; returns its input size in pixels.

        The size is the bundle's own, which `EMBED_MODEL_RESOLUTION` and the fallbacks of the
        torch mixins only guess from the name.
        """
        device = kwargs.get("device")
        self.model = VisionEncoder.open(
            model_path,
            device="auto" if device is None else device,
            precision=os.environ.get(PRECISION_SETTING, "fp32"),
        )
        self.device = self.model.device
        self.processor = self.model.processor
        self._feature_cache = FeatureCache()
        self.patch_size = self.model.layout.patch_size
        return self.model.layout.image_size[0]

    def get_features(self, image: ImageInput, mask: Any = None) -> Any:
        """Patch tokens (N, D) of one picture, or (mask.sum(), D) with a boolean mask (N,).

        Args:
            image: a PIL image, an H×W×3 uint8 array, or a path.
            mask: NumPy array or torch tensor over the patches, row-major from the top left.

        Raises:
            ImageDecodeError, ImageFormatError: the picture cannot be used.
            MaskError: the mask has another length or is not boolean; it is an ``IndexError``.
        """
        patches = self.model.layout.patches(self._forward(image))[0]
        return to_output(patches if mask is None else patches[_boolean_mask(mask, len(patches))])

    def get_cls_feature(self, image: ImageInput) -> Any:
        """The CLS token (1, D) of one picture.

        Raises:
            ImageDecodeError, ImageFormatError: the picture cannot be used.
        """
        return to_output(self.model.layout.cls(self._forward(image)))

    def _forward(self, image: ImageInput) -> npt.NDArray[np.float32]:
        return self._feature_cache.forward(self.model.preprocess(image), self.model.forward)


class CLIPMixin(_Features):
    """CLIP vision features: raw encoder output, not ``pooler_output``, no projection, no norm.

    Keywords read: ``model_path`` (default ``openai/clip-vit-base-patch32``) and ``device``
    (default automatic). All keywords go on to the next class of the MRO. Sets ``img_input_size``
    and ``patch_size`` in pixels, ``device``, ``processor`` and ``model``.
    """

    img_input_size: int

    def __init__(self, **kwargs: Any) -> None:
        """Open the model's bundle; raises what `vistower.VisionEncoder.open` raises."""
        _init_next(CLIPMixin, self, kwargs)
        self.img_input_size = self._load(kwargs.get("model_path", CLIP_DEFAULT_MODEL), kwargs)


class DINOv3Mixin(_Features):
    """DINOv3 features, after the final norm; register tokens are left out.

    Keywords read: ``model_path`` (required) and ``device`` (default automatic). All keywords go
    on to the next class of the MRO. Sets ``input_image_size`` and ``patch_size`` in pixels,
    ``device``, ``processor`` and ``model``.
    """

    input_image_size: int

    def __init__(self, **kwargs: Any) -> None:
        """Open the model's bundle; raises what `vistower.VisionEncoder.open` raises.

        Raises:
            MissingModelPathError: no ``model_path``; it is a ``TypeError``.
        """
        _init_next(DINOv3Mixin, self, kwargs)
        model_path = kwargs.get("model_path")
        if model_path is None:
            raise MissingModelPathError(
                "DINOv3Mixin needs the keyword model_path: a bundle's directory, a checkpoint's "
                "directory or a hub id such as facebook/dinov3-vitb16-pretrain-lvd1689m."
            )
        self.input_image_size = self._load(model_path, kwargs)


def _init_next(here: type[_Features], instance: _Features, kwargs: dict[str, Any]) -> None:
    """Call the next ``__init__`` of the MRO with every keyword, or ``object``'s with none."""
    mro = type(instance).__mro__
    after = mro[mro.index(here) + 1 :]
    following = next(cls for cls in after if "__init__" in vars(cls))
    super(here, instance).__init__(**({} if following is object else kwargs))


def _boolean_mask(mask: Any, num_patches: int) -> npt.NDArray[np.bool_]:
    # A torch mask may be on a device or part of a graph; NumPy arrays have neither method.
    for method in ("detach", "cpu"):
        if hasattr(mask, method):
            mask = getattr(mask, method)()
    array = np.asarray(mask)
    if array.dtype != np.bool_:
        raise MaskError(
            f"The mask has dtype {array.dtype}, and a patch mask is boolean: pass mask.astype(bool)"
            f" (NumPy) or mask.bool() (torch)."
        )
    if array.shape != (num_patches,):
        raise MaskError(
            f"The mask has shape {array.shape}, and this tower has {num_patches} patches: pass a "
            f"boolean mask of shape ({num_patches},), row-major from the top left."
        )
    return array
