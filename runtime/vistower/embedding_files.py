"""Embeddings on the disk: a .npz, or a .npy with its names beside it.

- ``NAME.npz``: ``names`` (B,) text, and what was asked for of ``cls``, ``pooled`` (B, D),
  ``projected`` (B, P), ``patches`` (B, N, D) and ``registers`` (B, R, D), all float32.
- ``NAME.npy``: one of the vectors alone; ``NAME.names.json`` is a JSON list of the B names, in its
  order. A name may hold line breaks and bytes that are no UTF-8 (as lone surrogates,
  `os.fsdecode`).

They appear whole or not at all, see `vistower.staging`. Only what an earlier call wrote is
replaced.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from vistower.errors import OutputExistsError
from vistower.places import (
    Snapshot,
    as_output_error,
    is_mount_point,
    real_place,
    require_space,
    snapshot,
)
from vistower.staging import Staging, staged

SUFFIXES = (".npz", ".npy")
MARK = b"vistower embed"
"""Comment of the .npz, which says that it may be replaced."""


@dataclass(frozen=True)
class EmbeddingFile:
    """A place for embeddings that can be written; made by `embedding_file`."""

    place: Path
    staging: Staging
    replaced: Mapping[Path, Snapshot]

    def write(
        self,
        names: Sequence[str],
        parts: Mapping[str, npt.NDArray[np.float32]],
    ) -> None:
        """Write and publish the parts of embeddings by name; a .npy takes one vector a picture.

        Raises:
            OutputError: the system refuses, or what is there has changed.
        """
        made = self.staging.path(self.place)
        with as_output_error(self.place):
            if self.place.suffix == ".npy":
                (vectors,) = parts.values()
                _save(made, vectors)
                listed = self.staging.path(names_file(self.place))
                listed.write_text(json.dumps(list(names), indent=0) + "\n", encoding="ascii")
            else:
                texts = np.array(names)
                arrays: dict[str, Any] = {"names": texts, **parts}
                np.savez(made, **arrays)
                with zipfile.ZipFile(made, "a") as archive:
                    archive.comment = MARK
            for output in self.replaced:
                shutil.copymode(output, self.staging.path(output))
        self.staging.publish(self.replaced)


def _save(path: Path, array: npt.NDArray[np.float32]) -> None:
    # numpy.save loses the last 4 KB on a full disk and does not say so: it writes through C's
    # buffer, and ignores what closing it says.
    array = np.ascontiguousarray(array)
    with path.open("wb") as file:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.data)


@contextmanager
def embedding_file(output: Path, size: int) -> Iterator[EmbeddingFile]:
    """Make sure before the work that embeddings can be written.

    Args:
        output: ends in .npz or .npy. Of a link, what it points to is written.
        size: bytes at least.

    Raises:
        OutputExistsError: something else is there.
        OutputError: it cannot be written, or another process is writing it.
    """
    with as_output_error(output):
        place = real_place(output)
        outputs = (place,) if place.suffix == ".npz" else (names_file(place), place)
        replaced = {path: snapshot(path) for path in outputs if os.path.lexists(path)}
        for path in replaced:
            _require_ours(path, place)
    with staged(*outputs) as staging:
        require_space(place, size)
        yield EmbeddingFile(place, staging, replaced)


def names_file(place: Path) -> Path:
    """Where the names of a .npy are."""
    return place.with_suffix(".names.json")


def _require_ours(path: Path, place: Path) -> None:
    if path.is_dir():
        raise OutputExistsError(f"{path} is a folder. Choose another output.")
    if is_mount_point(path):
        raise OutputExistsError(f"{path} is mounted there and cannot be replaced. Choose another.")
    if not path.is_file() or not _is_ours(path, place):
        raise OutputExistsError(
            f"{path} is there, and no embeddings that vistower wrote. It is left as it is: choose "
            f"another output, or move it away."
        )


def _is_ours(path: Path, place: Path) -> bool:
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                return archive.comment == MARK
        if path.suffix == ".npy":
            rows = _rows(path)
            return rows is not None and (rows == _count(names_file(place)))
        return _count(path) is not None
    # Whatever is in the file.
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, RecursionError):
        return False


def _rows(path: Path) -> int | None:
    with path.open("rb") as file:
        shape, _, dtype = _header(file)
    return shape[0] if len(shape) == 2 and dtype == np.float32 else None


def _header(file: IO[bytes]) -> Any:
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"version {version} of .npy")
    return np.lib.format.read_array_header_1_0(file)


def _count(names: Path) -> int | None:
    listed = json.loads(names.read_text(encoding="ascii"))
    texts = isinstance(listed, list) and all(isinstance(name, str) for name in listed)
    return len(listed) if texts else None
