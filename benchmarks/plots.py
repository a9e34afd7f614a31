"""A run as pictures."""

from __future__ import annotations

from pathlib import Path

from benchmarks.results import Run


def draw(run: Run, folder: Path, name: str) -> list[Path]:
    """Write the plots and return their paths."""
    return []
