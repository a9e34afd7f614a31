"""Picture files from files, folders and glob patterns."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from vistower.errors import EmptyInputError, ImageDecodeError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""File name endings taken for pictures when a folder is searched."""


def collect(sources: Iterable[str]) -> list[Path]:
    """Files as they are; folders searched for pictures, sorted; glob patterns, sorted.

    Raises:
        EmptyInputError: a folder or pattern has no picture.
        ImageDecodeError: a file does not exist.
    """
    paths: list[Path] = []
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            if not found:
                raise EmptyInputError(
                    f"The folder {path} has no picture (looked for {', '.join(sorted(SUFFIXES))})."
                )
        elif path.is_file():
            found = [path]
        elif glob.has_magic(source):
            found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207
            if not found:
                raise EmptyInputError(f"The pattern {source!r} matches no file.")
        else:
            raise ImageDecodeError(f"{path} does not exist. Give picture files, folders or globs.")
        paths += found
    return paths
