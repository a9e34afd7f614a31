"""How far a graph of each precision may be from torch + transformers in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

GraphPrecision = Literal["fp32", "fp16", "bf16", "int8"]

PIXEL_TOLERANCE = 1e-4
"""Largest difference of normalized pixels, for every precision."""


@dataclass(frozen=True)
class Tolerance:
    """Limits on tokens.

    ``max_rel`` is the largest difference of a value over the L2 norm of its token, ``cosine`` the
    smallest cosine of a token with torch's.
    """

    max_rel: float
    cosine: float


TOLERANCES: Mapping[GraphPrecision, Tolerance] = {
    "fp32": Tolerance(max_rel=1e-4, cosine=0.99999),
    "fp16": Tolerance(max_rel=5e-3, cosine=0.9999),
    "bf16": Tolerance(max_rel=2e-2, cosine=0.999),
    "int8": Tolerance(max_rel=5e-2, cosine=0.999),
}
"""Per precision of a graph."""
