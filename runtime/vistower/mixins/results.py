"""What the mixins return: torch tensors to a consumer that has torch, NumPy arrays to others.

The one setting is the environment variable ``VISTOWER_OUTPUT``, read at each call:

- ``auto`` (default): torch tensors if torch is already imported in this process, else NumPy;
- ``torch``: torch tensors; an error if torch is not imported, because vistower never imports it;
- ``numpy``: NumPy arrays.

Tensors share memory with the array they come from. NumPy results are a `FeatureArray`, on which
the calls work that unchanged code makes on a tensor before it hands it to NumPy.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from vistower.errors import OutputTypeError, TorchOnlyError
from vistower.mixins.devices import in_host_memory, is_dtype, numpy_dtype

SETTING = "VISTOWER_OUTPUT"


class FeatureArray(np.ndarray[Any, np.dtype[Any]]):
    """A NumPy array that also answers what torch code asks of a tensor on its way to NumPy.

    Arithmetic, indexing and every NumPy function work as on any array. Methods that NumPy and
    torch both have are NumPy's, except for `squeeze`.
    """

    def cpu(self) -> FeatureArray:
        """Itself: it is in host memory."""
        return self

    def detach(self) -> FeatureArray:
        """Itself: nothing here records gradients."""
        return self

    def contiguous(self) -> FeatureArray:
        """Itself, or a copy in C order."""
        return np.ascontiguousarray(self).view(FeatureArray)

    def clone(self) -> FeatureArray:
        """A copy."""
        return self.copy()

    def float(self) -> FeatureArray:
        """As float32."""
        return cast("FeatureArray", self.astype(np.float32, copy=False))

    def to(self, *args: Any, **kwargs: Any) -> FeatureArray:
        """Itself, or a copy of another dtype; the device can only be host memory.

        Raises:
            TorchOnlyError: another device.
        """
        result = self
        for value in (*args, kwargs.get("device"), kwargs.get("dtype")):
            if value is None or isinstance(value, bool):
                continue
            if is_dtype(value):
                result = result.astype(numpy_dtype(value), copy=False).view(FeatureArray)
            elif not in_host_memory(value):
                raise TorchOnlyError(
                    f"This is a NumPy array, and cannot go to {value!r}: torch is not imported "
                    f"in this process. Import torch first, and the mixins return tensors."
                )
        return result

    def numpy(self) -> npt.NDArray[Any]:
        """The same memory as a plain array."""
        return self.view(np.ndarray)

    def dim(self) -> int:
        """The number of dimensions."""
        return self.ndim

    def t(self) -> FeatureArray:
        """The transpose of at most two dimensions."""
        if self.ndim > 2:
            raise TorchOnlyError(f"t() takes at most 2 dimensions, and this has {self.ndim}.")
        return self.T

    def norm(self, p: Any = 2, dim: Any = None, keepdim: bool = False) -> FeatureArray:
        """The vector p-norm of all values, or along a dimension."""
        order = 2 if p in (None, "fro") else p
        values = self.numpy() if dim is not None else self.numpy().reshape(-1)
        value = np.linalg.norm(values, ord=order, axis=-1 if dim is None else dim, keepdims=keepdim)
        if dim is None and keepdim:
            value = value.reshape((1,) * self.ndim)
        return np.asarray(value, self.dtype).view(FeatureArray)

    def squeeze(self, axis: Any = None, *, dim: Any = None) -> FeatureArray:
        """Without its dimensions of length 1: all, or those given, by NumPy's or torch's name.

        As torch's and unlike NumPy's, it leaves longer ones as they are.
        """
        given = axis if dim is None else dim
        if given is not None:
            several = (given,) if isinstance(given, int) else given
            given = tuple(one for one in several if self.shape[one] == 1)
        return cast("FeatureArray", super().squeeze(given))

    def unsqueeze(self, dim: int) -> FeatureArray:
        """With a dimension of length 1 more."""
        return cast("FeatureArray", np.expand_dims(self, dim))


def imported_torch() -> ModuleType | None:
    """The torch module, if this process has imported it; never imported here."""
    torch = sys.modules.get("torch")
    # While another thread is importing it, it is there without its functions.
    return torch if hasattr(torch, "from_numpy") else None


def to_output(array: npt.NDArray[Any]) -> Any:
    """Wrap an array as the setting says, without a copy.

    Raises:
        OutputTypeError: the setting is ``torch`` and torch is not imported, or it is unknown.
    """
    setting = os.environ.get(SETTING, "auto")
    torch = imported_torch()
    if setting == "numpy" or (setting == "auto" and torch is None):
        return array.view(FeatureArray)
    if setting not in ("auto", "torch"):
        raise OutputTypeError(f"{SETTING}={setting!r} is not known. Use auto, torch or numpy.")
    if torch is None:
        raise OutputTypeError(
            f"{SETTING}=torch, but this process has not imported torch and vistower never does. "
            f"Import torch before asking for features, or set {SETTING}=numpy."
        )
    return torch.from_numpy(array)
