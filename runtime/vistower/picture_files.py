"""Picture files from files, folders and glob patterns: what is taken, and what is left out.

In a folder the ending of a name decides, by the endings that Pillow reads in this installation.
Links are followed, each folder is searched once, and the order depends on the names alone.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import PIL
from PIL import Image, ImageFile, features

from vistower.errors import EmptyInputError, ImageDecodeError

NO_PICTURES = frozenset({"MPEG", "EPS"})
"""Formats Pillow opens, and folders are not searched for: it has no decoder of the first, and runs
Ghostscript for the second, which is a program in a file. By its name an .eps is read."""

CODECS = {"AVIF": "avif", "JPEG": "jpg", "JPEG2000": "jpg_2000", "PNG": "zlib", "WEBP": "webp"}
"""Formats → what Pillow must have been built with to decode them."""

OPENED_AS = {"MPO": "JPEG"}
"""Formats that another one's plugin opens."""

RESOURCE_FORK = "._"
"""Start of the files that macOS puts beside each one on foreign disks; never pictures."""

_NAMED = 3


@dataclass(frozen=True)
class LeftOut:
    """Files of one kind in folders that were searched: how many, and the first ones' paths."""

    kind: str
    count: int
    first: tuple[Path, ...]

    def __str__(self) -> str:
        more = ", …" if self.count > len(self.first) else ""
        return f"{self.count} {self.kind} ({', '.join(map(str, self.first))}{more})"


@dataclass(frozen=True)
class PictureFiles:
    """The files found, in order, and what was left out of the folders, most first."""

    paths: Sequence[Path]
    left_out: Sequence[LeftOut]

    @property
    def notice(self) -> str:
        """A sentence on what was left out; empty where nothing was."""
        if not self.left_out:
            return ""
        return f"left out, not read as pictures: {'; '.join(map(str, self.left_out))}"


@lru_cache(maxsize=1)
def picture_suffixes() -> frozenset[str]:
    """Endings, in lower case, of the formats that Pillow decodes here."""
    Image.init()
    return frozenset(
        suffix for suffix, name in Image.registered_extensions().items() if _decodes(name)
    )


def _decodes(name: str) -> bool:
    name = OPENED_AS.get(name, name)
    if name in NO_PICTURES or name not in Image.OPEN:
        return False
    plugin = Image.OPEN[name][0]
    if isinstance(plugin, type) and issubclass(plugin, ImageFile.StubImageFile):
        return False
    return name not in CODECS or bool(features.check(CODECS[name]))


def find_pictures(sources: Iterable[str]) -> PictureFiles:
    """Files as they are; folders searched for pictures; glob patterns, whose folders are too.

    What is named twice comes twice. Of a pattern, ``**`` stands for folders at any depth.

    Raises:
        EmptyInputError: a folder or pattern has no picture.
        ImageDecodeError: a file does not exist, or a folder cannot be searched.
    """
    paths: list[Path] = []
    search = _Search()
    for source in sources:
        if not source:
            raise ImageDecodeError("An empty name was given. Give picture files, folders or globs.")
        path = _expanded(source)
        before = len(paths)
        # Of a path that cannot be, because it is too long, say, there is nothing either.
        if os.path.isdir(path):  # noqa: PTH112
            paths += search.folder(path)
            if len(paths) == before:
                raise EmptyInputError(f"The folder {path} has no picture.{search.explained}")
        elif os.path.lexists(path):
            paths.append(path)
        elif glob.has_magic(source):
            for match in _matches(path):
                paths += search.folder(match) if match.is_dir() else [match]
            if len(paths) == before:
                raise EmptyInputError(f"The pattern {source!r} matches no file.{search.explained}")
        else:
            raise ImageDecodeError(f"{path} does not exist. Give picture files, folders or globs.")
    return PictureFiles(paths, search.left_out)


def _expanded(source: str) -> Path:
    try:
        return Path(source).expanduser()
    # No such user, or no home.
    except RuntimeError:
        return Path(source)


class _Search:
    """Searches folders, and keeps count of what it leaves out."""

    def __init__(self) -> None:
        self._left: dict[str, list[Path]] = {}
        self._counts: dict[str, int] = {}

    @property
    def left_out(self) -> list[LeftOut]:
        kinds = sorted(self._counts, key=lambda kind: (-self._counts[kind], kind))
        return [LeftOut(kind, self._counts[kind], tuple(self._left[kind])) for kind in kinds]

    @property
    def explained(self) -> str:
        found = PictureFiles([], self.left_out).notice
        found = f" {found[0].upper()}{found[1:]}." if found else ""
        return f"{found} Pillow {PIL.__version__} reads {', '.join(sorted(picture_suffixes()))}."

    def folder(self, folder: Path) -> list[Path]:
        """The pictures at any depth, as by sorting their paths part by part."""
        found = []
        for path, again in _walk(folder):
            suffix = path.suffix.lower()
            if again:
                self._leave_out("folders searched before", path)
            elif path.name.startswith(RESOURCE_FORK):
                self._leave_out("resource forks", path)
            elif suffix in picture_suffixes():
                found.append(path)
            else:
                self._leave_out(suffix or "without an ending", path)
        return found

    def _leave_out(self, kind: str, path: Path) -> None:
        self._counts[kind] = self._counts.get(kind, 0) + 1
        if len(first := self._left.setdefault(kind, [])) < _NAMED:
            first.append(path)


def _walk(folder: Path, *, folders: bool = False) -> Iterator[tuple[Path, bool]]:
    """What is in a folder at any depth, by name, links followed, and each real folder once.

    Args:
        folder: where to start.
        folders: yield the folders, ``folder`` too, and no files; hidden ones are left out.

    Yields:
        A file, and False; or a folder that was searched before, and True.

    Raises:
        ImageDecodeError: a folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        if not os.path.isdir(path):  # noqa: PTH112
            if not folders:
                yield path, False
            continue
        try:
            found = path.stat()
            if (found.st_dev, found.st_ino) in seen:
                yield path, True
                continue
            seen.add((found.st_dev, found.st_ino))
            names = sorted(os.listdir(path), reverse=True)  # noqa: PTH208
        except OSError as error:
            raise ImageDecodeError(
                f"The folder {path} cannot be searched ({error.strerror}). Make it readable, or "
                f"name the others."
            ) from error
        if folders:
            yield path, False
        waiting += [path / name for name in names if not folders or name[0] != "."]


def _matches(pattern: Path) -> list[Path]:
    """What a glob pattern matches, sorted; as `glob`, but loops of links end."""
    places = [Path(pattern.anchor)]
    parts = pattern.parts[1:] if pattern.anchor else pattern.parts
    for index, part in enumerate(parts):
        if part == "**":
            # At the end it stands for everything below, which is what a folder stands for too.
            if index < len(parts) - 1:
                places = [below for place in places for below in _visible_folders(place)]
        elif glob.has_magic(part):
            places = [
                place / name
                for place in places
                for name in _names(place)
                if fnmatch.fnmatch(name, part) and (part[0] == "." or name[0] != ".")
            ]
        else:
            places = [place / part for place in places if os.path.lexists(place / part)]
    return sorted(set(places))


def _visible_folders(place: Path) -> list[Path]:
    if not place.is_dir():
        return []
    return [path for path, again in _walk(place, folders=True) if not again]


def _names(place: Path) -> list[str]:
    try:
        return os.listdir(place)  # noqa: PTH208
    # A file or a link to nothing, with nothing in it.
    except (NotADirectoryError, FileNotFoundError):
        return []
    except OSError as error:
        raise ImageDecodeError(
            f"The folder {place} cannot be searched ({error.strerror}). Make it readable, or name "
            f"the others."
        ) from error
