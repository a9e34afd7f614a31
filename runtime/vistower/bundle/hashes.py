"""SHA-256 of files, and a record of what has been hashed before, so that opening stays fast.

A weight file is hashed the first time it is opened (about 1.5 GB/s where the processor has SHA
instructions) and remembered under ``.verified`` of vistower's cache directory, one small file
each: its path, size, inode, and times of modification and of change. Any of them differing, or a
record that cannot be read, means hashing again; a cache that cannot be written means hashing
every time. The time of change (``ctime``) is the system's own: who edits a file and sets its
modification time back still changes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from vistower.bundle.reading import open_regular, read_file
from vistower.errors import BundleError, OptionError

RECORD_DIRECTORY = ".verified"

SETTLED_NS = 2_000_000_000
"""A file changed so shortly before it was hashed is not remembered: within one tick of the file
system's clock (2 s on FAT, 1 s on some network file systems) it could change again unnoticed."""

_LARGEST_RECORD = 16384
_CHUNK = 1 << 20


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb", buffering=0) as file:
        return _digest(file)


def sha256_once(path: Path) -> str:
    """SHA-256 of a file, from the record where the file is as it was when it was hashed."""
    real = path.resolve()
    if (known := _remembered(real)) is not None:
        return known
    return sha256_anew(real)


def sha256_anew(path: Path) -> str:
    """SHA-256 of a file, hashed now, and remembered."""
    real = path.resolve()
    with os.fdopen(open_regular(real), "rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        started = time.time_ns()
        digest = _digest(file)
        after = os.fstat(file.fileno())
    settled = max(before.st_mtime_ns, before.st_ctime_ns) < started - SETTLED_NS
    if settled and _state(real, before) == _state(real, after):
        _remember(real, _state(real, before), digest)
    return digest


def _digest(file: Any) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK))
    while size := file.readinto(buffer):
        digest.update(buffer[:size])
    return digest.hexdigest()


def _state(path: Path, found: os.stat_result) -> dict[str, Any]:
    """What must be the same for a record to count."""
    return {
        "path": os.fspath(path),
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
        "inode": found.st_ino,
    }


def _record(path: Path) -> Path:
    # Not at import: the lookup of bundles needs this module.
    from vistower.bundle.lookup import cache_directory

    name = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    return cache_directory() / RECORD_DIRECTORY / f"{name}.json"


def _remembered(path: Path) -> str | None:
    try:
        record = json.loads(read_file(_record(path), _LARGEST_RECORD))
        digest = record.pop("sha256")
        same = record == _state(path, path.stat())
    # Whatever is in the file, or no home to have a cache in.
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, BundleError):
        return None
    return digest if same and isinstance(digest, str) else None


def _remember(path: Path, state: dict[str, Any], digest: str) -> None:
    """Write the record beside its place and rename it; whoever comes last wins."""
    # A full disk, a read-only cache, no home: the file is hashed again next time.
    with contextlib.suppress(OSError, OptionError, UnicodeError):
        place = _record(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".", dir=place.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({**state, "sha256": digest}, file)
            Path(name).replace(place)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
