"""Arrays and torch tensors as pictures: which axis holds the channels, and how they become RGB.

torch is not imported: a caller who passes a tensor has it imported already.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

from vistower.errors import ImageFormatError

Array: TypeAlias = npt.NDArray[Any]


class Tensor(Protocol):
    """A torch tensor, for type checkers; `is_tensor` looks at the real type."""

    ndim: int

    def detach(self) -> Any:
        """Without its graph."""

    def cpu(self) -> Any:
        """In the host's memory."""


def is_tensor(value: object) -> bool:
    """Whether it is a torch tensor."""
    torch = sys.modules.get("torch")
    tensor = getattr(torch, "Tensor", None)
    return tensor is not None and isinstance(value, tensor)


def is_array(value: object) -> TypeGuard[Array]:
    """Whether it is a NumPy array or a torch tensor: a picture, or with four axes several."""
    return isinstance(value, np.ndarray) or is_tensor(value)


def as_array(value: Any) -> Array:
    """The numbers of an array or a tensor; a copy where they are on a device or byte-swapped.

    Raises:
        ImageFormatError: NumPy has no such dtype (bfloat16).
    """
    if isinstance(value, np.ndarray):
        return np.asarray(value, value.dtype.newbyteorder("="))
    try:
        array: Array = value.detach().cpu().numpy()
    except (TypeError, RuntimeError) as error:
        raise ImageFormatError(
            f"A tensor of {value.dtype} cannot be read by NumPy ({error}). Pass tensor.float()."
        ) from error
    return array


def channels_last(array: Array, counts: tuple[int, ...]) -> Array:
    """(H, W, C) of an array with three axes, the first or last of which has one of some lengths.

    Where both have, the first one holds the channels: so transformers decides
    (``infer_channel_dimension_format``), also about an H x W x 3 picture that is 3 pixels high.

    Raises:
        ImageFormatError: neither has.
    """
    if array.shape[0] in counts:
        return array.transpose(1, 2, 0)
    if array.shape[2] in counts:
        return array
    raise ImageFormatError(
        f"An array of shape {array.shape} is no picture here: its first or last axis must hold "
        f"{' or '.join(map(str, counts))} channels. Pass H x W x 3 or 3 x H x W (RGB)."
    )


def as_rgb(array: Array, *, like_torchvision: bool) -> Array:
    """(H, W, 3) of (H, W, 1, 3 or 4), as transformers 5 converts arrays; alpha is blended on white.

    ``convert_to_rgb`` of the two backends in ``transformers/image_processing_backends.py``.

    Raises:
        ImageFormatError: floats with alpha outside 0..1.
    """
    if array.shape[2] == 1:
        return np.broadcast_to(array, (*array.shape[:2], 3))
    if array.shape[2] == 3 or not array.size:
        return array
    if array.dtype.kind == "f" and not (array.min() >= 0 and array.max() <= 1):
        raise ImageFormatError(
            f"An array of {array.dtype} with an alpha channel must be in 0..1, and this one has "
            f"{array.min()} to {array.max()}. Pass uint8."
        )
    return _on_white_torchvision(array) if like_torchvision else _on_white_pillow(array)


def _on_white_torchvision(array: Array) -> Array:
    """Blends in float32, and cuts to levels as torchvision's ``to_dtype`` does: x * 255.999."""
    levels = array.dtype == np.uint8
    unit = array.astype(np.float32)
    if levels:
        unit *= np.float32(1 / 255)
    alpha = unit[:, :, 3:]
    blended: Array = unit[:, :, :3] * alpha + (1 - alpha)
    if levels:
        return (blended * np.float32(255 + 1.0 - 1e-3)).astype(np.uint8)
    return blended.astype(array.dtype)


def _on_white_pillow(array: Array) -> Array:
    white = 255 if array.dtype.kind in "iu" else 1.0
    alpha = array[:, :, 3:] / white
    blended: Array = alpha * array[:, :, :3] + (1 - alpha) * white
    return (np.round(blended) if white == 255 else blended).astype(array.dtype)
