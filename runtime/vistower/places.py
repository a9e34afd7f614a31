"""Places on the disk that something is written to: where they really are, and what is there."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from vistower.errors import OutputError, OutputExistsError, VistowerError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

Snapshot: TypeAlias = Mapping[str, tuple[int, int, int]]
"""Of a file or of everything in a folder, by path: inode, size in bytes, time of change in ns.
Links are not followed. The file itself is ``""``; a folder in the folder ends in ``/``."""


def real_place(output: Path) -> Path:
    """Where an output really is: links stay, and what they point to is written.

    Raises:
        OutputError: it, or a folder it is in, is a link to nothing.
    """
    absolute = Path(os.path.abspath(output))  # noqa: PTH100  (resolve() raises on loops)
    for path in (absolute, *absolute.parents):
        if path.is_symlink() and not path.exists():
            raise OutputError(
                f"{output} cannot be written: {path} is a link to {path.readlink()}, which is not "
                f"there. Remove the link, or make what it points to."
            )
    return Path(os.path.realpath(absolute))


def is_mount_point(place: Path) -> bool:
    """Whether something is mounted there, a file or a folder, so that it cannot be replaced."""
    return place.is_mount() or str(place) in _mount_points()


def _mount_points() -> frozenset[str]:
    """Those of Linux: ``Path.is_mount`` does not know those of the same file system."""
    try:
        text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return frozenset()
    points = (line.split(" ")[4] for line in text.splitlines())
    return frozenset(
        point.replace(r"\040", " ").replace(r"\011", "\t").replace(r"\012", "\n")
        for point in points
    )


def require_space(output: Path, size: int) -> None:
    """Refuse an output of at least so many bytes where there is no room for it.

    Raises:
        OutputError: saying how much there is.
    """
    free = shutil.disk_usage(output.parent).free
    if free < size:
        raise OutputError(
            f"{output} cannot be written: it takes at least {size / 1e6:,.0f} MB, and "
            f"{output.parent} has {free / 1e6:,.0f} MB left. Make room there, or choose a place on "
            f"another disk."
        )


@contextmanager
def as_output_error(output: Path) -> Iterator[None]:
    """Say of an ``OSError`` that it is the output that cannot be written, and what to do."""
    try:
        yield
    except VistowerError:
        raise
    except OSError as error:
        why = error.strerror or str(error)
        at = f" (at {error.filename})" if error.filename not in {None, str(output)} else ""
        # NumPy says without a number that it could not write everything.
        full = error.errno in _FULL or error.errno is None
        elsewhere = not str(error.filename or output).startswith(str(output.parent))
        if elsewhere and not full:
            raise
        if full:
            remedy = "Make room there, or choose a place on another disk"
        else:
            remedy = "Choose a place that can be written"
        raise OutputError(f"{output} cannot be written: {why}{at}. {remedy}.") from error


def snapshot(path: Path) -> Snapshot:
    """What is at a path; nothing, and a folder with nothing in it, is empty."""
    if not os.path.lexists(path):
        return {}
    if path.is_symlink() or not path.is_dir():
        return {"": _stamp(path)}
    found: dict[str, tuple[int, int, int]] = {}
    for folder, folders, names in os.walk(path, onerror=_raise):
        for name in (*folders, *names):
            entry = Path(folder) / name
            real_folder = name in folders and not entry.is_symlink()
            relative = entry.relative_to(path).as_posix()
            found[f"{relative}/" if real_folder else relative] = (
                (0, 0, 0) if real_folder else _stamp(entry)
            )
    return found


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _raise(error: OSError) -> None:
    raise error


def require_as_it_was(output: Path, path: Path, replaced: Snapshot) -> None:
    """Raise `OutputExistsError`, naming what changed, unless a path holds what an output was."""
    found = snapshot(path)
    if found != replaced:
        changed = [name or output.name for name in found if found[name] != replaced.get(name)]
        gone = [name or output.name for name in replaced if name not in found]
        raise OutputExistsError(
            f"{output} changed while its replacement was made ("
            f"{', '.join((*changed, *gone)[:8])}), and is left as it is. Choose another output, or "
            f"run again."
        )


def remove(path: Path, files: Iterable[str]) -> None:
    """Delete a file; or, of a folder, these files, and the folders that are empty then.

    Raises:
        OutputExistsError: something else is in it.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for name in files:
        if not name.endswith("/"):
            (path / name.lstrip("/")).unlink(missing_ok=True)
    for folder, _, _ in os.walk(path, topdown=False):
        with contextlib.suppress(OSError):
            Path(folder).rmdir()
    if left := snapshot(path):
        raise OutputExistsError(
            f"{path} is what was replaced, and holds what vistower did not write "
            f"({', '.join(list(left)[:8])}). Take it out of there."
        )


def sync(path: Path) -> None:
    """Have the disk take everything: a full one may say so only now."""
    for name in snapshot(path):
        if stat.S_ISREG((path / name).lstat().st_mode):
            descriptor = os.open(path / name, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Have the disk take what was renamed in a folder."""
    # Some file systems cannot, and what was renamed is there all the same.
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def exchange(first: Path, second: Path) -> None:
    """Exchange two entries in one step, so that each path has something at any time.

    Raises:
        OSError: ``ENOSYS`` where the system cannot, ``EINVAL`` where the file system cannot.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(second))
