"""The guard of the outputs: NaN or infinity never reach a caller unnoticed.

fp16 ends at 65504, so an activation of a large tower can overflow to infinity, and NaN follows. In
float32 they come from damaged weights, or from pixel values that hold them already.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from vistower.bundle import BundleGraph
from vistower.errors import NonFiniteError
from vistower.execution.binding import Wanted
from vistower.execution.device import Device
from vistower.execution.session import Session

logger = logging.getLogger("vistower")

Array = npt.NDArray[np.float32]


def all_finite(tokens: npt.NDArray[np.float32]) -> bool:
    """Whether no value is NaN or infinite.

    One sum, in which either would show, is much cheaper than a comparison of every value; only a
    sum that is itself not finite needs the comparison.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(tokens.sum()):
            return True
    return bool(np.isfinite(tokens).all())


class FiniteGuard:
    """Checks what `Session.compute` gave; computes the batch again in fp32 where that is chosen."""

    def __init__(
        self, what: str, fp32: BundleGraph | None, device: Device, *, reduced: bool
    ) -> None:
        """Set up the guard.

        Args:
            what: the graph and its precision, for messages.
            fp32: the fp32 graph of the same input, opened at the first need; None to raise.
            device: where to open it.
            reduced: whether the graph's precision can overflow by itself.
        """
        self._what = what
        self._graph = fp32
        self._device = device
        self._reduced = reduced
        self._fp32: Session | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _guard, (self._what, self._graph, self._device, self._reduced)

    def checked(
        self, found: dict[str, Array], wanted: Wanted, pixel_values: npt.NDArray[Any]
    ) -> dict[str, Array]:
        """The outputs themselves, or those of the fp32 graph.

        Raises:
            NonFiniteError: NaN or infinity, and no fp32 graph was given, or it gives them too.
        """
        if all(all_finite(values) for values in found.values()):
            return found
        bad = np.flatnonzero(
            ~np.all(
                [
                    np.isfinite(values).reshape(len(values), -1).all(axis=1)
                    for values in found.values()
                ],
                axis=0,
            )
        )
        text = f"{self._what} gave NaN or infinity for {len(bad)} of {len(pixel_values)} pictures"
        if not self._reduced:
            given = len(pixel_values) - int(np.isfinite(pixel_values).all(axis=(1, 2, 3)).sum())
            raise NonFiniteError(
                f"{text}; {given} of the pixel_values hold some. Where none does the weights are "
                f"damaged: check the bundle with `vistower verify`."
            )
        if self._graph is None:
            raise NonFiniteError(
                f"{text}. Use precision='fp32' or 'bf16', or non_finite='fp32' to compute such "
                f"batches again in fp32."
            )
        logger.warning("%s; they are computed again in fp32.", text)
        with self._lock:
            if self._fp32 is None:
                self._fp32 = Session(self._graph, str(self._device))
        again = self._fp32.compute(pixel_values[bad], wanted)
        if not all(all_finite(values) for values in again.values()):
            raise NonFiniteError(f"{text}, and the fp32 graph too: the weights are damaged.")
        for name, values in found.items():
            values[bad] = again[name]
        return found


def _guard(what: str, fp32: BundleGraph | None, device: Device, reduced: bool) -> FiniteGuard:
    return FiniteGuard(what, fp32, device, reduced=reduced)
