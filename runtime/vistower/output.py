"""What the mixins return: torch tensors to a consumer that has torch, NumPy arrays to others.

The one setting is the environment variable ``VISTOWER_OUTPUT``, read at each call:

- ``auto`` (default): torch tensors if torch is already imported in this process, else NumPy;
- ``torch``: torch tensors; an error if torch is not imported, because vistower never imports it;
- ``numpy``: NumPy arrays.

Tensors share memory with the array they come from. NumPy results are a `FeatureArray`, on which
an unchanged ``features.cpu().numpy()`` works.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from vistower.errors import OutputTypeError

SETTING = "VISTOWER_OUTPUT"


class FeatureArray(np.ndarray[Any, np.dtype[np.float32]]):
    """An array that answers the two calls with which torch code turns a tensor into an array."""

    def cpu(self) -> FeatureArray:
        """Itself: it is in host memory."""
        return self

    def numpy(self) -> npt.NDArray[np.float32]:
        """The same memory as a plain array."""
        return self.view(np.ndarray)


def to_output(features: npt.NDArray[np.float32]) -> Any:
    """Wrap float32 features as the setting says, without a copy.

    Raises:
        OutputTypeError: the setting is ``torch`` and torch is not imported, or it is unknown.
    """
    setting = os.environ.get(SETTING, "auto")
    torch = sys.modules.get("torch")
    if setting == "numpy" or (setting == "auto" and torch is None):
        return features.view(FeatureArray)
    if setting not in ("auto", "torch"):
        raise OutputTypeError(f"{SETTING}={setting!r} is not known. Use auto, torch or numpy.")
    if torch is None:
        raise OutputTypeError(
            f"{SETTING}=torch, but this process has not imported torch and vistower never does. "
            f"Import torch before asking for features, or set {SETTING}=numpy."
        )
    return torch.from_numpy(features)
