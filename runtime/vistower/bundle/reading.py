"""Reads small files of a bundle without trusting them: what they are, how large, how deep.

Nothing but a regular file is ever opened: a pipe would never end, and a device can do anything.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from vistower.errors import BundleCorruptError

LARGEST_JSON = 8 << 20
"""Bytes of a JSON file; a manifest of 100 graphs has some 300 kB."""

DEEPEST_JSON = 32
"""Objects and arrays inside each other; a manifest has 5, transformers' configs a few more."""

LONGEST_NUMBER = 40
"""Characters of a number: Python's conversion of very long ones takes quadratic time."""

_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
"""A string of JSON, quotes included, or one that never ends: so it matches from every quote on, and
no text takes more than one pass."""

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular_file(path: Path) -> os.stat_result:
    """What the system says of a regular file, links followed; nothing is opened.

    Raises:
        BundleCorruptError: it is missing, a link to nowhere, of another kind, or out of reach.
    """
    try:
        found = path.stat()
    except FileNotFoundError as error:
        if path.is_symlink():
            raise BundleCorruptError(
                f"{path} is a link to nowhere (to {path.readlink()}). Fetch what it points to "
                f"(`git annex get`, `dvc pull`, a new download), or export the bundle again."
            ) from error
        raise BundleCorruptError(
            f"The bundle {path.parent} lacks {path.name}: {path} does not exist. Export it again."
        ) from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
        raise BundleCorruptError(f"{path} is {kind}; a bundle holds regular files only.")
    return found


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, open for reading.

    Raises:
        BundleCorruptError: as `regular_file`.
    """
    regular_file(path)
    try:
        # Not blocking, should it have become a pipe since.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleCorruptError(f"{path} was a regular file a moment ago, and is none now.")
    return descriptor


def read_file(path: Path, most: int) -> bytes:
    """The bytes of a regular file that has at most so many.

    Raises:
        BundleCorruptError: as `regular_file`, or it is larger.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        try:
            data = file.read(most + 1)
        except OSError as error:
            raise _unreadable(path, error) from error
    if len(data) > most:
        raise BundleCorruptError(f"{path} is larger than the {most} bytes such a file may have.")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file of bounded size and depth.

    Raises:
        BundleCorruptError: as `read_file`; or it is no JSON, too deep, has a key twice, a number
            of absurd length or NaN, or holds something else than an object.
    """
    data = read_file(path, LARGEST_JSON)
    try:
        text = data.decode("utf-8")
        _check_depth(text)
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_whole,
            parse_float=_real,
            parse_constant=_no_constant,
        )
    # A recursion limit that the user lowered.
    except (ValueError, RecursionError) as error:
        raise BundleCorruptError(
            f"{path} cannot be read as JSON ({type(error).__name__}: {error})."
        ) from error
    if not isinstance(value, dict):
        raise BundleCorruptError(f"{path} holds a {type(value).__name__}, not a JSON object.")
    return value


def _unreadable(path: Path, error: Exception) -> BundleCorruptError:
    return BundleCorruptError(f"{path} cannot be read ({error}).")


def _check_depth(text: str) -> None:
    """Refuse deep nesting before the parser recurses into it."""
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", _STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > DEEPEST_JSON:
            raise ValueError(f"nested deeper than {DEEPEST_JSON}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice in one object")
    return found


def _short(text: str) -> str:
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} characters")
    return text


def _whole(text: str) -> int:
    return int(_short(text))


def _real(text: str) -> float:
    return float(_short(text))


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")
