"""The gate: no bundle without a passed comparison against torch, from image file to tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vistower.errors import ParityError
from vistower.manifest import Parity
from vistower.tokens import TokenLayout

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Tolerance:
    """How far a graph may be from torch.

    ``max_rel`` is the largest difference over the L2 norm of its token, ``cosine`` the smallest
    cosine of a token, ``pixels`` the largest difference of normalized pixels.
    """

    max_rel: float
    cosine: float
    pixels: float


TOLERANCES: Mapping[str, Tolerance] = {
    "fp32": Tolerance(max_rel=1e-4, cosine=0.99999, pixels=1e-4),
}
"""Per precision of a graph."""


def compare(
    reference: Mapping[str, Array], candidate: Mapping[str, Array], layout: TokenLayout
) -> Parity:
    """Compare ``last_hidden_state`` (1, T, D) per picture; the worst token of all counts.

    Non-finite values anywhere give infinite differences and cosine -1.
    """
    max_abs = max_rel = 0.0
    cosine = cosine_cls = 1.0
    norms = []
    for name, expected in reference.items():
        want = expected.astype(np.float64)[0]
        have = candidate[name].astype(np.float64)[0]
        if want.shape != have.shape or not (np.isfinite(have).all() and np.isfinite(want).all()):
            return Parity(np.inf, np.inf, -1.0, -1.0, 0.0, tuple(reference))
        difference = np.abs(have - want)
        norm = np.linalg.norm(want, axis=-1)
        norms.append(norm.mean())
        cosines = (want * have).sum(-1) / (norm * np.linalg.norm(have, axis=-1))
        max_abs = max(max_abs, float(difference.max()))
        max_rel = max(max_rel, float((difference.max(-1) / norm).max()))
        cosine = min(cosine, float(cosines.min()))
        cosine_cls = min(cosine_cls, float(layout.cls(cosines[None])[0]))
    return Parity(
        max_abs=max_abs,
        max_rel=max_rel,
        cosine=cosine,
        cosine_cls=cosine_cls,
        token_norm=float(np.mean(norms)),
        images=tuple(reference),
    )


def require_parity(graph: str, parity: Parity, tolerance: Tolerance) -> None:
    """Let a graph pass, or stop the export.

    Raises:
        ParityError: with the figures.
    """
    if parity.max_rel <= tolerance.max_rel and parity.cosine >= tolerance.cosine:
        return
    raise ParityError(
        f"The {graph} graph disagrees with torch over {len(parity.images)} pictures: largest "
        f"difference {parity.max_abs:.3g} absolute, {parity.max_rel:.3g} of the token norm "
        f"(allowed {tolerance.max_rel:.3g}), smallest cosine {parity.cosine:.7f} (required "
        f"{tolerance.cosine}). No bundle was written. Please report the checkpoint."
    )


def require_same_pixels(
    reference: Mapping[str, Array], candidate: Mapping[str, Array], tolerance: Tolerance
) -> float:
    """The largest difference of normalized pixels over all pictures.

    Raises:
        ParityError: it is above the tolerance; naming the picture.
    """
    worst, where = 0.0, ""
    for name, expected in reference.items():
        difference = float(np.abs(candidate[name] - expected).max())
        if not difference <= worst:
            worst, where = difference, name
    if worst <= tolerance.pixels:
        return worst
    raise ParityError(
        f"The NumPy preprocessing differs from the Hugging Face processor by {worst:.3g} on "
        f"{where} (allowed {tolerance.pixels:.3g}). No bundle was written. Please report the "
        f"checkpoint's preprocessor_config.json."
    )
