"""The gate: no bundle without a passed comparison against torch, from image file to every
output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vistower.bundle.manifest import Parity, TokenParity, VectorParity
from vistower.errors import ParityError
from vistower.families.record import LAST_HIDDEN_STATE
from vistower.tokens import TokenLayout
from vistower.tolerance import PIXEL_TOLERANCE, Tolerance

Array = npt.NDArray[np.float32]
Outputs: TypeAlias = Mapping[str, Mapping[str, Array]]
"""Name of an output → name of a picture → its values (1, ...)."""


ON_CPU = "ONNX Runtime, CPUExecutionProvider"
"""The usual ``method`` of a `Parity`."""

_LARGEST_OF_8_BITS = 8
"""Above any normalized pixel of a picture with eight bits a channel."""


def compare(
    reference: Outputs,
    candidate: Outputs,
    layout: TokenLayout,
    method: str = ON_CPU,
) -> Parity:
    """Compare every output of every picture with torch's; the worst token or vector counts.

    Non-finite values anywhere give infinite differences and cosine -1. What one side lacks is
    refused by `require_same_outputs`.
    """
    tokens = _measured(reference[LAST_HIDDEN_STATE], candidate[LAST_HIDDEN_STATE])
    return Parity(
        max_abs=float(tokens.difference.max()),
        max_rel=float((tokens.difference / tokens.norm).max()),
        cosine=float(tokens.cosine.min()),
        cls=_of(layout.cls(tokens.difference), layout.cls(tokens.cosine))
        if layout.num_cls_tokens
        else None,
        patches=_of(layout.patches(tokens.difference), layout.patches(tokens.cosine)),
        token_norm=float(tokens.mean_norm),
        images=tuple(reference[LAST_HIDDEN_STATE]),
        method=method,
        vectors={
            name: _vectors(_measured(reference[name], candidate[name]))
            for name in reference
            if name != LAST_HIDDEN_STATE
        },
    )


@dataclass(frozen=True)
class _Measured:
    """Largest difference, cosine and torch's norm of every token (pictures, T), or vector."""

    difference: npt.NDArray[np.float64]
    cosine: npt.NDArray[np.float64]
    norm: npt.NDArray[np.float64]

    @property
    def mean_norm(self) -> np.float64:
        return np.float64(self.norm.mean() if np.isfinite(self.difference).all() else 0.0)


def _measured(reference: Mapping[str, Array], candidate: Mapping[str, Array]) -> _Measured:
    differences, cosines, norms = [], [], []
    for name, expected in reference.items():
        want = expected.astype(np.float64)[0]
        have = candidate[name].astype(np.float64)[0]
        norm = np.linalg.norm(want, axis=-1)
        if want.shape != have.shape or not (np.isfinite(have).all() and np.isfinite(want).all()):
            differences.append(np.full(norm.shape, np.inf))
            cosines.append(np.full(norm.shape, -1.0))
            norms.append(np.ones(norm.shape))
            continue
        norms.append(norm)
        differences.append(np.abs(have - want).max(axis=-1))
        cosines.append((want * have).sum(-1) / (norm * np.linalg.norm(have, axis=-1)))
    return _Measured(np.stack(differences), np.stack(cosines), np.stack(norms))


def _vectors(found: _Measured) -> VectorParity:
    return VectorParity(
        max_abs=float(found.difference.max()),
        max_rel=float((found.difference / found.norm).max()),
        cosine=float(found.cosine.min()),
        cosine_mean=float(found.cosine.mean()),
        norm=float(found.mean_norm),
    )


def _of(difference: npt.NDArray[Any], cosine: npt.NDArray[Any]) -> TokenParity:
    return TokenParity(float(difference.max()), float(cosine.min()), float(cosine.mean()))


def passes(parity: Parity, tolerance: Tolerance) -> bool:
    """Whether every output of a graph is as near to torch as its precision must be."""
    return all(
        one.max_rel <= tolerance.max_rel and one.cosine >= tolerance.cosine
        for one in parity.compared.values()
    )


def require_parity(graph: str, parity: Parity, tolerance: Tolerance) -> None:
    """Let a graph pass, or stop the export.

    Raises:
        ParityError: with the figures.
    """
    if passes(parity, tolerance):
        return
    name, worst = max(parity.compared.items(), key=lambda item: (item[1].max_rel, -item[1].cosine))
    raise ParityError(
        f"{name} of the {graph} graph disagrees with torch over {len(parity.images)} pictures: "
        f"largest difference {worst.max_abs:.3g} absolute, {worst.max_rel:.3g} of the norm "
        f"(allowed {tolerance.max_rel:.3g}), smallest cosine {worst.cosine:.7f} (required "
        f"{tolerance.cosine}). No bundle was written. Leave this precision out, or report the "
        f"checkpoint."
    )


def require_same_outputs(graph: str, reference: Outputs, candidate: Outputs) -> None:
    """Refuse a graph with other outputs than torch has.

    Raises:
        ParityError: see there.
    """
    if reference.keys() != candidate.keys():
        raise ParityError(
            f"The {graph} graph has the outputs {', '.join(candidate)}, and torch gives "
            f"{', '.join(reference)}. No bundle was written. Please report the checkpoint."
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
