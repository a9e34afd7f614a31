"""What the exporter needs beside the runtime: the extra ``export``, in the releases it names."""

from __future__ import annotations

import importlib.metadata

from vistower.errors import MissingExtraError

EXTRA = "export"


def require_exporter() -> None:
    """Check that everything the extra names is installed, before any of it is imported.

    Raises:
        MissingExtraError: a package is missing, or of a release the extra does not admit.
    """
    try:
        from packaging.requirements import Requirement
    except ImportError:  # It comes with transformers and with ONNX Runtime.
        raise MissingExtraError(_text("packaging is not installed")) from None
    wrong = []
    for line in importlib.metadata.requires("vistower") or ():
        needed = Requirement(line)
        if needed.marker is None or not needed.marker.evaluate({"extra": EXTRA}):
            continue
        try:
            found = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            # The command line and the resize library are the runtime's own affair.
            if needed.name not in _OF_THE_RUNTIME:
                wrong.append(f"{needed.name} is not installed")
            continue
        if not needed.specifier.contains(found, prereleases=True):
            wrong.append(f"{needed.name} {found} is installed, and it needs {needed.specifier}")
    if wrong:
        raise MissingExtraError(_text("; ".join(wrong)))


_OF_THE_RUNTIME = frozenset({"cykooz-resizer", "onnxruntime", "rich", "typer"})
"""Also part of ``export``; other wheels than ``onnxruntime`` bring ONNX Runtime too."""


def _text(what: str) -> str:
    return (
        f"Exporting is not possible here: {what}. Install the exporter with pip install "
        f"'vistower[{EXTRA}]', in an environment of its own where this one's releases are pinned. "
        f"Running a bundle needs none of it."
    )
