"""Reads ``golden/golden.npz`` without trusting it: its arrays have known shapes, or it is refused.

A ``.npz`` is a zip of ``.npy`` files, and each of both layers can claim any size. Nothing is
unpacked before its claims are compared with what the bundle's manifest says and with the
bytes that are there; compression, which ``numpy.savez`` does not use, is refused.
"""

from __future__ import annotations

import os
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from vistower.bundle.reading import open_regular
from vistower.errors import BundleCorruptError
from vistower.families.record import OUTPUTS

MOST_PICTURES = 256
"""Golden pictures of a bundle, all resolutions together; an export writes three and one each."""

PIXELS = "pixel_values"

_MOST_ARRAYS = (1 + len(OUTPUTS)) * MOST_PICTURES

_KEY = re.compile(r"(?P<picture>[\w.-]{1,64})@(?P<height>\d{1,5})x(?P<width>\d{1,5})")
_HEADER = re.compile(
    rb"\{'descr': '<f4', 'fortran_order': False, 'shape': \((\d{1,9}(?:, \d{1,9}){1,3}),?\), \} *\n"
)
_NPY = b"\x93NUMPY\x01\x00"
_END = struct.Struct("<4s4H2LH")
"""The end record of a zip: signature, four counts, size and offset of its directory, comment."""

_LONGEST_ENTRY = 256
"""Bytes of an entry of the zip's directory."""

Array = npt.NDArray[np.float32]

Shapes: TypeAlias = Mapping[tuple[int, int], Mapping[str, tuple[int, ...]]]
"""(height, width) in pixels → output → shape without the batch."""


@dataclass(frozen=True)
class GoldenPicture:
    """What torch + transformers gave for a picture at one (height, width) in pixels.

    ``name`` is ``PICTURE@HxW``; the picture's file is ``golden/PICTURE.png``.
    """

    name: str
    picture: str
    resolution: tuple[int, int]


class GoldenFile:
    """An open ``golden.npz``; arrays are read when they are asked for."""

    def __init__(self, path: Path, shapes: Shapes) -> None:
        """Open it and check what it claims.

        Args:
            path: the file.
            shapes: of the outputs of every graph, by resolution.

        Raises:
            BundleCorruptError: it is not what an export writes, or has nothing for a resolution.
        """
        self._path = path
        self._shapes = {
            resolution: {PIXELS: (3, *resolution), **outputs}
            for resolution, outputs in shapes.items()
        }
        file = os.fdopen(open_regular(path), "rb")
        try:
            _check_end(file, path)
            self._zip = zipfile.ZipFile(file)
            self.pictures = tuple(self._checked())
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            file.close()
            raise self._wrong(str(error)) from error
        except BaseException:
            file.close()
            raise
        self._file = file

    def __enter__(self) -> GoldenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()
        self._file.close()

    def pixel_values(self, picture: GoldenPicture) -> Array:
        """(3, H, W), float32."""
        return self.output(picture, PIXELS)

    def output(self, picture: GoldenPicture, name: str) -> Array:
        """An output of the graphs for a picture, (T, D) or (D,), float32."""
        return self._array(f"{picture.name}/{name}", self._shapes[picture.resolution][name])

    def _wrong(self, what: str) -> BundleCorruptError:
        return BundleCorruptError(
            f"{self._path} holds no golden vectors of this bundle: {what}. Export the bundle again."
        )

    def _checked(self) -> Iterator[GoldenPicture]:
        entries = self._zip.infolist()
        names = {entry.filename for entry in entries}
        if len(names) != len(entries):
            raise self._wrong("an array comes twice")
        size = os.fstat(self._zip.fp.fileno()).st_size if self._zip.fp is not None else 0
        if sum(entry.file_size for entry in entries) > size or any(
            entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size
            for entry in entries
        ):
            raise self._wrong("it is compressed, or claims more than it holds")
        found: dict[str, GoldenPicture] = {}
        for name in sorted(names):
            key, _, file = name.partition("/")
            match = _KEY.fullmatch(key)
            kind = file.removesuffix(".npy")
            if match is None or file == kind or kind not in (PIXELS, *OUTPUTS):
                raise self._wrong(f"{name!r} is no array of it")
            resolution = int(match["height"]), int(match["width"])
            if resolution not in self._shapes:
                raise self._wrong(f"{name!r} is of no resolution of the bundle's graphs")
            if kind not in self._shapes[resolution]:
                raise self._wrong(f"{name!r} is of no output of the bundle's graphs")
            found[key] = GoldenPicture(key, match["picture"], resolution)
        for key, one in found.items():
            for kind in self._shapes[one.resolution]:
                if f"{key}/{kind}.npy" not in names:
                    raise self._wrong(f"of {key!r} {kind} is missing")
        for height, width in self._shapes.keys() - {one.resolution for one in found.values()}:
            raise self._wrong(f"there are none for {height}x{width} pixels")
        yield from found.values()

    def _array(self, name: str, shape: tuple[int, ...]) -> Array:
        """An array that is stored with a batch dimension of 1 in front."""
        size = 4 * int(np.prod(shape, dtype=object))
        entry = self._zip.getinfo(f"{name}.npy")
        # Version 1.0 of the format has a header of at most 64 KiB.
        if not size < entry.file_size <= size + len(_NPY) + 2 + 65535:
            raise self._wrong(f"{name} has {entry.file_size} bytes, {list(shape)} has {size}")
        try:
            data = self._zip.read(entry)
        except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError) as error:
            raise self._wrong(f"{name}: {error}") from error
        header = data[len(_NPY) + 2 : len(data) - size]
        match = _HEADER.fullmatch(header)
        if (
            not data.startswith(_NPY)
            or int.from_bytes(data[len(_NPY) : len(_NPY) + 2], "little") != len(header)
            or match is None
            or tuple(map(int, match[1].split(b", "))) != (1, *shape)
        ):
            raise self._wrong(f"{name} is no float32 array of shape {list(shape)}")
        array = np.frombuffer(data, "<f4", offset=len(data) - size).reshape(shape)
        return array.astype(np.float32, copy=False)


def _check_end(file: BinaryIO, path: Path) -> None:
    """Bound the zip's directory before anything reads it whole.

    Raises:
        BundleCorruptError: it has more entries than there can be, or is no plain zip.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END.size - 20))
    tail = file.read()
    # A zip64 directory, whose locator would stand before the end record, has sizes of its own.
    plain = len(tail) >= _END.size and not tail[: -_END.size].startswith(b"PK\x06\x07")
    if plain:
        signature, _, _, _, entries, length, _, comment = _END.unpack(tail[-_END.size :])
        plain = signature == b"PK\x05\x06" and comment == 0
    if not plain or entries > _MOST_ARRAYS or length > entries * _LONGEST_ENTRY:
        raise BundleCorruptError(
            f"{path} is not the plain zip of at most {_MOST_ARRAYS} arrays that an export "
            f"writes. Export the bundle again."
        )
    file.seek(0)
