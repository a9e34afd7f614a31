"""The gate: no bundle without a passed comparison against torch, from image file to tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vistower.bundle.manifest import Parity, TokenParity
from vistower.errors import ParityError
from vistower.tokens import TokenLayout
from vistower.tolerance import PIXEL_TOLERANCE, Tolerance

Array = npt.NDArray[np.float32]


ON_CPU = "ONNX Runtime, CPUExecutionProvider"
"""The usual ``method`` of a `Parity`."""

_LARGEST_OF_8_BITS = 8
"""Above any normalized pixel of a picture with eight bits a channel."""


def compare(
    reference: Mapping[str, Array],
    candidate: Mapping[str, Array],
    layout: TokenLayout,
    method: str = ON_CPU,
) -> Parity:
    """Compare ``last_hidden_state`` (1, T, D) per picture; the worst token of all counts.

    Non-finite values anywhere give infinite differences and cosine -1.
    """
    differences, cosines, norms = [], [], []
    for name, expected in reference.items():
        want = expected.astype(np.float64)[0]
        have = candidate[name].astype(np.float64)[0]
        if want.shape != have.shape or not (np.isfinite(have).all() and np.isfinite(want).all()):
            lost = TokenParity(np.inf, -1.0, -1.0)
            return Parity(np.inf, np.inf, -1.0, lost, lost, 0.0, tuple(reference), method)
        norm = np.linalg.norm(want, axis=-1)
        norms.append(norm)
        differences.append(np.abs(have - want).max(axis=-1))
        cosines.append((want * have).sum(-1) / (norm * np.linalg.norm(have, axis=-1)))
    difference, cosine, norm = np.stack(differences), np.stack(cosines), np.stack(norms)
    return Parity(
        max_abs=float(difference.max()),
        max_rel=float((difference / norm).max()),
        cosine=float(cosine.min()),
        cls=_of(layout.cls(difference), layout.cls(cosine)),
        patches=_of(layout.patches(difference), layout.patches(cosine)),
        token_norm=float(norm.mean()),
        images=tuple(reference),
        method=method,
    )


def _of(difference: npt.NDArray[Any], cosine: npt.NDArray[Any]) -> TokenParity:
    return TokenParity(float(difference.max()), float(cosine.min()), float(cosine.mean()))


def passes(parity: Parity, tolerance: Tolerance) -> bool:
    """Whether a graph is as near to torch as its precision must be."""
    return parity.max_rel <= tolerance.max_rel and parity.cosine >= tolerance.cosine


def require_parity(graph: str, parity: Parity, tolerance: Tolerance) -> None:
    """Let a graph pass, or stop the export.

    Raises:
        ParityError: with the figures.
    """
    if passes(parity, tolerance):
        return
    raise ParityError(
        f"The {graph} graph disagrees with torch over {len(parity.images)} pictures: largest "
        f"difference {parity.max_abs:.3g} absolute, {parity.max_rel:.3g} of the token norm "
        f"(allowed {tolerance.max_rel:.3g}), smallest cosine {parity.cosine:.7f} (required "
        f"{tolerance.cosine}). No bundle was written. Leave this precision out, or report the "
        f"checkpoint."
    )


def require_same_pixels(reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> float:
    """The largest difference of normalized pixels over all pictures.

    Raises:
        ParityError: at the first picture where it is above the tolerance, which is named.
    """
    worst = 0.0
    for name, expected in reference.items():
        have = candidate[name]
        if have.shape != expected.shape:
            raise ParityError(
                f"The Hugging Face processor makes {expected.shape} of {name} and the NumPy "
                f"preprocessing {have.shape}. No bundle was written. Please report the "
                f"checkpoint's preprocessor_config.json."
            )
        # Of sixteen bits pixels go into the hundreds, and float32 has fewer digits left.
        scale = max(1.0, float(np.abs(expected).max()) / _LARGEST_OF_8_BITS)
        difference = float(np.abs(have - expected).max()) / scale
        if not difference <= PIXEL_TOLERANCE:
            raise ParityError(
                f"The NumPy preprocessing differs from the Hugging Face processor by "
                f"{difference:.3g} on {name} (allowed {PIXEL_TOLERANCE:.3g}). No bundle was "
                f"written. Please report the checkpoint's preprocessor_config.json."
            )
        worst = max(worst, difference)
    return worst
