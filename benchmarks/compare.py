"""How far a backend's numbers are from torch's, and how far they may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Agreement:
    """The smallest cosine of a token and of a CLS token, the largest difference, and the verdict.

    ``max_rel`` is the largest difference over the L2 norm of its token.
    """

    cosine: float
    cosine_cls: float
    max_abs: float
    max_rel: float
    agrees: bool


SMALLEST_COSINE: Mapping[str, float] = {
    "fp32": 0.99999,
    "tf32": 0.9999,
    "bf16": 0.999,
    "fp16": 0.999,
    "int8": 0.999,
}
"""Per precision. float32 must also stay within `LARGEST_REL`."""

LARGEST_REL = 1e-4
"""For float32: the export gate's own tolerance."""


def compare(have: Array, want: Array, precision: str) -> Agreement:
    """Compare (B, T, D) or (B, D) with torch's; the worst row of all counts."""
    if have.shape != want.shape or not np.isfinite(have).all():
        return Agreement(-1.0, -1.0, float("inf"), float("inf"), agrees=False)
    have64, want64 = have.astype(np.float64), want.astype(np.float64)
    norm = np.linalg.norm(want64, axis=-1)
    cosine = (have64 * want64).sum(-1) / (norm * np.linalg.norm(have64, axis=-1))
    difference = np.abs(have64 - want64).max(-1)
    smallest, largest = float(cosine.min()), float((difference / norm).max())
    limit = LARGEST_REL if precision == "fp32" else float("inf")
    return Agreement(
        cosine=smallest,
        cosine_cls=float((cosine if cosine.ndim == 1 else cosine[:, 0]).min()),
        max_abs=float(difference.max()),
        max_rel=largest,
        agrees=smallest >= SMALLEST_COSINE[precision] and largest <= limit,
    )
