"""``embeddings[mask, :]`` as torch indexes, also where torch is not there.

A mask is boolean, over the first dimension, or an index, several indexes or a slice. Where torch
is imported, torch itself indexes, with its oddities: uint8 is boolean, floats in a NumPy array or
a list are cut to whole indexes, a slice steps forward only. Where it is not, NumPy indexes by the
same rules.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vistower.errors import MaskError
from vistower.mixins.results import imported_torch

Array = npt.NDArray[np.float32]


def indexed(embeddings: Array, mask: Any) -> Array:
    """``embeddings[mask, :]`` of (N, D) or (B, N, D).

    Raises:
        MaskError: it does not index them; it is an ``IndexError``.
    """
    torch = imported_torch()
    try:
        if torch is None:
            rows: Array = embeddings[_numpy_index(mask), :]
        else:
            if hasattr(mask, "detach"):  # The tokens are in host memory.
                mask = mask.detach().cpu()
            rows = torch.from_numpy(embeddings)[mask, :].numpy()
    except (IndexError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        first = embeddings.shape[0]
        over = "patches" if embeddings.ndim == 2 else "pictures of the list"
        raise MaskError(
            f"{_described(mask)} does not index embeddings of shape {embeddings.shape}: {error}. "
            f"Pass a boolean mask of shape ({first},), over the {over}"
            + (", row-major from the top left" if embeddings.ndim == 2 else "")
            + f", or indexes from {-first} to {first - 1}."
        ) from error
    return rows


def _numpy_index(mask: Any) -> Any:
    """What NumPy takes for what torch takes."""
    if isinstance(mask, slice):
        if mask.step is not None and mask.step <= 0:
            raise ValueError("step must be greater than zero")
        return mask
    if mask is Ellipsis or isinstance(mask, (int, np.integer)):
        return mask
    array = np.asarray(mask)
    whole = array.dtype.kind in "biu"
    if not whole and array.dtype.kind != "f":
        raise TypeError(f"a {type(mask).__name__} of {array.dtype} is no index")
    if array.ndim == 0 and not isinstance(mask, np.ndarray):
        raise TypeError(f"a {type(mask).__name__} is no index")
    if array.dtype == np.uint8:
        return array.astype(np.bool_)
    return array if whole else array.astype(np.int64)


def _described(mask: Any) -> str:
    shape, dtype = getattr(mask, "shape", None), getattr(mask, "dtype", None)
    if shape is not None and dtype is not None:
        return f"A mask of shape {tuple(shape)} and dtype {dtype}"
    text = repr(mask)
    return f"The mask {text if len(text) <= 60 else text[:57] + '...'}"
